"""The text round rows that a training has served, read again from where the rows are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations import ActivationStream, Source, TensorStream, open_shards, write_shard
from sae_fast.activations.shared import SharedReader
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
from sae_fast.training.from_model.model_stream import ModelStream

_LOOKED_AT = 1 << 14  # rows whose tokens a tokenizer is checked with


class BatchTexts(Protocol):
    """The place that the rows of batches are from."""

    @property
    def offsets(self) -> Integers:
        """Numbers of the first row of each shard, and the one after the last row, [shards + 1]."""

    def largest_token(self) -> int | None:
        """Return the largest token of some rows; None: no tokens are known."""

    def batch_rows(self, first: int) -> Integers:
        """Return the number of each row of the batch in front of which so many were served."""

    def text(self, pieces: Sequence[Piece], cell: int, place: Path) -> TextRows:
        """Return pieces as running text; `place` is a folder for files that it needs."""


class ShardTexts:
    """The text in the shards of a stream."""

    def __init__(self, stream: ActivationStream) -> None:
        self._offsets = shard_offsets(stream.shards)
        self._stream = stream

    @property
    def offsets(self) -> Integers:
        """Numbers of the first row of each shard, and the one after the last row, [shards + 1]."""
        return self._offsets

    def largest_token(self) -> int | None:
        """Return the largest token of the first rows; None: the shards hold no tokens."""
        tokens = TextRows(self._stream.shards, 1, _LOOKED_AT).columns.get(TOKENS)
        return None if tokens is None else int(tokens.max())

    def batch_rows(self, first: int) -> Integers:
        """Return the number of each row of the batch in front of which so many were served."""
        shards, rows = self._stream.batch_rows(first)
        numbers: Integers = self._offsets[shards] + rows
        return numbers

    def text(self, pieces: Sequence[Piece], cell: int, place: Path) -> TextRows:
        """Return pieces as running text."""
        return TextRows(self._stream.shards, cell, pieces=pieces)


class TensorTexts:
    """The text in a tensor: tokens, documents and positions where they are columns beside it."""

    def __init__(self, stream: TensorStream) -> None:
        self._stream = stream

    @property
    def offsets(self) -> Integers:
        """The number of the first row, and the one after the last row."""
        return np.array([0, len(self._stream.stored.x)])

    def largest_token(self) -> int | None:
        """Return the largest token; None: there is no column of tokens."""
        tokens = self._stream.stored.columns.get(TOKENS)
        return None if tokens is None else int(tokens.max())

    def batch_rows(self, first: int) -> Integers:
        """Return the number of each row of the batch in front of which so many were served."""
        return self._stream.batch_rows(first)

    def text(self, pieces: Sequence[Piece], cell: int, place: Path) -> TextRows:
        """Return pieces as running text."""
        x, columns = self._stream.stored
        rows = torch.from_numpy(rows_of(pieces, self.offsets))
        names = [name for name in (TOKENS, DOCUMENT, POSITION) if name in columns]
        beside = {name: columns[name][rows.to(x.device)] for name in names}
        if not {DOCUMENT, POSITION} & beside.keys():  # then what follows each other is one sequence
            beside[POSITION] = rows
        return _written(x[rows.to(x.device)], beside, pieces, cell, place)


class ModelTexts:
    """The text in the window of a stream from a model; rows of windows before are gone.

    Args:
        stream: the stream.
        hook: name of the hook point.
    """

    def __init__(self, stream: ModelStream, hook: str) -> None:
        self._stream, self._hook = stream, hook

    @property
    def offsets(self) -> Integers:
        """The number of the first row of the window, and the one after its last row."""
        first = self._stream.first
        return np.array([first, first + self._stream.window.rows])

    def largest_token(self) -> int | None:
        """Return 0: which tokens there will be is not known before the model reads them."""
        return 0

    def batch_rows(self, first: int) -> Integers:
        """Return the number of each row of the batch in front of which so many were served."""
        return self._stream.batch_rows(first)

    def text(self, pieces: Sequence[Piece], cell: int, place: Path) -> TextRows:
        """Return pieces as running text."""
        window = self._stream.window
        rows = torch.from_numpy(rows_of(pieces, self.offsets - self._stream.first))
        beside = {name: column[rows] for name, column in window.text().items()}
        return _written(window.rows_of(self._hook, rows), beside, pieces, cell, place)


def _written(
    x: Tensor,  # [n, D]
    columns: dict[str, Any],  # each [n]
    pieces: Sequence[Piece],  # of n rows together
    cell: int,
    place: Path,
) -> TextRows:
    """Write the rows of pieces into a shard, and return them as running text."""
    path = place / "rows.h5"
    write_shard(path, x.cpu(), **{name: column.cpu() for name, column in columns.items()})
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
    if isinstance(source, SharedReader) and isinstance(source.source, ModelStream):
        return ModelTexts(source.source, str(source.origin["hook"]))
    raise ValueError(
        "live pages need shards, a tensor, or a model that is read for this training: other rows, "
        "or sequences for loss_fn ce and kl, are not kept after their step"
    )
