"""`SetReader`: the endless rows of one set of shards, window after window, put into batches.

It holds two pools: while one is served the next window is read into the other, in step, so that the
disk is used evenly and the end of a window is no pause. Where the rows are kept a pool is only
a list of them.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from sae_fast.activations.disks import DiskThreads, Wait
from sae_fast.activations.order import EpochPlan
from sae_fast.activations.pool import INDEX_BYTES, Pool, ResidentPool, ResidentRows
from sae_fast.activations.shard_set import ShardSet
from sae_fast.activations.source import Rows, Transform, saved_counts

Transforms = tuple[Transform | None, Transform | None]  # of the rows, of their targets


@dataclass(frozen=True)
class RowCursor:
    """A position in the endless rows: `served` rows of a window of an epoch come before it."""

    epoch: int = 0
    window: int = 0
    served: int = 0
    tokens: int = 0  # served since the beginning


def saved_cursor(values: Any, plan: EpochPlan) -> RowCursor:
    """Return a saved cursor; raise ValueError unless its numbers fit each other and the plan."""
    cursor = RowCursor(*saved_counts(values, "epoch", "window", "served", "tokens"))
    if cursor.epoch * plan.rows > cursor.tokens:
        raise ValueError(f"data position: epoch {cursor.epoch} with {cursor.tokens} tokens served")
    rows = [sum(block.kept for block in blocks) for blocks in plan.windows(cursor.epoch)]
    if cursor.window >= len(rows) or cursor.served > rows[cursor.window]:
        raise ValueError(
            f"data position: window {cursor.window} of {len(rows)} with {cursor.served} rows served"
        )
    before = cursor.epoch * plan.rows + sum(rows[: cursor.window])
    if cursor.tokens != before + cursor.served:
        raise ValueError(
            f"data position: {cursor.tokens} tokens served, but its window begins after {before} "
            f"and {cursor.served} are served of it"
        )
    return cursor


class SetReader:
    """Serves the rows of a set from `start` on; `cursor` is after the last row served."""

    def __init__(
        self,
        shards: ShardSet,
        plan: EpochPlan,
        start: RowCursor,
        transforms: Transforms,
        stopping: threading.Event,
        disks: DiskThreads,
        kept: ResidentRows | None = None,
    ) -> None:
        self.cursor = start
        self._shards = shards
        self._plan = plan
        self._transforms = transforms
        self._stopping = stopping
        self._kept = kept
        self._disks = disks
        self._windows = self._open_windows(start)
        self._pool: Pool | None = None
        self._following: ReadAhead | None = None

    def fill(self, batch: Rows, places: slice | Tensor, count: int) -> None:
        """Put the next `count` rows in these places of the batch; raise Stopped when told to."""
        have = 0
        for pool, served, taken in self._advance(count):
            part: slice | Tensor
            if isinstance(places, slice):
                part = slice(places.start + have, places.start + have + taken)
            else:
                part = places[have : have + taken]
            pool.take(served, served + taken, batch, part, *self._transforms)
            have += taken

    def skip(self, count: int) -> None:
        """Leave out the next `count` rows, which are read with the others of their blocks."""
        for _ in self._advance(count):
            pass

    def _advance(self, count: int) -> Iterator[tuple[Pool, int, int]]:
        """Yield pools with the next `count` rows: their first one there and their number."""
        have = 0
        while have < count:
            pool, served = self._pool, self.cursor.served
            if pool is None or self._following is None or served == pool.rows:
                self._pool, self._following, window = next(self._windows)
                self.cursor = replace(window, tokens=self.cursor.tokens)
                continue
            taken = min(count - have, pool.rows - served)
            yield pool, served, taken
            have += taken
            tokens = self.cursor.tokens + taken
            self.cursor = replace(self.cursor, served=served + taken, tokens=tokens)
            self._keep_up(self._following, self.cursor.served / pool.rows)

    def _open_windows(self, start: RowCursor) -> Iterator[tuple[Pool, ReadAhead, RowCursor]]:
        """Yield each window: its full pool, the reading of the pool after it, and its start."""
        plan = self._plan
        pool = self._new_pool()
        # A set that fits in one window is read once, and only its order changes.
        spare = pool if plan.n_windows == 1 else self._new_pool()
        epoch, number, cursor = start.epoch, start.window, start
        windows = plan.windows(epoch)
        pool.begin(windows[number])
        filling = ReadAhead(pool, self._shards, self._disks)
        while True:
            self._keep_up(filling, 1.0)
            pool.shuffle(plan.row_order(epoch, number, pool.rows, pool.starts()))
            number += 1
            if number == len(windows):
                epoch, number = epoch + 1, 0
                windows = plan.windows(epoch)
            if spare is not pool:
                spare.begin(windows[number])
                filling = ReadAhead(spare, self._shards, self._disks)
            yield pool, filling, cursor
            pool, spare = spare, pool
            cursor = RowCursor(epoch, number)

    def _new_pool(self) -> Pool:
        if self._kept is not None:
            return ResidentPool(self._kept)
        return Pool(self._plan.capacity, self._shards)

    def _keep_up(self, filling: ReadAhead, fraction: float) -> None:
        """Wait until a pool holds `fraction` of its window."""
        for wait in filling.up_to(fraction):
            if self._stopping.is_set():
                raise Stopped
            wait()


class ReadAhead:
    """The reading of a pool's blocks in order, some blocks further than what is needed yet."""

    def __init__(self, pool: Pool, shards: ShardSet, disks: DiskThreads) -> None:
        self._pool, self._shards, self._disks = pool, shards, disks
        self._asked = self._done = 0
        self._reads: deque[Wait] = deque()

    def up_to(self, fraction: float) -> Iterator[Wait]:
        """Yield what to wait for, block by block, until the pool holds `fraction` of them."""
        total = len(self._pool.unread)
        needed = math.ceil(fraction * total)
        while self._done < needed:
            self._ask(min(total, needed + self._disks.blocks_ahead))
            yield self._reads.popleft()
            self._done += 1

    def _ask(self, count: int) -> None:
        for number in range(self._asked, count):
            task = partial(self._pool.read, number)
            shard = self._pool.unread[number].shard
            self._reads.append(self._disks.read(self._shards, shard, task))
        self._asked = count


def stored_bytes(shards: ShardSet, plan: EpochPlan, *, kept: bool) -> int:
    """Return the bytes of the pools of a set or, where all rows are kept, of rows and order."""
    pools = 1 if plan.n_windows == 1 else 2
    rows = shards.rows if kept else pools * plan.capacity
    columns = (column for column in shards.columns.values() if not column.width)
    total = rows * sum(column.dtype.itemsize for column in columns)
    for stored in (shards, shards.targets):
        if stored is not None:
            total += rows * stored.d_in * stored.storage.itemsize
    return total + (INDEX_BYTES * pools * min(rows, plan.capacity) if kept else 0)


class Stopped(Exception):
    """The reader was told to stop while it was reading."""
