"""The rows in memory: a window read block by block, and batches gathered from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.columns import STARTS, served
from sae_fast.activations.errors import ShardError
from sae_fast.activations.row_scan import nonfinite_error
from sae_fast.activations.shard import OpenShard
from sae_fast.activations.shard_set import ShardSet
from sae_fast.activations.shuffle import Block, Indices
from sae_fast.activations.source import Rows, Transform, take
from sae_fast.activations.storage import Array, as_numpy, as_tensor, nonfinite_rows
from sae_fast.activations.targets import TARGETS
from sae_fast.activations.tensor_shards import open_shard

OPEN_FILES = 64
NO_COLUMNS: Mapping[str, Tensor] = MappingProxyType({})


class BlockReader:
    """Reads blocks of any shard of a set, keeping the last `open_files` files open."""

    def __init__(self, shards: ShardSet, open_files: int = OPEN_FILES) -> None:
        self._shards = shards
        self._open_files = open_files
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._targets: BlockReader | None = None
        if shards.targets is not None:
            self._targets = BlockReader(shards.targets, open_files)

    def read(self, block: Block, out: Tensor, columns: Mapping[str, Tensor] = NO_COLUMNS) -> None:
        """Read the served rows of a block to `out` [kept, D], of the set's element type.

        The `columns` [kept] are read with it. Raises ShardError if the file cannot be read or a row
        is not finite that was not dropped.
        """
        shard = self._shards.shards[block.shard]
        size = block.stop - block.start, shard.d_in
        is_whole = block.kept == size[0]
        stored: Array
        if is_whole and shard.storage is self._shards.storage:
            stored = as_numpy(out, shard.storage)
        else:
            stored = np.empty(size, shard.storage.numpy_dtype)
        self._file(block.shard).read(block.start, block.stop, stored)
        bad = nonfinite_rows(stored, shard.storage)
        dropped = self._shards.dropped[block.shard]
        first, last = np.searchsorted(dropped, (block.start, block.stop))
        expected = dropped[first:last] - block.start
        if bad.size and (surprises := np.setdiff1d(bad, expected)).size:
            raise nonfinite_error(shard, block.start + int(surprises[0]))
        if not is_whole:
            stored = np.delete(stored, expected, axis=0)
        if not is_whole or shard.storage is not self._shards.storage:
            out.copy_(as_tensor(stored, shard.storage))
        for name, column in columns.items():
            if name == TARGETS and self._targets is not None:
                self._targets.read(block, column)
                continue
            numbers = self._starts(block) if name == STARTS else self._column(name, block)
            column.copy_(torch.from_numpy(np.delete(numbers, expected)))

    def expect(self, block: Block) -> None:
        """Let the system fetch a block that will be read soon; what is wrong is told then."""
        with suppress(ShardError):
            self._file(block.shard).expect(block.start, block.stop)

    def _column(self, name: str, block: Block) -> Array:
        return served(self._file(block.shard).read_column(name, block.start, block.stop))

    def _starts(self, block: Block) -> Array:
        starts = self._shards.starts(block.shard)
        assert starts is not None
        first, last = np.searchsorted(starts, (block.start, block.stop))
        begins = np.zeros(block.stop - block.start, bool)
        begins[starts[first:last] - block.start] = True
        return begins

    def _file(self, number: int) -> OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= self._open_files:
            self._open.popitem(last=False)[1].close()
        self._open[number] = open_shard(self._shards.shards[number])
        return self._open[number]

    def close(self) -> None:
        """Close all files."""
        if self._targets is not None:
            self._targets.close()
        while self._open:
            self._open.popitem()[1].close()


def empty_store(
    capacity: int, shards: ShardSet, device: torch.device | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Room for so many rows of a set as they are stored, and for their columns."""
    memory = torch.empty(capacity, shards.d_in, dtype=shards.storage.torch_dtype, device=device)
    columns = {
        name: torch.empty(capacity, dtype=column.dtype, device=device)
        for name, column in shards.columns.items()
        if not column.width
    }
    if (targets := shards.targets) is not None:
        stored_as = targets.storage.torch_dtype
        columns[TARGETS] = torch.empty(capacity, targets.d_in, dtype=stored_as, device=device)
    return memory, columns


class Pool:
    """Memory for one window, filled block by block so that reading can go on beside serving.

    Its `rows` can be served when all of the blocks `unread` were read.
    """

    def __init__(self, capacity: int, shards: ShardSet) -> None:
        self._memory, self._columns = empty_store(capacity, shards)
        self.begin([])

    def begin(self, blocks: list[Block]) -> None:
        """Forget the rows here; `read` will read those of these blocks."""
        self.unread = blocks
        self._ends = np.cumsum([block.kept for block in blocks], dtype=np.int64).tolist()
        self._order = torch.empty(0, dtype=torch.int64)
        self.rows = self._ends[-1] if blocks else 0

    def read(self, number: int, reader: BlockReader) -> None:
        """Read one of the blocks `unread`; several threads may read different ones."""
        self._expect_next(number, reader)
        block = self.unread[number]
        place = slice(self._ends[number] - block.kept, self._ends[number])
        columns = {name: column[place] for name, column in self._columns.items()}
        reader.read(block, self._memory[place], columns)

    def _expect_next(self, number: int, reader: BlockReader) -> None:
        # The disk works on while a block is looked through.
        if number + 1 < len(self.unread):
            reader.expect(self.unread[number + 1])

    def starts(self) -> Indices | None:
        """Which of the rows begin a sequence, as they were read; None: sequences may be cut."""
        if STARTS not in self._columns:
            return None
        starts: Indices = self._column_of_window(STARTS).nonzero().flatten().numpy()
        return starts

    def shuffle(self, order: Indices) -> None:
        """Set the order in which `take` counts the rows."""
        self._order = torch.from_numpy(order)

    def _column_of_window(self, name: str) -> Tensor:
        return self._columns[name][: self.rows]

    def take(
        self,
        start: int,
        stop: int,
        out: Rows,
        places: slice | Tensor,  # stop - start numbers of rows of `out`
        transform: Transform | None,
        target_transform: Transform | None = None,
    ) -> None:
        """Put the start-th to stop-th row of the shuffled order in these places of `out`."""
        stored = Rows(self._memory, self._columns)
        take(stored, self._order[start:stop], out, places, transform, target_transform)


def iterate_blocks(shards: ShardSet, blocks: list[Block]) -> Iterator[Tensor]:
    """Served rows of each block as stored [n, D]; the memory is reused."""
    longest = max(block.stop - block.start for block in blocks)
    memory = torch.empty(longest, shards.d_in, dtype=shards.storage.torch_dtype)
    reader = BlockReader(shards, open_files=1)  # blocks come shard after shard
    try:
        for block in blocks:
            reader.read(block, memory[: block.kept])
            yield memory[: block.kept]
    finally:
        reader.close()
