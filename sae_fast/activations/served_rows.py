"""`ServedRows`: which row of which shard each row of a batch is.

The order is a pure function of the shards, the size of the pool and the seed (see order.py), so it
is computed again when it is asked for, and no batch has to carry it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sae_fast.activations.columns import STARTS
from sae_fast.activations.mixing import ShardMix
from sae_fast.activations.order import EpochPlan, Indices
from sae_fast.activations.shard_set import ShardSet


class ServedRows:
    """The rows that a mix of shards serves, by their number since the very beginning.

    Args:
        mix: the shards.
        plans: the order of the rows of each set.
    """

    def __init__(self, mix: ShardMix, plans: Sequence[EpochPlan]) -> None:
        self._mix = mix
        firsts = np.cumsum([0, *(len(shards.shards) for shards in mix.sets)]).tolist()
        self._sets = [
            _SetRows(shards, plan, first)
            for shards, plan, first in zip(mix.sets, plans, firsts, strict=False)
        ]

    def batch(self, first: int, count: int) -> tuple[Indices, Indices]:
        """Return the shard and the row in it of each row of a batch, [count] int64 each.

        Args:
            first: how many rows were served before the batch.
            count: rows of the batch.

        Shards are counted over all sets.
        """
        found = np.empty((2, count), np.int64)
        for own, before, places in zip(
            self._sets, self._before(first), batch_places(self._mix, first, count), strict=True
        ):
            found[:, places] = own.rows(before, len(places))
        shards, rows = found
        return shards, rows

    def _before(self, first: int) -> list[int]:
        """Return how many of the first rows of the mix each set has served."""
        turns = self._mix.turns
        periods, left = divmod(first, len(turns))
        part = np.bincount(turns[:left], minlength=len(self._sets))
        return [
            periods * whole + int(more) for whole, more in zip(self._mix.counts, part, strict=True)
        ]


def batch_places(mix: ShardMix, first: int, count: int) -> list[Indices]:
    """Return the places that the rows of each set have in a batch, in the order they are served.

    Rows of a set come together where sequences are whole; else they have the places of its turns.

    Args:
        mix: the sets.
        first: how many rows of the mix were served before the batch.
        count: rows of the batch.
    """
    turns = mix.turns_at(first, count)
    if STARTS in mix.columns:
        turns = np.sort(turns)
    return [np.flatnonzero(turns == number) for number in range(len(mix.sets))]


class _SetRows:
    """The rows that one set serves; its shards have numbers from `first_shard` on."""

    def __init__(self, shards: ShardSet, plan: EpochPlan, first_shard: int) -> None:
        self._shards, self._plan, self._first_shard = shards, plan, first_shard
        self._window: tuple[int, int] | None = None  # epoch and number of `_rows`
        self._rows = np.empty((2, 0), np.int64)

    def rows(self, first: int, count: int) -> Indices:
        """Return shards and rows, [2, count], of the rows from the first-th on."""
        parts = [np.empty((2, 0), np.int64)]
        while count:
            epoch, before = divmod(first, self._plan.rows)
            rows = self._window_of(epoch, before)
            parts.append(rows[:, :count])
            first, count = first + parts[-1].shape[1], count - parts[-1].shape[1]
        return np.concatenate(parts, axis=1)

    def _window_of(self, epoch: int, before: int) -> Indices:
        """Return the rest of the window that the next row is in, after `before` of the epoch."""
        windows = self._plan.windows(epoch)
        sizes = [sum(block.kept for block in blocks) for blocks in windows]
        ends = np.cumsum(sizes)
        number = int(np.searchsorted(ends, before, side="right"))
        if self._window != (epoch, number):
            parts = [np.empty((3, 0), np.int64)]
            for block in windows[number]:
                dropped = self._shards.dropped[block.shard]
                low, high = np.searchsorted(dropped, (block.start, block.stop))
                rows = np.delete(
                    np.arange(block.start, block.stop), dropped[low:high] - block.start
                )
                starts = self._shards.starts(block.shard)
                begins = np.zeros(len(rows)) if starts is None else np.isin(rows, starts)
                shard = np.full(len(rows), self._first_shard + block.shard)
                parts.append(np.stack([shard, rows, begins]).astype(np.int64))
            window = np.concatenate(parts, axis=1)
            are_whole = STARTS in self._shards.columns
            first_rows = np.flatnonzero(window[2]) if are_whole else None
            order = self._plan.row_order(epoch, number, window.shape[1], first_rows)
            self._rows, self._window = window[:2, order], (epoch, number)
        return self._rows[:, before - int(ends[number]) + sizes[number] :]
