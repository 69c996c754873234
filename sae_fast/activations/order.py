"""The order in which rows are served: a pure function of the shards, the pool size and a seed.

An epoch is a permutation of blocks (contiguous rows, read at once) over all shards together. It is
cut into windows of about `pool_rows` rows; a window is read into memory and served in a random
order of its rows. Nothing here depends on time or threads, so a position is three numbers (epoch,
window, rows served of it), and a checkpoint need hold neither the pool's rows nor a generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sae_fast.activations.shard_set import ShardSet

Indices = npt.NDArray[np.int64]

DEFAULT_POOL_ROWS = 1 << 18
DEFAULT_POOL_BYTES = 512 << 20
# Blocks to a window, at least, unless the shards' own chunks are longer than that: rows of one
# block are neighbours in text, and a window of few blocks would serve batches of few texts.
BLOCKS_PER_WINDOW = 16


def default_pool_rows(shards: ShardSet) -> int:
    """Return the rows of the pool by default: 2^18, fewer for rows so wide that it is 512 MiB.

    It does not look at the machine's memory, or the same seed would mean another order there.
    """
    row_bytes = shards.d_in * shards.storage.itemsize
    return max(1, min(DEFAULT_POOL_ROWS, DEFAULT_POOL_BYTES // row_bytes))


def random_order(count: int, *entropy: int) -> Indices:
    """Return a permutation of `count` that depends on no version of NumPy and no machine.

    Generator.permutation may change between NumPy releases; the raw output of PCG64 may not. The
    index in the low bits breaks ties and is what remains once the keys are sorted.
    """
    if count == 0:
        return np.empty(0, np.int64)
    bits = np.uint64(max(1, (count - 1).bit_length()))
    raw: npt.NDArray[np.uint64] = np.random.PCG64(list(entropy)).random_raw(count)
    keys = (raw << bits) | np.arange(count, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    order: Indices = keys.view(np.int64)
    return order


@dataclass(frozen=True)
class Block:
    """Contiguous rows of one shard, start..stop, of which `kept` are served."""

    shard: int
    start: int
    stop: int
    kept: int


class EpochPlan:
    """The windows of every epoch.

    Sets that are mixed have numbers from 0, so that each has an order of its own.
    """

    def __init__(self, shards: ShardSet, pool_rows: int, seed: int, number: int = 0) -> None:
        if pool_rows < 1:
            raise ValueError(f"pool_rows must be at least 1, got {pool_rows}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        # NumPy pads entropy with zeros: set 0 has the order of a set that is not mixed.
        self._set = number
        self.seed = seed
        self.rows = shards.rows
        self.blocks = split_blocks(shards, max(1, pool_rows // BLOCKS_PER_WINDOW))
        self._kept = np.array([block.kept for block in self.blocks], np.int64)
        # Windows of equal size: a short last one would mix only a few blocks.
        self.n_windows = -(-self.rows // pool_rows)

    @property
    def capacity(self) -> int:
        """Rows of memory that reading any window can need."""
        longest = max(block.stop - block.start for block in self.blocks)
        return min(self.rows, -(-self.rows // self.n_windows) + longest) + longest

    def windows(self, epoch: int) -> list[list[Block]]:
        """Return the blocks of each window of an epoch, in the order in which they are read."""
        if self.n_windows == 1:
            return [self.blocks]  # the order of rows is shuffled anyway, and the pool can be kept
        order = random_order(len(self.blocks), self.seed, epoch, 0, self._set)
        before = np.cumsum(self._kept[order]) - self._kept[order]
        window_of = before * self.n_windows // self.rows
        cuts = np.flatnonzero(np.diff(window_of)) + 1
        return [[self.blocks[i] for i in part] for part in np.split(order, cuts)]

    def row_order(
        self, epoch: int, window: int, rows: int, starts: Indices | None = None
    ) -> Indices:
        """Return the order of the rows of a window, by whole sequences where it has `starts`."""
        return shuffled_rows(rows, starts, self.seed, epoch, window + 1, self._set)


def shuffled_rows(rows: int, starts: Indices | None, *entropy: int) -> Indices:
    """Return a permutation of the rows or, where `starts` begin sequences, of the sequences."""
    if starts is None:
        return random_order(rows, *entropy)
    order = random_order(len(starts), *entropy)
    lengths = np.diff(starts, append=rows)[order]
    first = starts[order] - (np.cumsum(lengths) - lengths)
    return np.repeat(first, lengths) + np.arange(rows)


def split_blocks(shards: ShardSet, limit: int | None = None) -> list[Block]:
    """Return all blocks that serve a row, in order, of `limit` rows where chunks allow it."""
    return [
        block
        for number, shard in enumerate(shards.shards)
        for block in split_shard(shards, number, shard.block_rows(limit))
    ]


def _served_end(dropped: Indices, rows: int) -> int:
    """Return the number after the last row that is served, of `rows`."""
    at_end = dropped == np.arange(rows - len(dropped), rows)
    return rows - int(np.argmin(np.append(at_end[::-1], False)))


def split_shard(shards: ShardSet, number: int, step: int) -> list[Block]:
    """Return the blocks of one shard that serve a row, of `step` rows each but the last.

    Where sequences are kept whole, a block ends where the sequence at its end does.
    """
    blocks = []
    dropped, rows = shards.dropped[number], shards.shards[number].rows
    edges = np.arange(0, rows, step)
    if (starts := shards.starts(number)) is not None:
        rows = _served_end(dropped, rows)
        following = np.unique(np.searchsorted(starts, edges))
        edges = starts[following[following < len(starts)]]
    for start, stop in pairwise([*edges.tolist(), rows]):
        first, last = np.searchsorted(dropped, (start, stop))
        kept = stop - start - int(last - first)
        if kept:
            blocks.append(Block(number, start, stop, kept))
    return blocks
