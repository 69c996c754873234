"""The background thread that keeps batches ready.

One thread does all the work in one order, so what it makes does not depend on timing. It holds two
pools: while one is served the next window is read into the other, in step, so that the disk is
used evenly and the end of a window is no pause. HDF5 reads, gathers and conversions all release
the interpreter lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import itemgetter

import torch

from sae_fast.activations.columns import STARTS
from sae_fast.activations.pool import BlockReader, Pool
from sae_fast.activations.shard_set import ShardSet
from sae_fast.activations.shuffle import EpochPlan
from sae_fast.activations.source import Rows, Transform, empty_rows

PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class Cursor:
    """A position in the endless stream: `served` rows of a window of an epoch are behind it."""

    epoch: int = 0
    window: int = 0
    served: int = 0
    tokens: int = 0  # served since the beginning


class BatchReader:
    """Makes batches from `start` on and hands them over in order, each with the cursor after it."""

    def __init__(
        self,
        shards: ShardSet,
        plan: EpochPlan,
        batch_size: int,
        transform: Transform | None,
        start: Cursor,
        pin_memory: bool = False,
        target_transform: Transform | None = None,
    ) -> None:
        self._shards = shards
        self._columns = shards.columns
        self._plan = plan
        self._batch_size = batch_size
        self._transforms = transform, target_transform
        self._pin_memory = pin_memory
        self._queue: queue.Queue[tuple[Rows, Cursor] | BaseException] = queue.Queue(
            PREFETCHED_BATCHES
        )
        self._stopping = threading.Event()
        self._single_threaded = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(start,), name="sae_fast-reader", daemon=True
        )
        threads = torch.get_num_threads()
        self._thread.start()
        self._single_threaded.wait()
        # The reader's set_num_threads(1) holds for its own thread, but would also become the
        # default of threads that are yet to start.
        torch.set_num_threads(threads)

    def get(self) -> tuple[Rows, Cursor]:
        """Wait for the next batch; raises what stopped the reader."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # for whoever asks again
            raise item
        return item

    @property
    def ready(self) -> bool:
        """Whether `get` will not wait."""
        return not self._queue.empty()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        if threading.current_thread() is self._thread:
            return  # a stream dropped in a cycle may be collected by its own reader
        while self._thread.is_alive():
            # Making room lets a reader that waits to hand over a batch see that it should stop.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.01)

    def _run(self, start: Cursor) -> None:
        # A second team of OpenMP threads would fight the training step for its cores.
        torch.set_num_threads(1)
        torch.get_num_threads()  # without this, the first parallel op would set it back
        self._single_threaded.set()
        files = BlockReader(self._shards)
        try:
            for item in self._batches(start, files):
                self._hand_over(item)
        except _Stopped:
            return
        except BaseException as error:
            with suppress(_Stopped):
                self._hand_over(error)
        finally:
            files.close()

    def _hand_over(self, item: tuple[Rows, Cursor] | BaseException) -> None:
        while not self._stopping.is_set():
            try:
                return self._queue.put(item, timeout=1)
            except queue.Full:
                continue
        raise _Stopped

    def _batches(self, start: Cursor, files: BlockReader) -> Iterator[tuple[Rows, Cursor]]:
        """Cut the endless sequence of windows into batches."""
        batch, have, cursor = self._new_batch(), 0, start
        for pool, following, window in self._windows(start, files):
            cursor = replace(window, tokens=cursor.tokens)
            while cursor.served < pool.rows:
                count = min(self._batch_size - have, pool.rows - cursor.served)
                end = cursor.served + count
                place = slice(have, have + count)
                pool.take(cursor.served, end, batch.map(itemgetter(place)), *self._transforms)
                have += count
                cursor = replace(cursor, served=end, tokens=cursor.tokens + count)
                self._keep_up(following, end / pool.rows, files)
                if have == self._batch_size:
                    if STARTS in batch.columns:
                        batch.columns[STARTS][0] = True  # the row before it is in another batch
                    yield batch, cursor
                    batch, have = self._new_batch(), 0

    def _windows(self, start: Cursor, files: BlockReader) -> Iterator[tuple[Pool, Pool, Cursor]]:
        """Each window in turn: its full pool, the pool that the next one goes to, its start."""
        plan = self._plan
        pool = Pool(plan.capacity, self._shards)
        # A set that fits in one window is read once, and only its order changes.
        spare = pool if plan.n_windows == 1 else Pool(plan.capacity, self._shards)
        epoch, number, cursor = start.epoch, start.window, start
        windows = plan.windows(epoch)
        pool.begin(windows[number])
        while True:
            self._keep_up(pool, 1.0, files)
            pool.shuffle(plan.row_order(epoch, number, pool.rows, pool.starts()))
            number += 1
            if number == len(windows):
                epoch, number = epoch + 1, 0
                windows = plan.windows(epoch)
            if spare is not pool:
                spare.begin(windows[number])
            yield pool, spare, cursor
            pool, spare = spare, pool
            cursor = Cursor(epoch, number)

    def _keep_up(self, pool: Pool, fraction: float, files: BlockReader) -> None:
        """Read on until the pool holds `fraction` of its window."""
        while not pool.holds(fraction):
            if self._stopping.is_set():
                raise _Stopped
            pool.read_block(files)

    def _new_batch(self) -> Rows:
        # Page-locked, it can be copied to a GPU beside whatever else is going on.
        size = self._batch_size, self._shards.d_in
        return empty_rows(*size, self._columns, pin_memory=self._pin_memory)


class _Stopped(Exception):
    """The reader was told to stop while it was reading."""
