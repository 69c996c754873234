"""Starting values: tied unit rows for both matrices, and a centre for b_dec."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.config import SAEConfig

MEDIAN_ITERATIONS = 100
MEDIAN_TOLERANCE = 1e-6


def fill_unit_rows_(
    W: Tensor,  # [F, D]
    method: str,
    generator: torch.Generator | None,
) -> None:
    """Fill with unit rows: "random" directions, or "orthogonal" blocks of D rows.

    Drawn on the generator's device, so that a seed gives the same rows wherever the model is.
    """
    source = torch.device("cpu") if generator is None else generator.device
    drawn = W if W.device == source else torch.empty_like(W, device=source)
    drawn.normal_(generator=generator)
    if method == "orthogonal":
        for block in torch.split(drawn, W.shape[1]):
            block.copy_(torch.linalg.qr(block.t()).Q.t())
    if drawn is not W:
        W.copy_(drawn)
    ops.normalize_rows_(W)


def centre(
    sample: Tensor,  # [N, D]
    config: SAEConfig,
) -> Tensor:
    """Where b_dec starts, [D], as `config.b_dec_init` says."""
    if config.b_dec_init == "zero":
        return torch.zeros_like(sample[0])
    if config.b_dec_init == "mean":
        return sample.mean(0)
    return geometric_median(sample)


def geometric_median(
    points: Tensor,  # [N, D]
) -> Tensor:
    """The point [D] with the smallest sum of distances to `points`, by Weiszfeld's iteration.

    Ends when a step is below 1e-6 of the mean distance, or after 100.
    """
    median = points.mean(0)
    for _ in range(MEDIAN_ITERATIONS):
        distances = torch.linalg.vector_norm(points - median, dim=1)
        spread = distances.mean()
        weights = 1 / distances.clamp_min(torch.finfo(points.dtype).eps * spread + 1e-30)
        following = (weights @ points) / weights.sum()
        moved = torch.linalg.vector_norm(following - median)
        median = following
        if bool(moved <= MEDIAN_TOLERANCE * spread):
            break
    return median
