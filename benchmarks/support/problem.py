"""The sizes of the benchmarks, their activations and the weights before the first step.

N tokens a step, D = d_in, F = d_sae, K = k. Activations are scaled as the trainer scales them: mean
0, E‖x‖ = √D.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NAMED_SIZES = {
    "S1": (4096, 384, 3072, 32),
    "S2": (4096, 768, 6144, 32),
    "S3": (4096, 384, 12288, 192),
    "S4": (2048, 2048, 32768, 64),
    "G1": (4096, 768, 24576, 32),
    "G2": (4096, 4096, 65536, 64),
    "G3": (8192, 4096, 131072, 64),
}
DEFAULT_SIZES = {"cpu": ("S1", "S2", "S3", "S4"), "cuda": ("G1", "G2", "G3")}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """One problem size; `name` is S1…S4, G1…G3 or the numbers as NxDxFxK."""

    name: str
    n_tokens: int
    d_in: int
    d_sae: int
    k: int

    @property
    def product_flops(self) -> float:
        """Operations of x @ W_enc.T, the only dense product that a step needs."""
        return 2.0 * self.n_tokens * self.d_in * self.d_sae

    @property
    def parameters(self) -> int:
        """Entries of both weight matrices."""
        return 2 * self.d_in * self.d_sae

    @property
    def entries(self) -> int:
        """Entries of the sparse code of one batch."""
        return self.n_tokens * self.k

    def describe(self) -> str:
        """Return the size as a heading of a table shows it."""
        return f"{self.name} (N={self.n_tokens}, d_in={self.d_in}, d_sae={self.d_sae}, k={self.k})"


@dataclass(frozen=True)
class Weights:
    """Parameters before the first step: tied, with unit rows, as the trainer initialises them."""

    W_enc: Tensor  # [F, D]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, D]
    b_dec: Tensor  # [D]


def parse_size(text: str) -> Size:
    """Parse `S2` or `64x32x128x4` (N x d_in x d_sae x k); raise ValueError for other text."""
    if text in NAMED_SIZES:
        return Size(text, *NAMED_SIZES[text])
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    if match is None:
        names = ", ".join(NAMED_SIZES)
        raise ValueError(f"size must be one of {names} or like 64x32x128x4 (NxDxFxK), got {text!r}")
    return Size(text, *(int(part) for part in match.groups()))


def make_weights(size: Size, seed: int = 1, device: torch.device = CPU) -> Weights:
    """Return random unit decoder rows, an equal encoder and zero biases.

    The random numbers of a CPU and of a GPU differ.
    """
    generator = torch.Generator(device).manual_seed(seed)
    with device:
        rows = F.normalize(torch.randn(size.d_sae, size.d_in, generator=generator), dim=1)
        return Weights(rows.clone(), torch.zeros(size.d_sae), rows, torch.zeros(size.d_in))


def make_activations(size: Size, batches: int, seed: int = 0, device: torch.device = CPU) -> Tensor:
    """Return sparse mixtures of features with Zipf frequencies, plus noise, [batches * N, D].

    With frequent and rare latents the work of the latent-major ops is hard to balance, as in real
    activations.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rows, active = batches * size.n_tokens, 40
    features = min(max(size.d_sae, 64), 4096)
    with device:
        dictionary = F.normalize(torch.randn(features, size.d_in, generator=generator), dim=1)
        frequency = 1.0 / (torch.arange(features) + 10.0) ** 0.9
        chosen = torch.multinomial(frequency, rows * active, replacement=True, generator=generator)
        strength = torch.rand(rows, active, generator=generator) + 0.5
        noise = torch.randn(rows, size.d_in, generator=generator)
    chosen = chosen.view(rows, active)
    x = F.embedding_bag(chosen, dictionary, per_sample_weights=strength, mode="sum")
    x += 0.9 * noise / size.d_in**0.5
    x -= x.mean(0)
    x *= size.d_in**0.5 / x.norm(dim=1).mean()
    return x


def learning_rate(size: Size) -> float:
    """Return the trainer's default learning rate at this size."""
    return 2e-4 / math.sqrt(size.d_sae / 2**14)
