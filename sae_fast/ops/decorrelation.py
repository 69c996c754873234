"""The decorrelation penalty on the rows of a weight matrix."""

from typing import Any

import torch
from torch import Tensor

from sae_fast.ops.library import differentiable, fake


def decorrelation(
    W: Tensor,  # [F, D]
) -> Tensor:
    """Σ_{i≠j} (ŵ_i·ŵ_j)² with ŵ the rows at unit length: 0-d, differentiable.

    Exact by the D×D Gram matrix: memory does not grow with F².
    """
    loss: Tensor = torch.ops.sae_fast.decorrelation.default(W)[0]
    return loss


@fake("decorrelation")
def _(W: Tensor) -> tuple[Tensor, Tensor]:
    return W.new_empty(()), torch.empty_like(W, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad)


@differentiable("decorrelation", _setup_context)
def _(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> Tensor | None:
    (grad,) = ctx.saved_tensors
    return None if grad_loss is None else grad_loss * grad
