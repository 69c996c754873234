"""Arrow files, as `datasets` writes them and with it SAELens, and Parquet files, as on a hub.

A column is named by its hook and has an entry for each sequence, a list of rows (Array2D of context
and d_in); `token_ids` beside it has a list of numbers. Arrow files are read with pyarrow, from
memory maps. A Parquet file is decoded one row group at a time, and the last row group of each
column is kept, because pieces of it are asked for one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.errors import ShardError
from sae_fast.activations.imports.arrays import LARGEST_COMPRESSION, Arrays, LazyArrays, SourceArray


@contextmanager
def open_arrow(path: Path) -> Iterator[Arrays]:
    """Open the columns of an .arrow file that hold numbers, or lists of them."""
    pyarrow = import_pyarrow(path)
    with pyarrow.memory_map(str(path)) as source:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:  # the other of Arrow's two formats, with an index at its end
            table = pyarrow.ipc.open_file(source).read_all()
        yield LazyArrays(table.column_names, lambda name: _array_of(path, name, table.column(name)))


def import_pyarrow(path: Path) -> Any:
    """Import pyarrow for this file; raise ShardError that says how to get it."""
    try:
        import pyarrow
    except ImportError:
        raise ShardError(f"{path}: needs pyarrow: pip install 'sae_fast[capture]'") from None
    return pyarrow


def _array_of(path: Path, name: str, column: Any) -> SourceArray:
    first = column.slice(0, 1).combine_chunks()
    return column_array(
        path,
        name,
        len(column),
        first,
        lambda start, stop: column.slice(start, stop - start).chunks,
        column.get_total_buffer_size(),
    )


def column_array(
    path: Path,
    name: str,
    entries: int,
    first: Any,
    chunks: Callable[[int, int], Iterable[Any]],
    stored: int,
) -> SourceArray:
    """Return a column of lists as an array, of the shape of its first entry.

    Args:
        path: path of the file.
        name: name of the column.
        entries: number of its entries.
        first: an array of the first entry, or of none.
        chunks: reads arrays of the entries start..stop.
        stored: bytes of the file that hold the column.
    """
    first.validate(full=True)  # places beyond the end of a damaged file would be read
    shape, values = [entries], _storage(first)
    while hasattr(values, "flatten") and _is_list(values):
        shape.append(len(values.slice(0, 1).flatten()) if len(values) else 0)
        values = values.flatten()

    def read(start: int, stop: int) -> Tensor:
        parts = [_numbers(path, name, _storage(chunk), shape[1:]) for chunk in chunks(start, stop)]
        return torch.from_numpy(np.concatenate(parts))

    try:
        dtype = torch.from_numpy(np.empty(0, values.type.to_pandas_dtype())).dtype
    except (TypeError, NotImplementedError):
        dtype = None
    return SourceArray(tuple(shape), dtype, read, stored)


def _numbers(path: Path, name: str, values: Any, inner: list[int]) -> np.ndarray[Any, Any]:
    """Return the entries of a chunk [n, *inner]; raise ShardError if one is missing or differs."""
    import pyarrow.compute

    values.validate(full=True)
    entries = len(values)
    for length in inner:
        lengths = pyarrow.compute.list_value_length(values)
        if lengths.null_count or not pyarrow.compute.all(
            pyarrow.compute.equal(lengths, length), min_count=0
        ):
            raise ShardError(f"{path}: entries of {name!r} differ in length, or some are missing")
        values = values.flatten()
    if values.null_count:
        raise ShardError(f"{path}: {values.null_count} numbers of {name!r} are missing")
    numbers: np.ndarray[Any, Any] = values.to_numpy(zero_copy_only=False)
    return numbers.reshape(entries, *inner)


def _storage(values: Any) -> Any:
    """Return plain lists, whether or not `datasets` has told its types to pyarrow."""
    if hasattr(values, "num_chunks"):  # combine_chunks leaves an empty column chunked
        values = values.chunk(0) if values.num_chunks else values.combine_chunks()
    return getattr(values, "storage", values)


def _is_list(values: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_list(values.type)
        or types.is_large_list(values.type)
        or types.is_fixed_size_list(values.type)
    )


@contextmanager
def open_parquet(path: Path) -> Iterator[Arrays]:
    """Open the columns of a .parquet file that hold numbers, or lists of them."""
    import_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, memory_map=True) as file:

        def look(name: str) -> SourceArray:
            column = _Column(file, name)
            return column_array(
                path, name, len(column), column.first(), column.chunks, column.stored_bytes()
            )

        yield LazyArrays(file.schema_arrow.names, look)


class _Column:
    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        metadata = file.metadata
        groups = (metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
        self._ends: list[int] = [0, *accumulate(groups)]
        self._group, self._decoded = -1, None

    def __len__(self) -> int:
        return self._ends[-1]

    def first(self) -> Any:
        """Return the first entry, without decoding the rest of its group."""
        batches = self._file.iter_batches(batch_size=1, columns=[self._name])
        empty = self._file.schema_arrow.empty_table().column(self._name).combine_chunks()
        return next((batch.column(self._name) for batch in batches), empty)

    def stored_bytes(self) -> int:
        """Return the bytes that the column takes in the file, at most what it can stand for."""
        metadata = self._file.metadata
        chunks = (
            metadata.row_group(group).column(place)
            for group in range(metadata.num_row_groups)
            for place in range(metadata.num_columns)
        )
        sizes = (
            max(0, int(chunk.total_compressed_size))
            for chunk in chunks
            if f"{chunk.path_in_schema}.".startswith(f"{self._name}.")
        )
        return LARGEST_COMPRESSION * sum(sizes)

    def chunks(self, start: int, stop: int) -> Iterator[Any]:
        """Yield the entries start..stop in parts that are contiguous in memory."""
        for group, (begin, end) in enumerate(zip(self._ends, self._ends[1:], strict=False)):
            if begin < stop and end > start:
                first = max(start, begin)
                part = self._of_group(group).slice(first - begin, min(stop, end) - first)
                yield from part.chunks

    def _of_group(self, group: int) -> Any:
        if group != self._group:
            self._decoded = None  # before the next one takes as much memory
            table = self._file.read_row_group(group, columns=[self._name])
            self._group, self._decoded = group, table.column(self._name)
        return self._decoded
