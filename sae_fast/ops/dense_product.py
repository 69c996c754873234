"""Products of dense matrices, for steps while so many latents are active that codes are dense."""

import torch
from torch import Tensor

from sae_fast.ops.full_precision import without_autocast
from sae_fast.ops.library import fake, refuse_backward


def dense_product(
    left: Tensor,  # [M, K]
    right: Tensor,  # [K, P]
    precision: str = "screened",
) -> Tensor:
    """Return left · right, [M, P] float32; not differentiable.

    It is torch's product, but on CPUs with AMX one of its tiles: of bfloat16 with precision "bf16",
    else of 8-bit integers that stand for 24 bits of every number, relative to the largest number of
    768 or fewer in a row of `left` or a column of `right`. The tiles' result does not depend on the
    number of threads.

    Args:
        left: rows, or columns, are read faster where they are contiguous.
        right: likewise.
        precision: "screened" and "fp32" give float32 precision; "bf16" and "fp16" round both
            matrices to that dtype and sum in float32.

    Raises RuntimeError naming the argument that does not fit.
    """
    product: Tensor = _product(left, right, precision)
    return product


@without_autocast
def _product(left: Tensor, right: Tensor, precision: str) -> Tensor:
    product: Tensor = torch.ops.sae_fast.dense_product.default(left, right, precision)
    return product


@fake("dense_product")
def _(left: Tensor, right: Tensor, precision: str) -> Tensor:
    return left.new_empty(left.size(0), right.size(1))


refuse_backward("dense_product")
