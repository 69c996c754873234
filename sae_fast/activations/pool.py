"""The rows in memory: a window read block by block, or all rows of a set, kept as they are stored.

Rows that are kept come in as the windows of the first epoch need them, so that nothing waits for
all of them, and are served in the order that reading them from disk would give.
"""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.columns import STARTS, served
from sae_fast.activations.errors import ShardError
from sae_fast.activations.order import Block, EpochPlan, Indices
from sae_fast.activations.row_scan import nonfinite_error
from sae_fast.activations.shard import OpenShard
from sae_fast.activations.shard_set import ShardSet
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
        """Read the served rows of a block to `out` [kept, D], in the set's element type.

        The `columns` [kept] are read with it. Raises ShardError if the file cannot be read, or for
        a row that is not finite and was not dropped.
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
        if self._shards.first_reads is not None:
            self._shards.first_reads.note(block.shard, block.start, stored)
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
        """Let the system fetch a block that will be read soon; the read reports errors."""
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
    """Allocate room for rows of a set as they are stored, and for their columns."""
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
    """Memory for one window, filled block by block so that reading can continue beside serving.

    Its `rows` can be served when all of the blocks `unread` were read.
    """

    def __init__(self, capacity: int, shards: ShardSet) -> None:
        self._memory, self._columns = empty_store(capacity, shards)
        self.begin([])

    def begin(self, blocks: list[Block]) -> None:
        """Forget the rows here; `read` will read the rows of these blocks."""
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
        """Return the numbers of rows that begin a sequence; None: sequences may be cut."""
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
    """Yield the served rows of each block as stored [n, D]; the memory is reused."""
    longest = max(block.stop - block.start for block in blocks)
    memory = torch.empty(longest, shards.d_in, dtype=shards.storage.torch_dtype)
    reader = BlockReader(shards, open_files=1)  # blocks come shard after shard
    try:
        for block in blocks:
            reader.read(block, memory[: block.kept])
            yield memory[: block.kept]
    finally:
        reader.close()


CPU = torch.device("cpu")
INDEX_BYTES = 8
_MIB = 2**20
_CAP_IPC_LOCK = 14  # number of Linux's capability


class ResidentRows:
    """Memory for all served rows of a set, with their columns; a block is read when first needed.

    With `lock` the pages are locked, so that they are never swapped out. Raises ValueError where
    the system does not allow that.
    """

    def __init__(
        self, shards: ShardSet, plan: EpochPlan, device: torch.device = CPU, lock: bool = False
    ) -> None:
        self.device = device
        self.memory, self.columns = empty_store(shards.rows, shards, device)
        if lock:
            for tensor in (self.memory, *self.columns.values()):
                _lock_pages(tensor)
        ends = np.cumsum([block.kept for block in plan.blocks]).tolist()
        self._first = {
            block: end - block.kept for block, end in zip(plan.blocks, ends, strict=True)
        }
        self._here: set[Block] = set()
        self._shards = shards

    def holds(self, block: Block) -> bool:
        """Return whether a block has been read."""
        return block in self._here

    def row_numbers(self, blocks: list[Block]) -> Indices:
        """Return the numbers at which rows of blocks are, or will be, one block after another."""
        return np.concatenate(
            [np.arange(self._first[block], self._first[block] + block.kept) for block in blocks]
        )

    def read(self, block: Block, reader: BlockReader) -> None:
        """Read a block to its place."""
        place = slice(self._first[block], self._first[block] + block.kept)
        memory = self.memory[place]
        columns = {name: column[place] for name, column in self.columns.items()}
        if self.device == CPU:
            reader.read(block, memory, columns)
        else:
            aside, beside = empty_store(block.kept, self._shards, CPU)
            reader.read(block, aside, beside)
            memory.copy_(aside)
            for name, column in columns.items():
                column.copy_(beside[name])
        self._here.add(block)


class ResidentPool(Pool):
    """A window of rows that are kept."""

    def __init__(self, kept: ResidentRows) -> None:
        self._kept = kept
        self._memory, self._columns = kept.memory, kept.columns
        self.begin([])

    def begin(self, blocks: list[Block]) -> None:
        """Serve these blocks; `read` will read those that are not here yet."""
        super().begin([block for block in blocks if not self._kept.holds(block)])
        self._window = blocks
        self.rows = sum(block.kept for block in blocks)

    def read(self, number: int, reader: BlockReader) -> None:
        """Read one of the blocks `unread`."""
        self._expect_next(number, reader)
        self._kept.read(self.unread[number], reader)

    def shuffle(self, order: Indices) -> None:
        """Set the order in which `take` counts the rows."""
        numbers = self._kept.row_numbers(self._window)
        self._order = torch.from_numpy(numbers[order]).to(self._kept.device)

    def _column_of_window(self, name: str) -> Tensor:
        numbers = torch.from_numpy(self._kept.row_numbers(self._window))
        return self._columns[name][numbers.to(self._kept.device)].cpu()


def check_lockable(size: int) -> None:
    """Raise ValueError where the system will not let this process lock so many bytes."""
    import resource  # which Windows lacks

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and size > limit and not _is_privileged():
        raise ValueError(
            f"pin: {size / _MIB:,.1f} MiB cannot be locked in memory, the limit is "
            f"{limit / _MIB:,.1f} MiB (`ulimit -l`)"
        )


def _lock_pages(tensor: Tensor) -> None:
    """Keep a tensor's memory from being swapped out, for as long as it is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
    if libc.mlock(address, size) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise ValueError(
            f"pin: {tensor.nbytes / _MIB:,.1f} MiB cannot be locked in memory: {reason}"
        )


def _is_privileged() -> bool:
    """Return whether no limit of locked memory holds for this process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")]
    return any(mask >> _CAP_IPC_LOCK & 1 for mask in masks)
