"""The text round rows that a training has served, read again from shards or from a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sae_fast.activations import ActivationStream, Source, TensorStream, open_shards, write_shard
from sae_fast.evaluation.text_rows import (
    DOCUMENT,
    POSITION,
    TOKENS,
    Integers,
    Piece,
    TextRows,
    rows_of,
    shard_offsets,
)

_LOOKED_AT = 1 << 14  # rows whose tokens a tokenizer is checked with


class BatchTexts(Protocol):
    """The place that the rows of batches are from.

    Attributes:
        offsets: how many rows are in front of each shard, and in all of them, [n_shards + 1].
    """

    offsets: Integers

    def largest_token(self) -> int | None:
        """Return the largest token of some rows; None: no tokens are known."""

    def batch_rows(self, first: int) -> Integers:
        """Return the number of each row of the batch in front of which so many were served."""

    def text(self, pieces: Sequence[Piece], cell: int, place: Path) -> TextRows:
        """Return pieces as running text; `place` is a folder for files that it needs."""


class ShardTexts:
    """The text in the shards of a stream."""

    def __init__(self, stream: ActivationStream) -> None:
        self.offsets = shard_offsets(stream.shards)
        self._stream = stream

    def largest_token(self) -> int | None:
        """Return the largest token of the first rows; None: the shards hold no tokens."""
        tokens = TextRows(self._stream.shards, 1, _LOOKED_AT).columns.get(TOKENS)
        return None if tokens is None else int(tokens.max())

    def batch_rows(self, first: int) -> Integers:
        """Return the number of each row of the batch in front of which so many were served."""
        shards, rows = self._stream.batch_rows(first)
        numbers: Integers = self.offsets[shards] + rows
        return numbers

    def text(self, pieces: Sequence[Piece], cell: int, place: Path) -> TextRows:
        """Return pieces as running text."""
        return TextRows(self._stream.shards, cell, pieces=pieces)


class TensorTexts:
    """The text in a tensor: tokens, documents and positions where they are columns beside it."""

    def __init__(self, stream: TensorStream) -> None:
        self.offsets = np.array([0, len(stream.stored.x)])
        self._stream = stream

    def largest_token(self) -> int | None:
        """Return the largest token; None: there is no column of tokens."""
        tokens = self._stream.stored.columns.get(TOKENS)
        return None if tokens is None else int(tokens.max())

    def batch_rows(self, first: int) -> Integers:
        """Return the number of each row of the batch in front of which so many were served."""
        return self._stream.batch_rows(first)

    def text(self, pieces: Sequence[Piece], cell: int, place: Path) -> TextRows:
        """Return pieces as running text, out of a shard that is written to `place`."""
        x, columns = self._stream.stored
        rows = torch.from_numpy(rows_of(pieces, self.offsets)).to(x.device)
        names = [name for name in (TOKENS, DOCUMENT, POSITION) if name in columns]
        beside: dict[str, Any] = {name: columns[name][rows].cpu() for name in names}
        if not {DOCUMENT, POSITION} & beside.keys():  # then what follows each other is one sequence
            beside[POSITION] = rows.cpu()
        path = place / "rows.h5"
        write_shard(path, x[rows].cpu(), **beside)
        ends = np.cumsum([piece.rows for piece in pieces]).tolist()
        own = [Piece(0, end - piece.rows, end) for piece, end in zip(pieces, ends, strict=True)]
        return TextRows(open_shards([path], verify=False), cell, pieces=own)


def texts_of(source: Source) -> BatchTexts:
    """Return where the rows of a source's batches are from.

    Raises ValueError where they cannot be read again.
    """
    if isinstance(source, ActivationStream):
        return ShardTexts(source)
    if isinstance(source, TensorStream):
        return TensorTexts(source)
    raise ValueError(
        "live pages need shards, or a tensor: rows of a model, an iterator or another source "
        "cannot be read again"
    )
