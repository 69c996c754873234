"""Arrow files as `datasets` saves them, and so SAELens its cached activations.

A column is named by its hook and has an entry for each sequence, a list of rows (Array2D of context
and d_in); `token_ids` beside it has a list of numbers. Read with pyarrow, from memory maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.errors import ShardError
from sae_fast.activations.imports.arrays import Arrays, LazyArrays, SourceArray


@contextmanager
def open_arrow(path: Path) -> Iterator[Arrays]:
    """The columns of an .arrow file that hold numbers, or lists of them."""
    pyarrow = import_pyarrow(path)
    with pyarrow.memory_map(str(path)) as source:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:  # the other of Arrow's two formats, with an index at its end
            table = pyarrow.ipc.open_file(source).read_all()
        yield LazyArrays(table.column_names, lambda name: _array_of(path, name, table.column(name)))


def import_pyarrow(path: Path) -> Any:
    """The library, which this file needs; raises ShardError that says how to get it."""
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
    """A column of lists as an array, of the shape of its first entry.

    Args:
        path: of the file.
        name: of the column.
        entries: of it.
        first: an array of the first of them, or of none.
        chunks: gives arrays of the entries start..stop.
        stored: bytes of the file that hold it.
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
    """The entries of a chunk [n, *inner]; raises where one is missing or has another shape."""
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
    found: np.ndarray[Any, Any] = values.to_numpy(zero_copy_only=False)
    return found.reshape(entries, *inner)


def _storage(values: Any) -> Any:
    """Plain lists, whether or not `datasets` has made its types known to pyarrow."""
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
