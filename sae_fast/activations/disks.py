"""Threads that read blocks: one for each disk, or a few to decode where shards are compressed.

They only fill memory that is not served yet; which block goes where is decided before, so the order
of rows does not depend on them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from sae_fast.activations.background import Workers
from sae_fast.activations.pool import OPEN_FILES, BlockReader
from sae_fast.activations.shard_set import ShardSet

# Where shards are compressed, decoding takes longer than the disk. Blocks are decoded no faster
# than they are wanted, so threads that share the cores with the training cost it nothing.
DECODING_THREADS = max(1, min(4, os.cpu_count() or 1))
# Files that all threads together keep open, of the 1024 that a process may have in most systems.
MOST_OPEN_FILES = 256
# Of fewer, so many are left to checkpoints, metrics and the reading of held-out rows.
SPARE_FILES = 16
Task = Callable[[BlockReader], None]
Wait = Callable[[], None]


class DiskThreads:
    """Reads blocks of some sets; without `background` in the thread that asks for them."""

    def __init__(self, sets: tuple[ShardSet, ...], *, background: bool) -> None:
        self._disk_of = {
            shard.path: disk_of(shard.path) for shards in sets for shard in shards.shards
        }
        n_threads: dict[int, int] = {}
        for shard in (shard for shards in sets if background for shard in shards.shards):
            wanted = DECODING_THREADS if shard.compressed else 1
            disk = self._disk_of[shard.path]
            n_threads[disk] = max(wanted, n_threads.get(disk, 1))
        with_targets = sum(1 if shards.targets is None else 2 for shards in sets)
        readers = max(1, sum(n_threads.values())) * with_targets
        self._open_files = max(1, min(OPEN_FILES, _most_open_files() // readers))
        self._own = threading.local()  # of each thread its `readers`, by set
        self._readers: list[BlockReader] = []
        self._threads: dict[int, Workers] = {}
        try:
            for disk, count in n_threads.items():
                threads = Workers(count, name="disk", does="reads a disk", single=True)
                self._threads[disk] = threads
        except BaseException:
            self.close()
            raise

    @property
    def blocks_ahead(self) -> int:
        """Number of blocks that may be requested before they are needed."""
        return 8 if self._threads else 0

    def read(self, shards: ShardSet, shard: int, task: Task) -> Wait:
        """Let a thread of the disk that a shard is on run a task, with a reader of the set.

        Returns a function that waits until the task is done and raises its error.
        """
        if self._threads:
            threads = self._threads[self._disk_of[shards.shards[shard].path]]
            return partial(threads.wait, threads.submit(partial(self._run, shards, task)))
        done: Future[None] = Future()
        try:
            self._run(shards, task)
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)
        return done.result

    def _run(self, shards: ShardSet, task: Task) -> None:
        readers: dict[int, BlockReader] = self._own.__dict__.setdefault("readers", {})
        if id(shards) not in readers:
            readers[id(shards)] = BlockReader(shards, self._open_files)
            self._readers.append(readers[id(shards)])
        task(readers[id(shards)])

    def close(self) -> None:
        """End the threads, with the blocks that they are at, and close the files."""
        for threads in self._threads.values():
            threads.close()
        while self._readers:
            self._readers.pop().close()


def _most_open_files() -> int:
    """Return how many files may be kept open for the rows, of those that the system allows."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):  # Windows, macOS
        return MOST_OPEN_FILES
    if limit == resource.RLIM_INFINITY:
        return MOST_OPEN_FILES
    return min(MOST_OPEN_FILES, limit - used - SPARE_FILES)


def disk_of(path: Path) -> int:
    """Return the device id of the file's disk; 0 if it is unknown (the read reports the error)."""
    try:
        return path.stat().st_dev
    except OSError:
        return 0
