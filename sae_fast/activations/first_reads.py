"""Checks of rows when they are read for the first time, in place of a pass before the first step.

The pieces of a shard come in the order of the batches, so its SHA-256 cannot be computed. Shards
that sae_fast writes state a digest of their rows that has no order; it is compared when the last
row of a shard has been read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence

import numpy as np

from sae_fast.activations.errors import ShardError
from sae_fast.activations.row_scan import RowScanner
from sae_fast.activations.scanning import Checks
from sae_fast.activations.shard import Shard, stated_digest
from sae_fast.activations.storage import Array


class FirstReads:
    """The rows of a set of shards that have not been looked at yet.

    Args:
        shards: the shards of the set.
        unknown: the numbers of those whose rows are not known from an earlier scan.
        checks: what is checked; a shard that has been read whole is noted in its record.
    """

    def __init__(self, shards: Sequence[Shard], unknown: Collection[int], checks: Checks) -> None:
        self._checks = checks
        self._unread = {number: _UnreadShard(shards[number], checks) for number in unknown}

    def after(self, first: int) -> FirstReads:
        """Return the rows of the shards from number `first` on, which has the number 0 there."""
        part = FirstReads((), (), self._checks)
        part._unread = {
            number - first: shard for number, shard in self._unread.items() if number >= first
        }
        return part

    def note(self, number: int, start: int, rows: Array) -> None:
        """Look at rows [n, D] of a shard as stored, as far as they are new; several threads may.

        Raises ShardError for rows that cannot be trained on, and for a shard whose rows are not
        those that it was written with.
        """
        if number in self._unread and self._unread[number].note(start, rows):
            del self._unread[number]


class _UnreadShard:
    """A shard of which not all rows have been looked at."""

    def __init__(self, shard: Shard, checks: Checks) -> None:
        self._shard, self._record = shard, checks.record
        self._scanner = RowScanner(
            shard, skip_nonfinite=checks.skip_nonfinite, repeated_rows=checks.repeated_rows
        )
        self._seen = np.zeros(shard.rows, bool)
        self._left = shard.rows
        self._lock = threading.Lock()
        self._scanned_at = time.time_ns()

    def note(self, start: int, rows: Array) -> bool:
        """Look at the new ones among some rows; return whether these were the last."""
        with self._lock:
            if not self._left:
                return False
            new = np.flatnonzero(~self._seen[start : start + len(rows)])
            for part in np.split(new, np.flatnonzero(np.diff(new) != 1) + 1):
                if part.size:
                    self._scanner.add(start + int(part[0]), rows[part[0] : part[-1] + 1])
            self._seen[start : start + len(rows)] = True
            self._left -= len(new)
            if self._left:
                return False
            self._conclude()
            return True

    def _conclude(self) -> None:
        shard, scan = self._shard, self._scanner.result()
        expected = stated_digest(shard)
        if expected is not None and expected != scan.digest:
            raise ShardError(f"{shard.path}: damaged: its rows do not match their digest")
        self._record.note(shard, verified_lazily(shard), self._scanned_at, scan)


def verified_lazily(shard: Shard) -> str:
    """Return what a record says of a shard whose rows were checked when they were first read."""
    return f"rows:{stated_digest(shard) or ''}"
