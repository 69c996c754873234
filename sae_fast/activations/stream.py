"""Shuffled batches from HDF5 shards: `ActivationStream`."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.background import OnDemand, Prefetcher
from sae_fast.activations.columns import STARTS, Column
from sae_fast.activations.cutting import joined
from sae_fast.activations.disks import DiskThreads
from sae_fast.activations.mixing import ShardMix, check_origin, full_origin, origin_of, single
from sae_fast.activations.order import EpochPlan, Indices, default_pool_rows
from sae_fast.activations.pool import ResidentRows
from sae_fast.activations.row_scan import RepeatedRows
from sae_fast.activations.served_rows import ServedRows, batch_places
from sae_fast.activations.set_reader import (
    RowCursor,
    SetReader,
    Transforms,
    saved_cursor,
    stored_bytes,
)
from sae_fast.activations.shard import DEFAULT_KEY
from sae_fast.activations.shard_identity import check_same_shards, identity_of, saved_shards
from sae_fast.activations.shard_set import ShardSet, open_shards
from sae_fast.activations.source import (
    Rows,
    Source,
    StoredRows,
    Transform,
    check_state,
    checked_transform,
    empty_rows,
    placed,
)
from sae_fast.activations.targets import TARGETS

STATE_VERSION = 1
PREFETCHED_BATCHES = 4
Cursors = tuple[RowCursor, ...]  # of each set of a mix
BatchReader = Prefetcher[tuple[Rows, Cursors]] | OnDemand[tuple[Rows, Cursors]]


class BatchBuilder:
    """Builds batches from the cursors `start` on, each with the cursors after it.

    In a batch the rows of every set have the places of its turns. Where sequences are whole the
    rows of a set come together instead, so that neighbours stay side by side. Rows in `kept`, one
    entry a set, stay where they were read to, and the batches are built there. With `pin_memory`
    they are for a GPU, whose steps leave the processor's cores to the building of batches. Of a
    `share` (rank, size) every size-th batch is built, and the others are passed over.
    """

    def __init__(
        self,
        mix: ShardMix,
        plans: Sequence[EpochPlan],
        batch_size: int,
        transforms: Transforms,
        start: Cursors,
        *,
        pin_memory: bool = False,
        kept: Sequence[ResidentRows | None] = (),
        background: bool = True,
        share: tuple[int, int] = (0, 1),
        stored: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.stopping = threading.Event()  # set, it ends the reading of a window
        self._mix = mix
        self._columns = mix.columns
        self._batch_size = batch_size
        self._pin_memory = pin_memory
        self._device = kept[0].device if kept and kept[0] else None
        self._background = background
        self._share = share
        self._stored = stored
        self._disks = DiskThreads(mix.sets, background=background)
        self._readers = [
            SetReader(shards, plan, cursor, transforms, self.stopping, self._disks, rows)
            for shards, plan, cursor, rows in zip(
                mix.sets, plans, start, kept or [None] * len(mix.sets), strict=True
            )
        ]

    def reader(self) -> BatchReader:
        """Return what hands the batches over: a thread ahead, or this one without `background`."""
        if not self._background:
            return OnDemand(self.batches())
        try:
            return Prefetcher(
                self.batches(),
                PREFETCHED_BATCHES,
                name="reader",
                does="reads",
                single=not self._pin_memory,
                stopping=self.stopping,
            )
        except BaseException:
            self._disks.close()
            raise

    def batches(self) -> Generator[tuple[Rows, Cursors], None, None]:
        """Yield the batches, without end; raise Stopped when `stopping` is set.

        Closing the generator ends the reading and closes the files.
        """
        try:
            while True:
                yield self._next_batch()
        finally:
            self._disks.close()

    def _next_batch(self) -> tuple[Rows, Cursors]:
        rank, size = self._share
        self._pass_over(rank)
        batch = self._new_batch()
        for reader, (places, count) in zip(self._readers, self._places(), strict=True):
            reader.fill(batch, places, count)
            if STARTS in batch.columns and isinstance(places, slice) and count:
                batch.columns[STARTS][places.start] = True  # the row before it is in another batch
        self._pass_over(size - rank - 1)
        return batch, tuple(reader.cursor for reader in self._readers)

    def _pass_over(self, count: int) -> None:
        """Leave out the next batches, which other processes build."""
        for _ in range(count):
            for reader, (_, rows) in zip(self._readers, self._places(), strict=True):
                reader.skip(rows)

    def _places(self) -> list[tuple[slice | Tensor, int]]:
        """Return the batch positions and row counts of each set in the next batch."""
        served = sum(reader.cursor.tokens for reader in self._readers)
        if len(self._mix.sets) == 1:
            return [(slice(0, self._batch_size), self._batch_size)]
        found = batch_places(self._mix, served, self._batch_size)
        if STARTS not in self._columns:
            return [(torch.from_numpy(places), len(places)) for places in found]
        ends = np.cumsum([len(places) for places in found]).tolist()
        return [
            (slice(end - len(places), end), len(places))
            for places, end in zip(found, ends, strict=True)
        ]

    def _new_batch(self) -> Rows:
        # Page-locked, it can be copied to a GPU beside whatever else is going on.
        size, place = (self._batch_size, self._mix.d_in), (self._device, self._pin_memory)
        return empty_rows(*size, self._columns, *place, stored=self._stored)


class ActivationStream(Source):
    """Rows of all shards in an order drawn from one seed, each exactly once an epoch.

    `shards` is a directory (its held-out files are left out), a file, an opened `ShardSet`, or a
    `ShardMix` of several sets, in each of which every row is served once before any is served
    again. `pool_rows` rows are shuffled together at a time, and twice as many are in memory; each
    set of a mix has its share of them. A background thread reads, widens to float32 and applies
    `transform`; it starts with the first `next_batch`, or with `start`. The order depends on the
    shards, `seed` and `pool_rows`, on nothing else. `device` is what the batches are for: for a GPU
    they come in page-locked memory.

    With `keep_on` all rows stay on that device, as stored, once they were read, and are read only
    once; batches are made there. With `lock` they are kept from being swapped out. Without
    `background` batches are made when they are asked for: a thread of its own must not use a GPU
    that records a graph.

    With `as_stored` batches are built in the element type of the shards, where all sets have the
    same, and widened and transformed when they are taken: `next_stored` leaves that to the caller.

    With `columns`, datasets of the shards with a number for each row, `next_rows` serves these too.
    With `whole_sequences` the rows of a sequence come together and in order, and sequences are
    shuffled instead of rows; a batch border may fall within one, so that the two rows beside it are
    neighbours in no batch. The column STARTS says where one begins. An opened `ShardSet` has the
    columns, sequences and targets that it was opened with; targets are the column TARGETS, each
    served after `target_transform`.
    """

    counts_rows = True  # in tokens_served, every row that a batch has

    def __init__(
        self,
        shards: str | Path | ShardSet | ShardMix,
        *,
        batch_size: int,
        seed: int = 0,
        key: str = DEFAULT_KEY,
        pool_rows: int | None = None,
        skip_nonfinite: bool = False,
        verify: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        device: torch.device | None = None,
        columns: Sequence[str] = (),
        whole_sequences: bool = False,
        repeated_rows: RepeatedRows = "refuse",
        keep_on: torch.device | None = None,
        lock: bool = False,
        background: bool = True,
        as_stored: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not isinstance(shards, ShardSet | ShardMix):
            shards = open_shards(
                shards,
                key=key,
                verify=verify,
                skip_nonfinite=skip_nonfinite,
                columns=columns,
                whole_sequences=whole_sequences,
                repeated_rows=repeated_rows,
            )
        self._mix = single(shards) if isinstance(shards, ShardSet) else shards
        self._columns = shards.columns
        for name in (*columns, *([STARTS] if whole_sequences else [])):
            if name not in self._columns:
                raise ValueError(f"{name}: the shards were opened without this column")
        self.batch_size = batch_size
        self.seed = seed
        if pool_rows is None:
            pool_rows = min(map(default_pool_rows, self._mix.sets))
        self.pool_rows = pool_rows
        self._plans = [
            EpochPlan(part, min(pool_rows, max(1, round(share * pool_rows))), seed, number)
            for number, (part, share) in enumerate(
                zip(self._mix.sets, self._mix.shares, strict=True)
            )
        ]
        self._keep_on, self._lock, self._background = keep_on, lock, background
        on_gpu = keep_on is not None and keep_on.type == "cuda"
        self._pin_memory = device is not None and device.type == "cuda" and not on_gpu
        self._stored = _stored_types(self._mix) if as_stored else None
        self._kept: list[ResidentRows] = []
        self._identities: list[dict[str, Any]] | None = None
        self._described: list[dict[str, Any]] | None = None
        self._shown: tuple[list[tuple[int, int]], list[Path]] | None = None
        self._cursors: Cursors = (RowCursor(),) * len(self._plans)
        self._stall_seconds = 0.0
        self._reader: BatchReader | None = None
        self._stop_reader: Callable[[], object] | None = None
        self._closed = False
        self._share = (0, 1)
        self.set_transform(transform, target_transform)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self._mix.d_in

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the shards, without those dropped as non-finite.

        Of a mix, as many as it takes until every set was served whole.
        """
        return self._mix.rows

    @property
    def columns(self) -> dict[str, Column]:
        """Name, type and range of each column that `next_rows` serves."""
        return self._columns

    @property
    def nonfinite_rows(self) -> int:
        """Rows of the shards that are left out, such as those that hold NaN or Inf."""
        return self._mix.nonfinite_rows

    @property
    def origin(self) -> dict[str, Any]:
        """Model, hook, layer and the like of the activations, as far as the shards say them."""
        return full_origin(self._mix)

    @property
    def tokens_served(self) -> int:
        """Rows served since the very beginning, over resumes."""
        return sum(cursor.tokens for cursor in self._cursors)

    @property
    def stall_seconds(self) -> float:
        """Seconds for which `next_batch` has waited for the reader."""
        return self._stall_seconds

    def current_shards(self) -> list[Path]:
        """Return the shards that the rows of the last batch may come from, sorted."""
        place = [(cursor.epoch, cursor.window) for cursor in self._cursors]
        if self._shown is None or self._shown[0] != place:
            paths = {
                shards.shards[block.shard].path
                for shards, plan, (epoch, window) in zip(
                    self._mix.sets, self._plans, place, strict=True
                )
                for block in plan.windows(epoch)[window]
            }
            self._shown = place, sorted(paths)
        return self._shown[1]

    @property
    def memory_bytes(self) -> int:
        """Memory of the rows, pools or all, and of the batches that are kept ready."""
        types = self._stored or {}
        a_row = self.d_in * types.get("x", torch.float32).itemsize
        for name, column in self._columns.items():
            itemsize = types.get(name, column.dtype).itemsize
            a_row += (column.width or 1) * itemsize
        batches = (PREFETCHED_BATCHES + 2) * self.batch_size * a_row
        return batches + (0 if self._is_on_gpu else self._row_bytes)

    @property
    def device_bytes(self) -> int:
        """Memory that rows kept on a GPU take there."""
        return self._row_bytes if self._is_on_gpu else 0

    @property
    def _is_on_gpu(self) -> bool:
        return self._keep_on is not None and self._keep_on.type == "cuda"

    @property
    def _row_bytes(self) -> int:
        parts = zip(self._mix.sets, self._plans, strict=True)
        return sum(stored_bytes(*part, kept=self._keep_on is not None) for part in parts)

    @cached_property
    def shards(self) -> ShardSet:
        """The shards of all sets, one set after the other."""
        # The first readings of rows, which are checked, are the ones of the batches.
        return replace(joined(list(self._mix.sets)), first_reads=None)

    def batch_rows(self, first: int) -> tuple[Indices, Indices]:
        """Return the shard, a number in `shards`, and the row in it of each row of a batch.

        Args:
            first: how many rows were served before the batch, since the very beginning.
        """
        return self._served_rows.batch(first, self.batch_size)

    @cached_property
    def _served_rows(self) -> ServedRows:
        return ServedRows(self._mix, self._plans)

    def start(self, rank: int = 0, size: int = 1) -> None:
        """Begin to read, so that the first batch is ready, or nearly, when it is asked for.

        Args:
            rank: of this process among those that `next_share` hands a batch each.
            size: their number.
        """
        if self._closed:
            raise ValueError("the stream is closed")
        if self._share != (rank, size):
            self._halt()
            self._share = rank, size
        if self._reader is not None:
            return
        if self._keep_on is not None and not self._kept:
            self._kept = [
                ResidentRows(shards, plan, self._keep_on, self._lock)
                for shards, plan in zip(self._mix.sets, self._plans, strict=True)
            ]
        # Batches as they are stored are transformed by the one who takes them.
        transform, target_transform = (None, None) if self._stored else self._transforms
        builder = BatchBuilder(
            self._mix,
            self._plans,
            self.batch_size,
            (placed(transform, self._keep_on), placed(target_transform, self._keep_on)),
            self._cursors,
            pin_memory=self._pin_memory,
            kept=self._kept,
            background=self._background,
            share=self._share,
            stored=self._stored,
        )
        self._reader = builder.reader()
        # The thread must end with the stream or the process, whichever is first; it holds no
        # reference to the stream, so dropping the stream is enough.
        self._stop_reader = weakref.finalize(self, self._reader.stop)

    def set_transform(
        self, transform: Transform | None, target_transform: Transform | None = None
    ) -> None:
        """Serve rows and targets transformed from the next batch on; None: as they are stored.

        What has been read ahead is read again.
        """
        of_targets = None
        if (targets := self._mix.sets[0].targets) is not None:
            of_targets = checked_transform(target_transform, targets.d_in)
        self._transforms: Transforms = checked_transform(transform, self.d_in), of_targets
        self._halt()

    def next_rows(self) -> Rows:
        """Return the next rows with their columns; raise ShardError if a shard cannot be read."""
        return self.next_share(0, 1)

    def next_share(self, rank: int, size: int) -> Rows:
        """Return the batch of one rank among the next `size`; the other batches are not built.

        Their rows are read, in blocks with the rows of this rank, and checked.
        """
        return self.next_stored(rank, size).widened()

    def next_stored(self, rank: int, size: int) -> StoredRows:
        """Return what `next_share` does, to be widened; with `as_stored` as it is stored."""
        batch = self._next_built(rank, size)
        return StoredRows(batch, *self._transforms) if self._stored else StoredRows(batch)

    def _next_built(self, rank: int, size: int) -> Rows:
        self.start(rank, size)
        assert self._reader is not None
        if self._reader.ready:
            batch, self._cursors = self._reader.get()
            return batch
        begin = time.perf_counter()
        try:
            batch, self._cursors = self._reader.get()
        finally:
            self._stall_seconds += time.perf_counter() - begin
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch served, and what identifies the shards.

        A few numbers: the pool's rows and their order follow from the position (see order.py),
        so resuming reads the window again instead of every checkpoint writing it out.
        """
        if self._described is None:  # once: a position is taken at every step
            self._described = [
                {"origin": origin_of(part), **identity}
                for part, identity in zip(self._mix.sets, self._known_identities(), strict=True)
            ]
        state = {
            "version": STATE_VERSION,
            "seed": self.seed,
            "pool_rows": self.pool_rows,
            "whole_sequences": STARTS in self._columns,
        }
        sets = [
            {"cursor": asdict(cursor), **described}
            for cursor, described in zip(self._cursors, self._described, strict=True)
        ]
        return {**state, **sets[0]} if len(sets) == 1 else {**state, **self._mixed, "sets": sets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that was last when `state` was taken; batch_size may differ.

        Raises ValueError, naming the cause, if a shard, the seed, the pool size or the mix has
        changed.
        """
        whole = STARTS in self._columns
        expected = {"seed": self.seed, "pool_rows": self.pool_rows, "whole_sequences": whole}
        check_state(state, STATE_VERSION, expected)
        sets = state.get("sets", [state])
        if state.get("mix") != self._mixed.get("mix"):
            raise ValueError("the mix has other weights or another number of sets than before")
        if not isinstance(sets, list) or len(sets) != len(self._plans):
            raise ValueError(f"data position: must be of {len(self._plans)} sets of shards")
        cursors = []
        for now, plan, identity, before in zip(
            self._mix.sets, self._plans, self._known_identities(), sets, strict=True
        ):
            saved_shards(before)
            check_origin(now, before.get("origin", {}))
            check_same_shards(before, identity)
            cursors.append(saved_cursor(before.get("cursor"), plan))
        self._halt()
        self._cursors = tuple(cursors)

    @property
    def _mixed(self) -> dict[str, list[int]]:
        """Mix entry of the saved position: rows per set in one period."""
        return {"mix": self._mix.counts} if len(self._mix.sets) > 1 else {}

    def _known_identities(self) -> list[dict[str, Any]]:
        if self._identities is None:
            self._identities = [identity_of(part) for part in self._mix.sets]
        return self._identities

    def close(self) -> None:
        """Stop the reader and close the files; the stream cannot be used afterwards."""
        self._halt()
        self._kept, self._closed = [], True

    def _halt(self) -> None:
        if self._stop_reader is not None:
            self._stop_reader()
        self._reader = self._stop_reader = None

    def __enter__(self) -> ActivationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stored_types(mix: ShardMix) -> dict[str, torch.dtype] | None:
    """Return the element types of rows and targets; None: the ones of two sets differ."""
    found = [_types_of(shards) for shards in mix.sets]
    return found[0] if found.count(found[0]) == len(found) else None


def _types_of(shards: ShardSet) -> dict[str, torch.dtype]:
    types = {"x": shards.storage.torch_dtype}
    if shards.targets is not None:
        types[TARGETS] = shards.targets.storage.torch_dtype
    return types
