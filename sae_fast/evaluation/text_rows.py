"""`TextRows`: rows of shards as running text, numbered in stored order over all shards.

They are all rows, or pieces of the shards. Rows that are left out, such as rows that are not
finite, keep their numbers. A sequence is a run of rows of one document, see activations/columns.py;
a row that is left out ends it, and so does the end of a piece. Each sequence is cut into cells of
a fixed number of tokens: a latent has one peak in a cell, and blocks of rows end where a cell does,
so that no result depends on the size of the blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_fast.activations import ShardSet
from sae_fast.activations.background import prefetch
from sae_fast.activations.columns import STARTS, require_whole, sequence_starts
from sae_fast.activations.errors import ShardError
from sae_fast.activations.order import Block
from sae_fast.activations.pool import BlockReader
from sae_fast.activations.storage import Array
from sae_fast.activations.tensor_shards import open_shard

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]
TOKENS, DOCUMENT, POSITION = "token_ids", "doc_id", "position"
AHEAD = 2  # blocks that a thread may be ahead
_GAP = 1 << 14  # rows between pieces whose columns are read at once
UNKNOWN = -1  # in place of a number that the shards do not hold


@dataclass(frozen=True)
class Piece:
    """The rows start..stop of the shard of a number."""

    shard: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Rows of the piece, with rows that are left out."""
        return self.stop - self.start


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a text: `first` is the number of the first one."""

    parts: tuple[Block, ...]
    first: int

    @property
    def rows(self) -> int:
        """Rows of the block, with rows that are left out."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def kept(self) -> int:
        """Rows of the block that are served."""
        return sum(part.kept for part in self.parts)


ReadRows = tuple[RowBlock, Tensor, Integers]


class TextRows:
    """Rows of a set of shards, in stored order.

    Args:
        shards: the set.
        cell: tokens of a cell.
        max_rows: how many rows are taken, from the first; None: all.
        pieces: the rows that the text consists of, in ascending order without overlap. None: the
            shards, from the first row to the last.
    """

    def __init__(
        self,
        shards: ShardSet,
        cell: int,
        max_rows: int | None = None,
        pieces: Sequence[Piece] | None = None,
    ) -> None:
        self.shards = shards
        self.cell = cell
        if pieces is None:
            pieces = [Piece(number, 0, shard.rows) for number, shard in enumerate(shards.shards)]
        self.pieces = _first_rows(pieces, max_rows)
        self._offsets = np.cumsum([0, *(piece.rows for piece in self.pieces)])
        self.rows = int(self._offsets[-1])
        read = [
            columns
            for number, own in groupby(self.pieces, key=lambda piece: piece.shard)
            for columns in self._read_columns(number, list(own))
        ]
        self._warn_of_gaps(read)
        self.columns = {
            name: np.concatenate([columns[name] for columns in read])
            for name in (TOKENS, DOCUMENT, POSITION)
            if all(name in columns for columns in read)
        }
        self.starts: Integers = np.flatnonzero(
            np.concatenate([columns[STARTS] for columns in read])
        )

    def blocks(self, size: int) -> list[RowBlock]:
        """Return all rows in blocks of about `size` rows, none of which cuts a cell."""
        size = max(size, self.cell)
        found: list[RowBlock] = []
        parts: list[Block] = []
        begin = 0  # of the parts
        for piece, (first, stop) in zip(self.pieces, pairwise(self._offsets.tolist()), strict=True):
            start = first
            while start < stop:
                end = min(start + size, stop)
                if end < stop:
                    end = int(self.cells(np.array([end]))[0])
                if parts and end - begin > size:
                    found.append(RowBlock(tuple(parts), begin))
                    parts, begin = [], start
                parts.append(self._block(piece, start - first, end - first))
                start = end
        return [*found, RowBlock(tuple(parts), begin)] if parts else found

    def read(self, blocks: list[RowBlock]) -> Iterator[ReadRows]:
        """Yield the rows of each block that are served, [n, D] float32, and their places in it.

        A thread reads ahead of the caller.
        """
        return prefetch(self._read(blocks), AHEAD, name="rows", does="reads rows")

    def _read(self, blocks: list[RowBlock]) -> Generator[ReadRows, None, None]:
        reader = BlockReader(self.shards, open_files=1)
        kind = self.shards.storage.torch_dtype
        try:
            for item in blocks:
                rows = torch.empty(item.kept, self.shards.d_in, dtype=kind)
                counts = [part.kept for part in item.parts]
                for part, own in zip(item.parts, torch.split(rows, counts), strict=True):
                    reader.read(part, own)
                yield item, rows.float(), self.places(item)
        finally:
            reader.close()

    def places(self, item: RowBlock) -> Integers:
        """Return the places in a block of the rows that are served."""
        found, first = [], 0
        for part in item.parts:
            dropped = self.shards.dropped[part.shard]
            low, high = np.searchsorted(dropped, (part.start, part.stop))
            count = part.stop - part.start
            found.append(first + np.delete(np.arange(count), dropped[low:high] - part.start))
            first += count
        return np.concatenate(found)

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

    def _block(self, piece: Piece, first: int, stop: int) -> Block:
        low, high = piece.start + first, piece.start + stop
        dropped = self.shards.dropped[piece.shard]
        lost = int(np.searchsorted(dropped, high) - np.searchsorted(dropped, low))
        return Block(piece.shard, low, high, high - low - lost)

    def _warn_of_gaps(self, read: Sequence[Mapping[str, Array]]) -> None:
        """Warn of columns that some pieces have and others lack: they are taken from none."""
        for name in (TOKENS, DOCUMENT, POSITION):
            lacking = [
                piece for piece, own in zip(self.pieces, read, strict=True) if name not in own
            ]
            if 0 < len(lacking) < len(read):
                path = self.shards.shards[lacking[0].shard].path
                text = "%s: no %s, which other shards have: it is left out"
                logger.warning(text, path, name)

    def _read_columns(self, number: int, pieces: list[Piece]) -> Iterator[dict[str, Array]]:
        """Yield for pieces of a shard the numbers beside their rows, and which rows begin one.

        The columns are the ones that the shard has, and STARTS: which rows begin a sequence.
        """
        shard, dropped = self.shards.shards[number], self.shards.dropped[number]
        is_told = False
        with open_shard(shard) as file:
            names = [name for name in (TOKENS, DOCUMENT, POSITION) if file.has(name)]
            for group in _near(pieces):
                begin = group[0].start // shard.tokens * shard.tokens  # of an entry of a 3-D one
                stop = group[-1].stop
                columns = {name: file.read_column(name, begin, stop) for name in names}
                for name, numbers in columns.items():
                    try:
                        require_whole(name, numbers)
                    except ValueError as error:
                        raise ShardError(f"{shard.path}: {error}") from None
                begins = np.zeros(stop - begin, bool)
                try:
                    sequences = (columns.get(name) for name in (DOCUMENT, POSITION))
                    begins[sequence_starts(len(begins), shard.tokens, *sequences)] = True
                except ValueError as error:
                    if not is_told:
                        text = "%s: %s: all its rows are taken as one sequence"
                        logger.warning(text, shard.path, error)
                    is_told = True
                for ends in (dropped, dropped + 1):
                    begins[ends[(ends >= begin) & (ends < stop)] - begin] = True
                for piece in group:
                    begins[piece.start - begin] = True
                    own = slice(piece.start - begin, piece.stop - begin)
                    yield {name: part[own] for name, part in {**columns, STARTS: begins}.items()}


