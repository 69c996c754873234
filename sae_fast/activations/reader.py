"""Making batches, in a background thread that keeps some ready or when they are asked for.

One thread does all the work in one order, so what it makes does not depend on timing. HDF5 reads,
gathers and conversions all release the interpreter lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.columns import STARTS
from sae_fast.activations.disks import THREADS, DiskThreads
from sae_fast.activations.mixing import ShardMix
from sae_fast.activations.resident import ResidentRows
from sae_fast.activations.shuffle import EpochPlan
from sae_fast.activations.source import Rows, empty_rows
from sae_fast.activations.supply import Cursor, Stopped, Supply, Transforms

PREFETCHED_BATCHES = 4
_PATIENCE = 1.0  # seconds between two looks at whether the thread is alive
Cursors = tuple[Cursor, ...]  # of each set of a mix


class BatchMaker:
    """Makes batches from `start` on, each with the cursors after it.

    In a batch every set's rows have the places of its turns. Where sequences are whole the rows of
    a set come together instead, or neighbours would be torn apart. The rows of `kept`, of each set,
    stay where they were read to, and the batches are made there.
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
    ) -> None:
        self.stopping = threading.Event()  # set, it ends the reading of a window
        self._mix = mix
        self._columns = mix.columns
        self._batch_size = batch_size
        self._pin_memory = pin_memory
        self._device = kept[0].device if kept and kept[0] else None
        self.disks = DiskThreads(mix.sets, background=background)
        self._supplies = [
            Supply(shards, plan, cursor, transforms, self.stopping, self.disks, rows)
            for shards, plan, cursor, rows in zip(
                mix.sets, plans, start, kept or [None] * len(mix.sets), strict=True
            )
        ]

    def batches(self) -> Iterator[tuple[Rows, Cursors]]:
        """The batches, without end; raises Stopped when `stopping` is set."""
        while True:
            served = sum(supply.cursor.tokens for supply in self._supplies)
            batch = self._new_batch()
            for supply, (places, count) in zip(self._supplies, self._places(served), strict=True):
                supply.fill(batch, places, count)
                if STARTS in batch.columns and isinstance(places, slice) and count:
                    batch.columns[STARTS][places.start] = True  # the row before it is another's
            yield batch, tuple(supply.cursor for supply in self._supplies)

    def _places(self, served: int) -> list[tuple[slice | Tensor, int]]:
        """Where in a batch after so many rows each set's rows go, and how many they are."""
        if len(self._mix.sets) == 1:
            return [(slice(0, self._batch_size), self._batch_size)]
        turns = self._mix.turns_at(served, self._batch_size)
        counts = np.bincount(turns, minlength=len(self._mix.sets)).tolist()
        if STARTS not in self._columns:
            order = torch.from_numpy(np.argsort(turns, kind="stable"))
            return list(zip(torch.split(order, counts), counts, strict=True))
        ends = np.cumsum(counts).tolist()
        return [(slice(end - count, end), count) for end, count in zip(ends, counts, strict=True)]

    def _new_batch(self) -> Rows:
        # Page-locked, it can be copied to a GPU beside whatever else is going on.
        size = self._batch_size, self._mix.d_in
        return empty_rows(*size, self._columns, self._device, self._pin_memory)

    def close(self) -> None:
        """End the reading and close the files."""
        self.disks.close()


class _Thread(threading.Thread):
    """Ends without a traceback where Python has no memory to begin; `BatchReader` notices."""

    def run(self) -> None:
        with suppress(MemoryError):
            super().run()


class BatchReader:
    """Hands over the batches of a maker in order, which a background thread has made ahead."""

    def __init__(self, maker: BatchMaker) -> None:
        self._maker = maker
        self._queue: queue.Queue[tuple[Rows, Cursors] | BaseException] = queue.Queue(
            PREFETCHED_BATCHES
        )
        self._stopping = maker.stopping
        self._single_threaded = threading.Event()
        self._thread = _Thread(target=self._run, name=f"{THREADS}reader", daemon=True)
        threads = torch.get_num_threads()
        maker.disks.start()
        self._thread.start()
        while not self._single_threaded.wait(_PATIENCE):
            self._check_alive()
        # The reader's set_num_threads(1) holds for its own thread, but would also become the
        # default of threads that are yet to start.
        torch.set_num_threads(threads)

    def get(self) -> tuple[Rows, Cursors]:
        """Wait for the next batch; raises what stopped the reader."""
        while True:
            try:
                item = self._queue.get(timeout=_PATIENCE)
                break
            except queue.Empty:
                self._check_alive()
        if isinstance(item, BaseException):
            self._queue.put(item)  # for whoever asks again
            raise item
        return item

    def _check_alive(self) -> None:
        if not self._thread.is_alive() and self._queue.empty():
            raise MemoryError("the thread that reads has ended")

    @property
    def ready(self) -> bool:
        """Whether `get` will not wait."""
        return not self._queue.empty()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        if threading.current_thread().name.startswith(THREADS):
            return  # a stream dropped in a cycle may be collected by the threads that read for it
        while self._thread.is_alive():
            # Making room lets a reader that waits to hand over a batch see that it should stop.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.01)

    def _run(self) -> None:
        # A second team of OpenMP threads would fight the training step for its cores.
        torch.set_num_threads(1)
        torch.get_num_threads()  # without this, the first parallel op would set it back
        self._single_threaded.set()
        try:
            for item in self._maker.batches():
                self._hand_over(item)
        except Stopped:
            return
        except BaseException as error:
            with suppress(Stopped):
                self._hand_over(error)
        finally:
            self._maker.close()

    def _hand_over(self, item: tuple[Rows, Cursors] | BaseException) -> None:
        while not self._stopping.is_set():
            try:
                return self._queue.put(item, timeout=1)
            except queue.Full:
                continue
        raise Stopped


class DirectReader:
    """Makes the batches of a maker when they are asked for, in the caller's thread."""

    ready = False  # what `get` takes is time that its caller waits

    def __init__(self, maker: BatchMaker) -> None:
        self._maker = maker
        self._batches = maker.batches()
        self._error: Exception | None = None

    def get(self) -> tuple[Rows, Cursors]:
        """Make the next batch; raises, from then on, what keeps it from being made."""
        if self._error is not None:
            raise self._error
        try:
            return next(self._batches)
        except Exception as error:
            self._error = error
            raise

    def stop(self) -> None:
        """Close the files."""
        self._maker.close()
