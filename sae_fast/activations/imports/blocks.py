"""The rows of a source as they are stored: in pieces, without padding, in the stored type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.errors import ShardError
from sae_fast.activations.imports.arrays import Arrays, opened
from sae_fast.activations.imports.formats import opener_of
from sae_fast.activations.imports.plan import EntrySpan
from sae_fast.activations.imports.saved_activations import SavedActivations, SourceFile
from sae_fast.activations.storage import Array, Storage, as_numpy, nonfinite_rows

BLOCK_BYTES = 16 << 20  # of rows as they are in the source; a longer sequence is read whole
INT32 = np.iinfo(np.int32)
# By how much all numbers of a row may be below the smallest normal one of the stored type: float16
# then still keeps 6 bits of the largest, an error of 0.8 %.
BELOW_NORMAL = 16


@dataclass(frozen=True)
class SourceBlock:
    """Consecutive rows.

    Attributes:
        rows: [n, D] in the stored type.
        source: [n, D], the rows before they were converted.
        columns: int32 [n] by name.
        padding: rows that a mask left out.
        nonfinite: rows left out because they hold NaN or Inf.
    """

    rows: Tensor
    source: Tensor
    columns: dict[str, Any]
    padding: int
    nonfinite: int

    @property
    def source_rows(self) -> int:
        """Rows that were read, those left out among them."""
        return len(self.rows) + self.padding + self.nonfinite


def read_blocks(
    source: SavedActivations, spans: Sequence[EntrySpan], storage: Storage, skip_nonfinite: bool
) -> Iterator[SourceBlock]:
    """Yield the rows of some spans in order.

    Raises ShardError, naming file and row, for a number that is not finite unless such rows are
    skipped, for one beyond the stored type's range, and for a row that is too small for it.
    """
    for span in spans:
        file = source.files[span.file]
        entry_bytes = span.entry_rows * source.d_in * file.arrays[span.array].dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, entry_bytes))
        with ExitStack() as stack:
            arrays = stack.enter_context(opened(file.path, opener_of(file.path)))
            for start in range(span.start, span.stop, step):
                stop = min(start + step, span.stop)
                piece = _Piece(source, file, span, start, stop)
                yield piece.block(arrays, storage, skip_nonfinite)


@dataclass(frozen=True)
class _Piece:
    """Entries start..stop of a span."""

    source: SavedActivations
    file: SourceFile
    span: EntrySpan
    start: int
    stop: int

    def block(self, arrays: Arrays, storage: Storage, skip_nonfinite: bool) -> SourceBlock:
        """Read the entries, drop padding and convert rows to the stored type."""
        rows = self._read(arrays, self.source.key).reshape(-1, self.source.d_in)
        keep = self._mask(arrays, len(rows))
        stored = rows.to(storage.torch_dtype)
        bad = nonfinite_rows(as_numpy(stored, storage), storage)
        bad = bad[keep[bad]]
        if bad.size:
            self._refuse(rows, bad, storage, skip_nonfinite)
        self._check_small(rows, stored, keep, storage)
        good = keep.copy()
        good[bad] = False
        columns = {name: column[good] for name, column in self._columns(arrays, keep).items()}
        if not good.all():
            chosen = torch.from_numpy(good)
            rows, stored = rows[chosen], stored[chosen]
        return SourceBlock(stored, rows, columns, int((~keep).sum()), len(bad))

    def _read(self, arrays: Arrays, name: str) -> Tensor:
        there = arrays.get(name, [])
        if len(there) <= self.span.array or there[self.span.array].shape[0] < self.stop:
            raise ShardError(f"{self.file.path}: changed since it was looked at")
        return there[self.span.array].read(self.start, self.stop)

    def _mask(self, arrays: Arrays, rows: int) -> Array:
        """Return which rows are no padding [n] bool."""
        if self.file.mask is None:
            return np.ones(rows, bool)
        return self._read(arrays, self.file.mask).reshape(-1).ne(0).numpy()

    def _columns(self, arrays: Arrays, keep: Array) -> dict[str, Array]:
        """Return numbers beside the rows, int32 [n] each; by default counts of sequences."""
        entries, tokens = self.stop - self.start, self.span.entry_rows
        columns: dict[str, Array] = {}
        if self.file.arrays[self.span.array].tokens:
            number = self.span.first + self.start - self.span.start
            columns["doc_id"] = np.repeat(np.arange(number, number + entries), tokens)
            # Padding before a sequence does not count, a gap within it does.
            begin = keep.reshape(entries, tokens).argmax(axis=1)
            columns["position"] = (np.arange(tokens) - begin[:, None]).reshape(-1)
        for column, name in self.file.columns:
            numbers = self._read(arrays, name).numpy()
            if numbers.size == entries < len(keep):  # one for a sequence
                numbers = np.repeat(numbers, tokens)
            columns[column] = numbers.reshape(-1)
        for name, numbers in columns.items():
            if numbers.min() < INT32.min or numbers.max() > INT32.max:
                raise ShardError(f"{self.file.path}: {name} does not fit into 32 bits")
        return {name: numbers.astype(np.int32) for name, numbers in columns.items()}

    def _refuse(self, rows: Tensor, bad: Array, storage: Storage, skip_nonfinite: bool) -> None:
        """Raise for the first row that may not be left out."""
        finite = torch.isfinite(rows[torch.from_numpy(bad)]).all(dim=1).numpy()
        if finite.any():
            row = int(bad[finite.argmax()])
            largest = rows[row].abs().max().item()
            raise ShardError(
                f"{self._place(row)} holds {largest:g}, beyond the range of {storage.name}; "
                "choose a larger type with --dtype"
            )
        if not skip_nonfinite:
            raise ShardError(
                f"{self._place(int(bad[0]))} holds NaN or Inf (--skip-nonfinite drops such rows)"
            )

    def _check_small(self, rows: Tensor, stored: Tensor, keep: Array, storage: Storage) -> None:
        """Raise for the first row whose numbers are all too small for the stored type."""
        if rows.dtype.itemsize <= stored.dtype.itemsize:
            return
        largest = rows.abs().amax(dim=1)
        # Below its smallest normal number a type keeps a bit less with every halving.
        lost = (largest > 0) & (largest < torch.finfo(stored.dtype).tiny / BELOW_NORMAL)
        places = np.flatnonzero(lost.numpy() & keep)
        if places.size:
            row = int(places[0])
            raise ShardError(
                f"{self._place(row)} holds {largest[row].item():g} at most, too small for "
                f"{storage.name}; choose another type with --dtype, or scale the activations"
            )

    def _place(self, row: int) -> str:
        entry, token = divmod(row, self.span.entry_rows)
        array = f"array {self.span.array}, " if len(self.file.arrays) > 1 else ""
        if not self.file.arrays[self.span.array].tokens:
            return f"{self.file.path}: {array}row {self.start + entry}"
        return f"{self.file.path}: {array}sequence {self.start + entry}, token {token}"
