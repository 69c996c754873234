"""`TextRows`: the rows of shards as running text, numbered in stored order over all shards.

Rows that are left out, such as rows that are not finite, keep their numbers. A sequence is a run
of rows of one document, see activations/columns.py; a row that is left out ends it. Each sequence
is cut into cells of a fixed number of tokens: a latent has one peak in a cell, and blocks of rows
end where a cell does, so that no result depends on the size of the blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_fast.activations import ShardSet
from sae_fast.activations.background import prefetch
from sae_fast.activations.columns import sequence_starts
from sae_fast.activations.order import Block
from sae_fast.activations.pool import BlockReader
from sae_fast.activations.tensor_shards import open_shard

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]
TOKENS, DOCUMENT, POSITION = "token_ids", "doc_id", "position"
AHEAD = 2  # blocks that a thread may be ahead
UNKNOWN = -1  # in place of a number that the shards do not hold


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of one shard: `first` is the number of the first one over all shards."""

    block: Block
    first: int

    @property
    def rows(self) -> int:
        """Rows of the block, with rows that are left out."""
        return self.block.stop - self.block.start


ReadRows = tuple[RowBlock, Tensor, Integers]


class TextRows:
    """The rows of a set of shards, in stored order.

    Args:
        shards: the set.
        cell: tokens of a cell.
        max_rows: how many rows are taken, from the first; None: all.
    """

    def __init__(self, shards: ShardSet, cell: int, max_rows: int | None = None) -> None:
        self.shards = shards
        self.cell = cell
        self._offsets = np.cumsum([0, *(shard.rows for shard in shards.shards)])
        total = int(self._offsets[-1])
        self.rows = total if max_rows is None else min(total, max_rows)
        starts = [self._shard_starts(number) for number in range(len(shards.shards))]
        self.starts: Integers = np.concatenate(starts)
        self.columns = {
            name: self._column(name) for name in (TOKENS, DOCUMENT, POSITION) if self._has(name)
        }

    def blocks(self, size: int) -> list[RowBlock]:
        """Return all rows in blocks of about `size` rows, none of which cuts a cell."""
        size = max(size, self.cell)
        found = []
        for number, (first, stop) in enumerate(pairwise(self._offsets.tolist())):
            stop, start = min(stop, self.rows), first
            while start < stop:
                end = min(start + size, stop)
                if end < stop:
                    end = int(self.cells(np.array([end]))[0])
                found.append(self._block(number, start, end, first))
                start = end
        return found

    def read(self, blocks: list[RowBlock]) -> Iterator[ReadRows]:
        """Yield the rows of each block that are served, [n, D] float32, and their places in it.

        A thread reads ahead of the caller.
        """
        return prefetch(self._read(blocks), AHEAD, name="rows", does="reads rows")

    def _read(self, blocks: list[RowBlock]) -> Generator[ReadRows, None, None]:
        reader = BlockReader(self.shards, open_files=1)
        try:
            for item in blocks:
                block = item.block
                rows = torch.empty(
                    block.kept, self.shards.d_in, dtype=self.shards.storage.torch_dtype
                )
                reader.read(block, rows)
                yield item, rows.float(), self.places(item)
        finally:
            reader.close()

    def places(self, item: RowBlock) -> Integers:
        """Return the places in a block of the rows that are served."""
        block, dropped = item.block, self.shards.dropped[item.block.shard]
        inside = dropped[(dropped >= block.start) & (dropped < block.stop)] - block.start
        return np.delete(np.arange(item.rows), inside)

    def sequence_bounds(self, rows: Integers) -> tuple[Integers, Integers]:
        """Return the first row of the sequence of each row, and the row after its last one."""
        number = np.searchsorted(self.starts, rows, side="right") - 1
        ends = np.append(self.starts[1:], self.rows)
        return self.starts[number], np.minimum(ends[number], self.rows)

    def cells(self, rows: Integers) -> Integers:
        """Return the first row of the cell of each row."""
        first = self.starts[np.searchsorted(self.starts, rows, side="right") - 1]
        return first + (rows - first) // self.cell * self.cell

    def numbers(self, name: str, rows: Integers) -> Integers:
        """Return the numbers of a column for these rows, UNKNOWN where the shards have none."""
        if name not in self.columns:
            return np.full(rows.shape, UNKNOWN, np.int64)
        return self.columns[name][rows].astype(np.int64)

    def _block(self, number: int, start: int, end: int, first: int) -> RowBlock:
        dropped = self.shards.dropped[number]
        low, high = start - first, end - first
        lost = int(np.searchsorted(dropped, high) - np.searchsorted(dropped, low))
        return RowBlock(Block(number, low, high, high - low - lost), start)

    def _has(self, name: str) -> bool:
        for shard in self.shards.shards:
            with open_shard(shard) as file:
                if not file.has(name):
                    return False
        return True

    def _column(self, name: str) -> npt.NDArray[Any]:
        parts = []
        for shard in self.shards.shards:
            with open_shard(shard) as file:
                parts.append(file.read_column(name, 0, shard.rows))
        return np.concatenate(parts)

    def _shard_starts(self, number: int) -> Integers:
        """Return the first rows of the sequences of a shard, and the rows that are left out."""
        shard, dropped = self.shards.shards[number], self.shards.dropped[number]
        with open_shard(shard) as file:
            columns = [
                file.read_column(name, 0, shard.rows) if file.has(name) else None
                for name in (DOCUMENT, POSITION)
            ]
        try:
            starts = sequence_starts(shard.rows, shard.tokens, *columns)
        except ValueError as error:
            logger.warning("%s: %s: all its rows are taken as one sequence", shard.path, error)
            starts = np.zeros(1, np.int64)
        after = dropped[dropped < shard.rows - 1] + 1
        starts = np.union1d(np.union1d(starts, dropped), after)
        return starts.astype(np.int64) + int(self._offsets[number])
