"""The product of dense matrices in plain PyTorch."""

from torch import Tensor

from sae_fast.ops.reference.encode import ROUNDED_DTYPES


def dense_product(
    left: Tensor,  # [M, K]
    right: Tensor,  # [K, P]
    bias: Tensor | None,  # [P]
    relu: bool,
    precision: str,
) -> Tensor:
    """Return left · right + bias [M, P], then ReLU if asked; bf16 and fp16 round both first."""
    dtype = ROUNDED_DTYPES.get(precision, left.dtype)
    product = left.to(dtype).to(left.dtype) @ right.to(dtype).to(left.dtype)
    if bias is not None:
        product += bias
    return product.relu_() if relu else product
