"""Squared correlations between latents' activations over a batch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_fast.ops.library import differentiable, fake, refuse_backward


class CodeCorrelation(NamedTuple):
    """Sums of squared correlations, 0-d and differentiable, and what they are sums over."""

    within: Tensor  # over i != j in the first group
    between: Tensor  # over pairs of the first group and the second
    n_active: Tensor  # [2] int64: latents of each group that are not silent


def code_correlation(
    h: Tensor,  # [N, F]
    split: int | None = None,
) -> CodeCorrelation:
    """Sums of squared Pearson correlations between columns of `h`, over pairs of latents.

    Exact by N×N Gram matrices of tokens: with z_i the activations of latent i less their mean, at
    unit length, Σ_ij (z_i·z_j)² = |Σ_i z_i z_iᵀ|². Memory grows with N² + N·F, never with F².

    A latent that does not vary over the batch beyond rounding, |h − mean| ≤ 2⁻²⁰ |h|, is silent: it
    counts in no sum and gets no gradient.

    Args:
        h: the dense codes [N, F], row = token.
        split: latents [0, split) are the first group, the others the second; by default all are the
            first.

    Raises:
        RuntimeError: where `h` is no float32 matrix or `split` is not in [0, F].
    """
    split = h.shape[1] if split is None else split
    outputs = torch.ops.sae_fast.code_correlation.default(h, split)
    return CodeCorrelation(*outputs[:3])


@fake("code_correlation")
def _(h: Tensor, split: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_tokens, d_sae = h.shape
    matrices = 1 if split == d_sae else 2
    return (
        h.new_empty(()),
        h.new_empty(()),
        h.new_empty(2, dtype=torch.int64),
        h.new_empty(d_sae, dtype=torch.float64),
        h.new_empty(d_sae),
        h.new_empty(matrices, n_tokens, n_tokens),
    )


@fake("code_correlation_backward")
def _(
    grad_within: Tensor | None,
    grad_between: Tensor | None,
    h: Tensor,
    split: int,
    means: Tensor,
    inverse_norms: Tensor,
    gram: Tensor,
) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, ctx.split = inputs
    _, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, *saved[1:])


@differentiable("code_correlation", _setup_context)
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


refuse_backward("code_correlation_backward")
