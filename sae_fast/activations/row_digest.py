"""A digest of all rows of a shard, whatever the order of the pieces that they come in.

It is to notice rows that changed by accident while a scan reads them anyway: a cryptographic hash
would take as long as the scan does. It is no protection against intent.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sae_fast.activations.storage import Array

Hashes = npt.NDArray[np.uint64]  # [n], one a row

# SplitMix64 (Steele, Lea, Flood 2014): a counter in steps of _STEP, and the mixing of its bits.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


class RowDigest:
    """Sums a number for each row, made of its place and of its content.

    Args:
        row_bytes: bytes of a row, at least 1.
    """

    def __init__(self, row_bytes: int) -> None:
        size = next(size for size in (8, 4, 2, 1) if row_bytes % size == 0)
        self._word = np.dtype(f"u{size}")
        # Odd factors: a product changes with every bit of a word.
        self._weights = _numbered(0, row_bytes // size) | np.uint64(1)
        self._total = 0

    def hash(self, rows: Array, out: Hashes) -> None:
        """Write the weighted sum modulo 2^64 of the words of each of the rows [n, D] to `out`."""
        words = rows.view(self._word).astype(np.uint64, copy=False)
        np.einsum("ij,j->i", words, self._weights, out=out)

    def add(self, start: int, hashes: Hashes) -> None:
        """Take in rows by their hashes; the first has the number `start`."""
        mixed = _mixed(hashes + _numbered(start, len(hashes)))
        self._total = (self._total + int(mixed.sum())) % 2**64

    def text(self) -> str:
        """Return the digest of the rows so far."""
        return f"{self._total:016x}"


def _numbered(start: int, count: int) -> Hashes:
    """Return well mixed numbers [count] of the places from `start` on."""
    return _mixed(np.arange(start + 1, start + 1 + count, dtype=np.uint64) * _STEP)


def _mixed(numbers: Hashes) -> Hashes:
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        numbers = (numbers ^ (numbers >> shift)) * factor
    result: Hashes = numbers ^ (numbers >> _SHIFTS[2])
    return result
