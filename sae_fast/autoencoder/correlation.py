"""Losses on how latents' activations vary together over a batch: independence, orthogonality."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.losses import ratio

# "mean": over pairs of latents that are not silent in the batch. "sum": the literal sum over pairs,
# which grows with the square of the number of latents. "scaled": the sum per latent, of the smaller
# group for orthogonality, and where there are more latents than the N - 1 directions to vary in, by
# so many times as many: 1 for M latents of noise, M / (N - 1) where these are fewer.
Reduction = Literal["scaled", "mean", "sum"]


class CorrelationLosses(NamedTuple):
    """Both losses of one batch, 0-d."""

    independence: Tensor
    orthogonality: Tensor


def correlation_losses(
    h: Tensor,  # [N, F]
    split: int,
    *,
    reduction: Reduction = "mean",
) -> CorrelationLosses:
    """`independence_loss` and `orthogonality_loss` of one batch, at the cost of one of them."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be scaled, mean or sum, got {reduction!r}")
    found = ops.code_correlation(h, split)
    if reduction == "sum":
        return CorrelationLosses(found.within, found.between)
    first, second = found.n_active.unbind()
    if reduction == "scaled":
        directions = max(len(h) - 1, 1)
        return CorrelationLosses(
            _per_latent(found.within, first, first, directions),
            _per_latent(found.between, first, second, directions),
        )
    own_pairs, pairs = first * (first - 1), first * second
    return CorrelationLosses(
        found.within / own_pairs.clamp_min(1), found.between / pairs.clamp_min(1)
    )


def _per_latent(
    total: Tensor,  # 0-d
    first: Tensor,  # 0-d int64
    second: Tensor,  # 0-d int64
    directions: int,
) -> Tensor:
    """See `Reduction`: a sum over pairs of `first` and `second` latents per latent."""
    fewer, more = torch.minimum(first, second), torch.maximum(first, second)
    return total / (fewer.clamp_min(1) * ratio(more, directions).clamp_min(1))


def independence_loss(
    h: Tensor,  # [N, F]
    split: int | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """The squared correlation of two different latents of [0, split), over ordered pairs.

    By default of all latents. Among N tokens no code gets the mean of M > N - 1 latents below
    (M / (N - 1) - 1) / (M - 1): there are only N - 1 directions to vary in.

    Args:
        h: the dense codes [N, F], row = token.
        split: the end of the latents that are compared.
        reduction: see `Reduction`.

    Raises:
        ValueError: where `reduction` is none of these.
    """
    split = h.shape[1] if split is None else split
    return correlation_losses(h, split, reduction=reduction).independence


def orthogonality_loss(
    h: Tensor,  # [N, F]
    split: int,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """The squared correlation of a latent of [0, split) and one of [split, F).

    Args:
        h: the dense codes [N, F], row = token.
        split: where the second group begins.
        reduction: see `Reduction`.

    Raises:
        ValueError: where `reduction` is none of these.
    """
    return correlation_losses(h, split, reduction=reduction).orthogonality
