"""Digests of tensors, by which ranks compare their copies of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 22  # numbers that are widened at a time


@torch.no_grad()
def digests(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return of each tensor two sums of its bits, which other numbers or another order change.

    The second one weighs every number by its place. Both are sums of whole numbers, so they depend
    on no order of computation and on no device.
    """
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: Tensor) -> list[int]:
    flat = tensor.detach().contiguous().view(-1)
    flat = flat.view(_INTEGERS[flat.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE].long()
        places = torch.arange(start + 1, start + 1 + len(piece), device=flat.device)
        sums += torch.stack([piece.sum(), (piece * places).sum()])
    found: list[int] = sums.tolist()
    return found
