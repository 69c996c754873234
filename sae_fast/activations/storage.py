"""The element types in which rows are stored, and the test for NaN and infinity in each.

HDF5 has no bfloat16 that every reader knows, so bfloat16 is stored as its bits in uint16, and NumPy
sees it so here as well; torch sees the real type through the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

CHECKED_BYTES = 128 << 10


@dataclass(frozen=True)
class Storage:
    """One element type: its name in a shard's `dtype` attribute and its two faces in memory."""

    name: str
    numpy_dtype: np.dtype[Any]  # what HDF5 and NumPy hold
    torch_dtype: torch.dtype
    bits_dtype: np.dtype[Any]  # unsigned integer of the same size
    exponent: int  # exponent mask: all set in NaN and infinity

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.numpy_dtype.itemsize


FLOAT16 = Storage("float16", np.dtype(np.float16), torch.float16, np.dtype(np.uint16), 0x7C00)
BFLOAT16 = Storage("bfloat16", np.dtype(np.uint16), torch.bfloat16, np.dtype(np.uint16), 0x7F80)
FLOAT32 = Storage("float32", np.dtype(np.float32), torch.float32, np.dtype(np.uint32), 0x7F800000)
STORAGES = {storage.name: storage for storage in (FLOAT16, BFLOAT16, FLOAT32)}


def storage_of(dtype: torch.dtype) -> Storage:
    """Return the element type that stores tensors of `dtype`; float64 becomes float32."""
    if dtype == torch.float64:
        return FLOAT32
    for storage in STORAGES.values():
        if storage.torch_dtype == dtype:
            return storage
    raise ValueError(f"activations must be float16, bfloat16, float32 or float64, got {dtype}")


def as_numpy(rows: Tensor, storage: Storage) -> Array:
    """Return the memory of a contiguous tensor as a NumPy array of the stored type."""
    if storage is BFLOAT16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    return rows.numpy()


def as_tensor(rows: Array, storage: Storage) -> Tensor:
    """Return the memory of a contiguous array as a tensor of the real type."""
    if storage is BFLOAT16:
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows)


def nonfinite_rows(rows: Array, storage: Storage) -> npt.NDArray[np.int64]:
    """Return ascending numbers of the rows [N, D] that hold a NaN or an infinity."""
    # On the bits: np.isfinite on float16 is ten times slower than an integer mask and a maximum.
    # In slabs: a temporary as long as a block would be mapped and faulted in anew each time.
    all_but_sign = storage.bits_dtype.type(np.iinfo(storage.bits_dtype).max >> 1)
    step = max(1, CHECKED_BYTES // max(1, rows.shape[1] * storage.itemsize))
    parts = []
    for start in range(0, len(rows), step):
        magnitude = rows[start : start + step].view(storage.bits_dtype) & all_but_sign
        if magnitude.max(initial=0) >= storage.exponent:
            parts.append(start + np.flatnonzero(magnitude.max(axis=1) >= storage.exponent))
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
