"""The parts of a case of `kernels.py`: two calls that must agree, a floor, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.support.cuda_rates import chunked_product, product_dtype, product_seconds
from benchmarks.support.floors import Rates, has_native_product
from benchmarks.support.problem import CPU, Size, Weights, make_activations, make_weights

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """One op at one size; `compare` returns the two results, which must agree."""

    name: str
    ours: Callable[[], object]
    torch: Callable[[], object]
    floor: float  # seconds
    floor_of: str
    compare: Callable[[], tuple[Tensor, Tensor]]
    tolerance: float = TOLERANCE
    floor_call: Callable[[], object] | None = None  # if given, timed in the rounds as the floor

    def check(self) -> None:
        """Raise RuntimeError if the results differ by over `tolerance` of the largest entry."""
        ours, expected = (result.float() for result in self.compare())
        scale = float(expected.abs().max()) or 1.0
        error = float((ours - expected).abs().max()) / scale
        if not error <= self.tolerance:
            raise RuntimeError(f"{self.name}: differs from PyTorch by {error:g} of the largest")


class Setting:
    """The inputs of one size, as they occur in a training step."""

    def __init__(
        self, size: Size, rates: Rates, products: dict[str, float], device: torch.device = CPU
    ) -> None:
        self.size = size
        self.device = device
        self.rates = rates
        self.products = products  # seconds of the bare product, by precision
        self.ops = torch.ops.sae_fast
        self.x = make_activations(size, 1, device=device)
        self.weights: Weights = make_weights(size, device=device)
        self.weights.b_dec.copy_(self.x.mean(0))
        self.weights.b_enc.normal_(0, 0.01, generator=torch.Generator(device).manual_seed(3))

    @cached_property
    def code(self) -> tuple[Tensor, Tensor]:
        """The values and indices [N, K] of the exact selection."""
        values, indices, _, _ = self.encode("fp32")
        return values, indices

    def encode(
        self, precision: str, dead: Tensor | None = None, k_aux: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Call encode_topk with a packed encoder, as training does; return its four results."""
        w = self.weights
        packed = self.packed(precision)
        result: tuple[Tensor, Tensor, Tensor, Tensor] = self.ops.encode_topk(
            self.x, w.W_enc, w.b_enc, w.b_dec, self.size.k, precision, dead, k_aux, *packed
        )
        return result

    def pre_acts(self, dtype: torch.dtype | None) -> Tensor:
        """Return PyTorch's pre-activations [N, F], in float32 or rounded as by autocast."""
        w = self.weights
        if dtype is None:
            return F.linear(self.x - w.b_dec, w.W_enc, w.b_enc)
        x = (self.x - w.b_dec).to(dtype)
        return F.linear(x, w.W_enc.to(dtype), w.b_enc.to(dtype))

    def bare_product(self, precision: str) -> Callable[[], object] | None:
        """Return a call of the encoder's product alone, or None if the module registers none.

        On a GPU it is torch.mm, in the chunks that are fastest at this size.
        """
        if self.device.type == "cuda":
            return self.library_product(product_dtype(precision))
        if not has_native_product():
            return None
        product, packed = torch.ops.sae_fast_benchmark.encoder_product, self.packed(precision)
        return lambda: product(self.x, self.weights.W_enc, precision, *packed)

    def library_product(self, dtype: torch.dtype) -> Callable[[], object]:
        """Return a call of torch.mm with 16-bit operands and float32 results."""
        x = (self.x - self.weights.b_dec).to(dtype)
        return chunked_product(x, self.weights.W_enc.to(dtype), self.columns[str(dtype)])

    @cached_property
    def columns(self) -> dict[str, int]:
        """The number of columns in the fastest chunk of the product, by dtype."""
        fastest = {}
        for dtype in (torch.bfloat16, torch.float16):
            seconds = product_seconds(self.size, dtype, self.device)
            fastest[str(dtype)] = min(seconds, key=lambda chunk: seconds[chunk])
        return fastest

    def packed(self, precision: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the encoder's working copy in a precision, which is made once."""
        if precision not in self._packed:
            self._packed[precision] = self.ops.pack_encoder(self.weights.W_enc, precision)
        return self._packed[precision]

    @cached_property
    def _packed(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        return {}

    def gather_floor(self, passes: int, written: int = 0) -> float:
        """Return the seconds to gather N·K rows of W_dec `passes` times and write some floats."""
        gathered = passes * self.size.entries * self.size.d_in * 4 / self.rates.gather_latents
        return gathered + 4 * written / self.rates.stream
