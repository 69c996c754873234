"""Products of dense matrices, for steps while so many latents are active that codes are dense."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast.ops.checks import check_half_sums
from sae_fast.ops.full_precision import without_autocast


def dense_product(
    left: Tensor,  # [M, K]
    right: Tensor,  # [K, P]
    precision: str = "screened",
    *,
    bias: Tensor | None = None,  # [P]
    relu: bool = False,
) -> Tensor:
    """Return left · right + bias, then ReLU if asked: [M, P] float32, not differentiable.

    It is torch's product, but on CPUs with AMX a product of its tiles: of bfloat16 with precision
    "bf16", else of 8-bit integers that stand for 24 bits of every number, relative to the largest
    number of 768 or fewer in a row of `left` or a column of `right`. The tiles' result does not
    depend on the number of threads.

    Args:
        left: read in place where its rows or its columns are contiguous, else from a copy.
        right: read in place where its rows or its columns are contiguous, else from a copy.
        precision: "screened" and "fp32" give float32 precision; "bf16" and "fp16" round both
            matrices to that dtype and sum in float32.
        bias: added to every row, or None.
        relu: whether negative numbers become 0.

    Raises RuntimeError for an argument that does not fit; the message names it.
    """
    if precision == "fp16":
        check_half_sums("dense_product", left.device)
    product: Tensor = _product(left, right, bias, relu, precision)
    return product


@without_autocast
def _product(
    left: Tensor, right: Tensor, bias: Tensor | None, relu: bool, precision: str
) -> Tensor:
    op = torch.ops.sae_fast.dense_product.default
    product: Tensor = op(left, right, bias, relu, precision)
    return product


def linear(
    x: Tensor,  # [N, D]
    W: Tensor,  # [P, D]
    bias: Tensor | None = None,  # [P]
    precision: str = "screened",
) -> Tensor:
    """Return x Wᵀ + bias, [N, P], differentiable; it and its gradients are `dense_product`s."""
    result: Tensor = _Linear.apply(x, W, bias, precision)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    """Autograd of `linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, precision: str) -> Tensor:
        ctx.precision = precision
        ctx.save_for_backward(x, W)
        return dense_product(x, W.t(), precision, bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        needs_x, needs_weights, needs_bias = ctx.needs_input_grad[:3]
        grad_x = dense_product(grad, W, ctx.precision) if needs_x else None
        grad_weights = dense_product(grad.t(), x, ctx.precision) if needs_weights else None
        return grad_x, grad_weights, grad.sum(0) if needs_bias else None, None