def shard_offsets(shards: ShardSet) -> Integers:
    """Return how many rows are in front of each shard, and in all of them, [n + 1]."""
    offsets: Integers = np.cumsum([0, *(shard.rows for shard in shards.shards)])
    return offsets


def pieces_around(
    offsets: Integers,  # [n_shards + 1], see `shard_offsets`
    rows: Integers,  # [n], numbers over all rows of all shards
    before: int,
    length: int,
) -> list[Piece]:
    """Return the pieces of shards that hold rows and their neighbours, in ascending order.

    Args:
        offsets: how many rows are in front of each shard, and in all of them.
        rows: the rows.
        before: neighbours in front of each row.
        length: rows that each row and its neighbours are, fewer at the ends of a shard.
    """
    if not rows.size:
        return []
    rows = np.unique(rows)
    shard = np.searchsorted(offsets, rows, side="right") - 1
    begins = np.maximum(rows - before, offsets[shard])
    ends = np.minimum(rows - before + length, offsets[shard + 1])
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (begins[1:] > ends[:-1]) | (shard[1:] != shard[:-1])
    firsts = np.flatnonzero(is_first)
    lasts = np.append(firsts[1:], len(rows)) - 1
    number, start = shard[firsts], offsets[shard[firsts]]
    parts = number, begins[firsts] - start, ends[lasts] - start
    return [Piece(*values) for values in zip(*(part.tolist() for part in parts), strict=True)]


def rows_of(
    pieces: Sequence[Piece],
    offsets: Integers,  # [n_shards + 1], see `shard_offsets`
) -> Integers:
    """Return the numbers of the rows of pieces over all rows of all shards, piece after piece."""
    parts = [np.arange(piece.start, piece.stop) + offsets[piece.shard] for piece in pieces]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _first_rows(pieces: Sequence[Piece], count: int | None) -> list[Piece]:
    """Return pieces up to a number of rows; None: all of them."""
    if count is None:
        return list(pieces)
    found = []
    for piece in pieces:
        stop = min(piece.stop, piece.start + count)
        if stop > piece.start:
            found.append(replace(piece, stop=stop))
        count -= piece.rows
        if count <= 0:
            break
    return found


def _near(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces of one shard in groups that are read at once: gaps in them are short."""
    group: list[Piece] = []
    for piece in pieces:
        if group and piece.start - group[-1].stop > _GAP:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
