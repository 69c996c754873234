"""Parquet files, as a hub keeps datasets: the same columns as in arrow_files.py.

A file is decoded one row group at a time, and the last one of each column is kept: pieces of it are
asked for one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from sae_fast.activations.imports.arrays import LARGEST_COMPRESSION, Arrays, LazyArrays, SourceArray
from sae_fast.activations.imports.arrow_files import column_array, import_pyarrow


@contextmanager
def open_parquet(path: Path) -> Iterator[Arrays]:
    """The columns of a .parquet file that hold numbers, or lists of them."""
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
        """The first entry, without decoding the rest of its group."""
        batches = self._file.iter_batches(batch_size=1, columns=[self._name])
        empty = self._file.schema_arrow.empty_table().column(self._name).combine_chunks()
        return next((batch.column(self._name) for batch in batches), empty)

    def stored_bytes(self) -> int:
        """The bytes that the column takes in the file, as many as these may stand for."""
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
        """The entries start..stop in parts that lie in memory as one."""
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
