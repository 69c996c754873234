"""Penalties on a weight matrix and on codes: sums over pairs of latents, none of them listed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_fast.ops.checks import check_half_sums
from sae_fast.ops.registry import differentiable


def decorrelation(
    W: Tensor,  # [F, D]
) -> Tensor:
    """Return Σ_{i≠j} (ŵ_i·ŵ_j)² with ŵ the rows at unit length: 0-d, differentiable.

    Exact by the D×D Gram matrix: memory does not grow with F².
    """
    check_half_sums("decorrelation", W.device)
    loss: Tensor = torch.ops.sae_fast.decorrelation.default(W)[0]
    return loss


def _setup_decorrelation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad)


@differentiable("decorrelation", _setup_decorrelation)
def _(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> Tensor | None:
    (grad,) = ctx.saved_tensors
    return None if grad_loss is None else grad_loss * grad


class CodeCorrelation(NamedTuple):
    """Sums of squared correlations, 0-d and differentiable, and how many latents they cover."""

    within: Tensor  # over i != j in the first group of latents
    between: Tensor  # over pairs of the first group and the second
    n_active: Tensor  # [2] int64: latents of each group that are not silent


def code_correlation(
    h: Tensor,  # [N, F]
    split: int | None = None,
) -> CodeCorrelation:
    """Return sums of squared Pearson correlations between columns of `h`, over pairs of latents.

    Exact by N×N Gram matrices of tokens: with z_i the activations of latent i minus their mean, at
    unit length, Σ_ij (z_i·z_j)² = |Σ_i z_i z_iᵀ|². Memory grows with N² + N·F, never with F².

    A latent that does not vary over the batch beyond rounding, |h − mean| ≤ 2⁻²⁰ |h|, is silent: it
    counts in no sum and gets no gradient.

    Args:
        h: the dense codes [N, F], row = token.
        split: latents [0, split) are the first group, the others the second; by default all latents
            are in the first.

    Raises:
        RuntimeError: if `h` is not a float32 matrix or `split` is not in [0, F].
    """
    check_half_sums("code_correlation", h.device)
    split = h.shape[1] if split is None else split
    outputs = torch.ops.sae_fast.code_correlation.default(h, split)
    return CodeCorrelation(*outputs[:3])


def _setup_correlation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, ctx.split = inputs
    _, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, *saved[1:])


@differentiable("code_correlation", _setup_correlation)
def _(
    ctx: Any, grad_within: Tensor | None, grad_between: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, None]:
    if grad_within is None and grad_between is None:
        return None, None
    h, means, inverse_norms, gram = ctx.saved_tensors
    grad_h = torch.ops.sae_fast.code_correlation_backward.default(
        grad_within, grad_between, h, ctx.split, means, inverse_norms, gram
    )
    return grad_h, None
