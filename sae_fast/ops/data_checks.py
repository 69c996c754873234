"""The checks of arguments that look at data: on the CPU always, elsewhere they would wait for it.

Their messages are in the list of checks.py.
"""

import torch
from torch import Tensor

from sae_fast.ops.call import Call

_MOST = 2**31 - 1  # entries and rows of a code: they are numbered in int32


def check_data(op_name: str, indices: Tensor, offsets: Tensor | None, d_sae: int) -> None:
    """What only the data can tell: offsets that partition the entries, indices of real latents."""
    op = Call(op_name, "indices", indices)
    if offsets is not None:
        _check_offsets(op, "offsets", offsets, indices.numel())
    _check_range(op, "indices", indices, d_sae)


def check_usable(op_name: str, **tensors: object) -> None:
    """Check tensors that torch's own ops are to read before an op of ours sees them."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        Call(op_name, name, tensor if isinstance(tensor, Tensor) else None).usable(name, tensor)


def check_code(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,
    offsets: Tensor | None,  # [N + 1]
    d_sae: int,
) -> None:
    """Check a code that a caller made, its numbers too where that need not wait for a device."""
    rest = {} if offsets is None else {"offsets": offsets}
    check_usable("SparseCode", values=values, indices=indices, **rest)
    op = Call("SparseCode", "values", values)
    op.require(isinstance(d_sae, int) and d_sae >= 1, "d_sae must be at least 1", str(d_sae))
    n_rows = op.code(values, indices, offsets)
    op.require(n_rows <= _MOST, f"at most {_MOST} rows", str(n_rows))
    op.require(indices.numel() <= _MOST, f"at most {_MOST} entries", str(indices.numel()))
    if not indices.is_cuda:
        check_data("SparseCode", indices, offsets, d_sae)


def check_offsets(op_name: str, offsets: Tensor, entries: int) -> None:
    """Check offsets that partition so many entries."""
    _check_offsets(Call(op_name, "offsets", offsets), "offsets", offsets, entries)


def check_entries(op_name: str, entries: Tensor, count: int, latent_offsets: Tensor | None) -> None:
    """The same of a latent-major view: offsets that partition it, positions of real numbers."""
    op = Call(op_name, "entries", entries)
    if latent_offsets is not None:
        _check_offsets(op, "latent_offsets", latent_offsets, entries.numel())
    _check_range(op, "entries", entries, count)


def check_lists(op_name: str, rows: Tensor, latent_offsets: Tensor, count: int) -> None:
    """Check the latent-major lists of a gradient: offsets that partition them, rows that exist."""
    op = Call(op_name, "rows", rows)
    _check_offsets(op, "latent_offsets", latent_offsets, rows.numel())
    _check_range(op, "rows", rows, count)


def check_rows(op_name: str, numbers: Tensor, name: str, count: int) -> None:
    """Numbers of rows that are there."""
    _check_range(Call(op_name, name, numbers), name, numbers, count)


def _check_offsets(op: Call, name: str, offsets: Tensor, entries: int) -> None:
    op.require(offsets.numel() > 0, f"{name} must have at least one element", "none")
    first, last = int(offsets[0]), int(offsets[-1])
    ascending = first == 0 and last == entries and bool((offsets.diff() >= 0).all())
    must = f"{name} must ascend from 0 to the number of entries, {entries}"
    op.require(ascending, must, f"{first} to {last}")


def _check_range(op: Call, name: str, numbers: Tensor, bound: int) -> None:
    if numbers.numel() > 0:
        low, high = (int(end) for end in torch.aminmax(numbers))
        wrong = low if low < 0 else high
        op.require(low >= 0 and high < bound, f"{name} must be in [0, {bound})", str(wrong))
