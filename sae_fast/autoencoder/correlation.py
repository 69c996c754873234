"""Losses on how latents' activations vary together over a batch: independence, orthogonality."""

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from sae_fast import ops

# "mean": over pairs of latents that are not silent in the batch. "sum": the literal sum over pairs,
# which grows with the square of the number of latents.
Reduction = Literal["mean", "sum"]


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
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    found = ops.code_correlation(h, split)
    if reduction == "sum":
        return CorrelationLosses(found.within, found.between)
    first, second = found.n_active.unbind()
    own_pairs, pairs = first * (first - 1), first * second
    return CorrelationLosses(
        found.within / own_pairs.clamp_min(1), found.between / pairs.clamp_min(1)
    )


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
        reduction: "mean" over pairs of latents that are not silent, or the literal "sum".

    Raises:
        ValueError: where `reduction` is neither.
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
        reduction: "mean" over pairs of latents that are not silent, or the literal "sum".

    Raises:
        ValueError: where `reduction` is neither.
    """
    return correlation_losses(h, split, reduction=reduction).orthogonality
