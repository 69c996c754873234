"""The ops that turn codes into reconstructions, in plain PyTorch."""

import torch
from torch import Tensor

from sae_fast.ops.reference.chunks import chunks


def decode(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32, the shape of values
    offsets: Tensor | None,  # [N + 1] int64
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor | None,  # [D]
) -> Tensor:
    """Return x_hat [N, D]: per token the sum of value * W_dec[index], plus b_dec."""
    total = torch.promote_types(values.dtype, torch.float32)
    n_rows = _n_rows(indices, offsets)
    if indices.numel() == 0:
        x_hat = values.new_zeros(n_rows, W_dec.size(1), dtype=total)
    else:
        x_hat = torch.nn.functional.embedding_bag(
            indices.flatten(),
            W_dec.to(total),
            row_offsets(indices, offsets).to(indices.dtype),
            mode="sum",
            per_sample_weights=values.flatten().to(total),
            include_last_offset=True,
        )
    return x_hat if b_dec is None else x_hat + b_dec


def decode_backward(
    grad: Tensor,  # [N, D]
    indices: Tensor,  # int32
    offsets: Tensor | None,  # [N + 1] int64
    W_dec: Tensor,  # [F, D]
) -> Tensor:
    """Return the gradient of the code values: <grad[n], W_dec[index]> for every entry."""
    total = torch.promote_types(grad.dtype, torch.float32)
    grad_values = grad.new_empty(indices.numel(), dtype=total)
    tokens = entry_rows(indices, offsets)
    flat_indices = indices.flatten()
    for part in chunks(indices.numel(), W_dec.size(1)):
        weights = W_dec[flat_indices[part]].to(total)
        grad_values[part] = weights.mul_(grad[tokens[part]]).sum(1)
    return grad_values.view(indices.shape)


def reconstruct(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32
    offsets: Tensor | None,  # [N + 1] int64
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor | None,  # [D]
    x: Tensor,  # [N, D]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return r = x_hat - x [N, D], |r|² per token, and <r[n], W_dec[index]> for every entry."""
    residual = decode(values, indices, offsets, W_dec, b_dec).sub_(x)
    squared_error = residual.square().sum(1)
    residual_dot = decode_backward(residual, indices, offsets, W_dec)
    return residual.to(W_dec.dtype), squared_error, residual_dot


def entry_rows(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the token n of every entry, flat."""
    offsets = row_offsets(indices, offsets)
    rows = torch.arange(offsets.numel() - 1, device=indices.device)
    return rows.repeat_interleave(offsets.diff(), output_size=indices.numel())


def row_offsets(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the offsets [N + 1] of a code, also of one with rows of equal length."""
    if offsets is not None:
        return offsets
    n_rows, width = indices.shape
    return torch.arange(n_rows + 1, device=indices.device) * width


def _n_rows(indices: Tensor, offsets: Tensor | None) -> int:
    return indices.size(0) if offsets is None else offsets.numel() - 1
