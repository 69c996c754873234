"""Tensors and JSON values as the bytes that processes exchange."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

# A type is sent as its place in this list.
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
HEADER_BYTES = 2048  # a longer JSON value is sent once more, whole
_LENGTH_BYTES = 8
_ALIGNED = 64  # bytes; kernels read tensors that begin there


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Return the bytes of tensors on one device, [B] uint8, each at an aligned place."""
    parts = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        parts.append(torch.nn.functional.pad(flat, (0, -flat.numel() % _ALIGNED)))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def packed_bytes(specs: Sequence[tuple[int, list[int]]]) -> int:
    """Return how many bytes `pack` makes of tensors of these types and shapes."""
    sizes = (prod(shape) * DTYPES[number].itemsize for number, shape in specs)
    return sum(size + -size % _ALIGNED for size in sizes)


def unpack(
    packed: Tensor,  # [B] uint8
    specs: Sequence[tuple[int, list[int]]],
) -> list[Tensor]:
    """Return the tensors that `pack` has made these bytes of.

    Args:
        packed: the bytes, perhaps with more behind them.
        specs: type, a place in DTYPES, and shape of each.
    """
    tensors, start = [], 0
    for number, shape in specs:
        dtype = DTYPES[number]
        size = prod(shape) * dtype.itemsize
        tensors.append(packed[start : start + size].view(dtype).view(shape))
        start += size + -size % _ALIGNED
    return tensors


def pack_header(value: Any) -> Tensor:
    """Return a JSON value as bytes after their number, [at least HEADER_BYTES] uint8."""
    text = json.dumps(value, separators=(",", ":")).encode()
    whole = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return torch.frombuffer(bytearray(whole.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def unpack_header(packed: Tensor) -> Any:
    """Return the JSON value of these bytes; where they are cut off, how many it needs."""
    raw = packed.numpy().tobytes()
    end = _LENGTH_BYTES + int.from_bytes(raw[:_LENGTH_BYTES], "little")
    return end if end > len(raw) else json.loads(raw[_LENGTH_BYTES:end])
