"""Rows kept from the scan of a shard, so that they need not be read again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from sae_fast.activations.shard import Shard
from sae_fast.activations.storage import Array

# The sample that mean and scale are estimated from; a larger one is read again instead.
KEPT_BYTES = 256 << 20

Span = tuple[int, int]  # rows start..stop


class KeptRows:
    """The rows of some spans of a shard, which do not overlap, as stored."""

    def __init__(self, shard: Shard, spans: Sequence[Span]) -> None:
        self._shard = shard
        self._spans = sorted(spans)
        self._rows: dict[Span, Array] = {}
        self._left = {(start, stop): stop - start for start, stop in self._spans}

    @property
    def bytes(self) -> int:
        """Memory that all kept rows take."""
        return sum(stop - start for start, stop in self._spans) * self._shard.row_bytes

    def note(self, start: int, rows: Array) -> None:
        """Keep the wanted rows among rows [n, D], of which the first has the number `start`."""
        stop = start + len(rows)
        first = max(0, bisect_right(self._spans, (start, start)) - 1)
        for span in self._spans[first:]:
            if span[0] >= stop:
                break
            begin, end = max(start, span[0]), min(stop, span[1])
            if begin < end:
                shape = span[1] - span[0], rows.shape[1]
                kept = self._rows.setdefault(span, np.empty(shape, rows.dtype))
                kept[begin - span[0] : end - span[0]] = rows[begin - start : end - start]
                self._left[span] -= end - begin

    def find(self, start: int, stop: int) -> Array | None:
        """Return the rows start..stop [stop - start, D], None unless they are one of the spans."""
        return self._rows[start, stop] if self._left.get((start, stop)) == 0 else None

    def clear(self) -> None:
        """Forget all rows, and keep none from now on."""
        self._spans, self._rows, self._left = [], {}, {}
