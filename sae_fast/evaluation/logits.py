"""The tokens whose logits a latent raises or lowers when it adds its direction to the residual.

A direction d changes the logits of a causal model by W_U (g ⊙ d'), as far as the later layers leave
it and up to the final norm's division, which depends on the text. g is the weight of the final norm
and d' the direction without its mean where that norm subtracts one. A masked model has
a non-linear layer in front of W_U, which is left out: its numbers are W_U d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sae_fast.evaluation.neighbours import top_columns

_BLOCK_NUMBERS = 1 << 22  # logits that are computed together


@dataclass(frozen=True)
class LogitEffects:
    """Tokens by the change of their logit for one unit of each latent, [F, n] where not said.

    Attributes:
        promoted: int64, the tokens whose logits rise most, largest first.
        promoted_logits: float32.
        suppressed: int64, the tokens whose logits fall most, smallest first.
        suppressed_logits: float32.
        logit_histogram: int64, of [F, bins]: tokens of the vocabulary by the change of their logit,
            in bins of equal width from the smallest to the largest.
        smallest_logit, largest_logit: float32, of [F].
    """

    promoted: npt.NDArray[np.int64]
    promoted_logits: npt.NDArray[np.float32]
    suppressed: npt.NDArray[np.int64]
    suppressed_logits: npt.NDArray[np.float32]
    logit_histogram: npt.NDArray[np.int64]
    smallest_logit: npt.NDArray[np.float32]
    largest_logit: npt.NDArray[np.float32]


@torch.no_grad()
def logit_effects(
    directions: Tensor,  # [F, D]
    network: Any,  # a transformers model with a head
    count: int,
    *,
    causal: bool,
    bins: int = 40,
) -> LogitEffects:
    """Return the tokens that each latent raises and lowers most; equal ones by ascending number.

    Args:
        directions: what one unit of each latent adds to the residual stream.
        network: the model.
        count: tokens of each list, at most.
        causal: whether the model reads from left to right.
        bins: of the histograms of all logits.

    Raises ValueError where the model has no head, or reads vectors of another width.
    """
    head = network.get_output_embeddings()
    kind = type(network).__name__
    if head is None:
        raise ValueError(f"model: {kind} has no language-model head, so no logits")
    unembedding = head.weight.detach().float()  # [V, D]
    if unembedding.size(1) != directions.size(1):
        raise ValueError(
            f"model: its head reads vectors of {unembedding.size(1)} numbers, decoder rows have "
            f"{directions.size(1)}: they do not write to its residual stream"
        )
    rows = directions.to(unembedding.device, torch.float32)
    norm = final_norm(network, unembedding.size(1)) if causal else None
    if norm is not None:
        rows = through_norm(rows, norm)
    count = min(count, len(unembedding) - 1)
    step = max(1, _BLOCK_NUMBERS // len(unembedding))
    parts: list[list[Tensor]] = [[], [], [], [], [], [], []]
    for first in range(0, len(rows), step):
        logits = rows[first : first + step] @ unembedding.T
        for place, sign in ((0, 1), (2, -1)):
            values, tokens = top_columns(logits * sign, count)
            parts[place].append(tokens.cpu())
            parts[place + 1].append((values * sign).cpu())
        for place, part in enumerate(_histograms(logits, bins), 4):
            parts[place].append(part.cpu())
    return LogitEffects(*(torch.cat(part).numpy() for part in parts))


def _histograms(
    logits: Tensor,  # [B, V]
    bins: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers of logits in bins of equal width, [B, bins], and the ends of each row."""
    counts = torch.stack([torch.histc(row, bins) for row in logits])
    return (counts.long(), *logits.aminmax(dim=1))


def final_norm(network: nn.Module, width: int) -> nn.Module | None:
    """Return the norm in front of the head: the last one that belongs to no layer; None: no such.

    Args:
        network: a causal model.
        width: of its residual stream.
    """
    found = None
    for path, module in network.named_modules():
        is_in_layer = any(part.isdigit() for part in path.split("."))
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        is_norm = "norm" in type(module).__name__.lower()
        if is_norm and not is_in_layer and weight is not None and weight.shape == (width,):
            found = module
    return found


def through_norm(
    rows: Tensor,  # [F, D]
    norm: nn.Module,
) -> Tensor:
    """Return directions as a norm passes them on, without its division: g ⊙ d'.

    g, which some models keep as 1 + weight, is what the norm makes of a vector of ones with
    alternating signs, whose mean is 0 and whose mean square is 1.
    """
    width = rows.size(1)
    signs = torch.ones(width, device=rows.device)
    signs[1::2] = -1
    if width % 2:
        signs[-1] = 0
    signs *= (width / signs.square().sum()).sqrt()
    dtype = next(norm.parameters()).dtype

    def apply(x: Tensor) -> Tensor:
        result: Tensor = norm(x.to(dtype)[None])[0]
        return result.float()

    gain = (apply(signs) - apply(-signs)) / 2 / torch.where(signs == 0, 1, signs)
    weight = norm.weight
    assert isinstance(weight, Tensor)
    gain = torch.where(signs == 0, weight.float(), gain)
    subtracts_mean = torch.allclose(apply(signs + 4), apply(signs), atol=1e-2, rtol=1e-2)
    if subtracts_mean:
        rows = rows - rows.mean(1, keepdim=True)
    return rows * gain
