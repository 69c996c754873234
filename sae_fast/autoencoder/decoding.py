"""Decoding of codes with rows of any floating dtype, outside training."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.ops import reference
from sae_fast.ops.working_copies import float32_copy

NARROW = (torch.bfloat16, torch.float16)


def decode_rows(
    code: ops.SparseCode,
    W: Tensor,  # [F, M]
    bias: Tensor | None,  # [M]
    *,
    precision: str | None = None,
    dense_grad: bool = True,
) -> Tensor:
    """Return Σ value · W[index] + bias, [N, M], for W of any floating dtype.

    The result is float32, or float64 where W is.
    """
    if W.dtype == torch.float64:
        return reference.decode(code.values.to(W.dtype), code.indices, code.offsets, W, bias)
    bias = None if bias is None else float32_copy(bias)
    if code.dtype != torch.float32:
        code = code.with_values(code.values.float())
    if W.dtype in NARROW:
        if torch.is_grad_enabled() and W.requires_grad:
            W = W.float()
        else:  # gathered as it is, in any precision
            precision = "fp32"
    return ops.decode(code, W, bias, precision=precision, dense_grad=dense_grad)
