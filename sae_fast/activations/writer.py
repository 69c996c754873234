"""Shards being written: rows are appended as a model gives them; the file appears when whole."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.compression import dataset_options
from sae_fast.activations.row_digest import RowDigest
from sae_fast.activations.shard import DEFAULT_KEY, FORMAT_NAME, FORMAT_VERSION, ROW_DIGEST
from sae_fast.activations.storage import (
    BFLOAT16,
    STORAGES,
    Array,
    as_numpy,
    nonfinite_rows,
    storage_of,
)
from sae_fast.atomic_files import replacing, reserve
from sae_fast.memory import require_memory

if TYPE_CHECKING:
    import h5py

CHUNK_BYTES = 4 << 20
MAX_CHUNK_ROWS = 4096
# Beside the rows: HDF5's index of chunks, attributes, and the chunk caches of columns.
BESIDE_BYTES = 8 << 20
PER_ROW = ("token_ids", "doc_id", "position")  # optional int32 datasets beside the activations


def chunk_rows_of(row_bytes: int) -> int:
    """Return the rows that are stored together by default."""
    return min(MAX_CHUNK_ROWS, max(1, CHUNK_BYTES // row_bytes))


def padded_rows(rows: int, row_bytes: int) -> int:
    """Return the rows for which a shard has room: all its chunks are of one size."""
    chunk_rows = max(1, min(rows, chunk_rows_of(row_bytes)))
    return -(-rows // chunk_rows) * chunk_rows


@dataclass(frozen=True)
class ShardMetadata:
    """Origin of the activations of a shard; what is None is not written."""

    model: str | None = None
    revision: str | None = None
    hook: str | None = None
    layer: int | None = None
    tokenizer: str | None = None
    dataset: str | None = None
    special_tokens: str | None = None  # the rule by which [CLS], BOS, … were kept or dropped
    extra: Mapping[str, str | int | float] = field(default_factory=dict)

    def attributes(self) -> dict[str, str | int | float]:
        """Return all attributes as they are written."""
        named = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "extra"
        }
        return {**self.extra, **{k: v for k, v in named.items() if v is not None}}


class ShardWriter:
    """Collects rows into `path`; used with `with`, and nothing is left of it if the block fails.

    `dtype` is "float16", "bfloat16" or "float32". `compression` is "gzip", or with the extra
    `compression` "zstd" or "blosc2". MiniLM's activations take 86 % of their bytes with zstd in
    float16, 69 % in bfloat16 (gzip: 87 and 72 %); they are read at a quarter of the speed of "none"
    from memory, twice the speed of gzip, and written at 80 %, gzip at 20 %
    (benchmarks/results/compression.md).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "float16",
        metadata: ShardMetadata | None = None,
        chunk_rows: int | None = None,
        compression: str | None = None,
    ) -> None:
        if dtype not in STORAGES:
            raise ValueError(f"dtype must be one of {', '.join(STORAGES)}, got {dtype!r}")
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        self.path = Path(path)
        self.rows = 0
        self._storage = STORAGES[dtype]
        self._metadata = metadata or ShardMetadata()
        self._chunk_rows = chunk_rows
        self._filters = dataset_options(compression)
        self._digest = hashlib.sha256()
        self._row_digest: RowDigest | None = None  # once the width of a row is known
        self._pending: dict[str, list[Array]] = {}
        self._pending_rows = 0
        self._d_in = 0
        self._stack = ExitStack()
        self._file: h5py.File | None = None

    def __enter__(self) -> ShardWriter:
        import h5py

        with ExitStack() as stack:  # what fails below takes the temporary file with it
            self._temporary = stack.enter_context(replacing(self.path))
            # HDF5 2.0 crashes at exit if a write has failed, so space is set aside before each.
            reserve(self._temporary, 0, BESIDE_BYTES)
            require_memory()
            self._file = h5py.File(self._temporary, "w")
            self._stack = stack.pop_all()
        self._reserved = 0
        return self

    def append(
        self,
        activations: Tensor | Array,  # [n, D]
        *,
        labels: Mapping[str, Any] | None = None,
        **per_row: Any,
    ) -> None:
        """Add rows [n, D]; `token_ids`, `doc_id`, `position` [n] and `labels` [n, …] go with them.

        Raises ValueError for a row that is not finite once it is in the stored type: float16 ends
        at 65,504, and a few models have larger activations.
        """
        if self._file is None:
            raise ValueError("ShardWriter must be entered with `with` before rows are added")
        rows = self._stored(activations)
        columns = {DEFAULT_KEY: rows}
        for name, column in per_row.items():
            if name not in PER_ROW:
                raise ValueError(f"{name} is no per-row dataset, expected one of {PER_ROW}")
            columns[name] = np.asarray(column, np.int32)
        for name, column in (labels or {}).items():
            columns[f"labels/{name}"] = np.asarray(column)
        if self.rows and set(columns) != set(self._pending):
            raise ValueError(f"datasets {sorted(columns)} differ from {sorted(self._pending)}")
        for name, column in columns.items():
            if len(column) != len(rows):
                raise ValueError(f"{name} has {len(column)} rows, activations {len(rows)}")
        for name, column in columns.items():
            self._pending.setdefault(name, []).append(column)
        self._digest.update(rows.data)
        if len(rows):
            self._note_rows(rows)
        self.rows += len(rows)
        self._pending_rows += len(rows)
        self._flush(whole_chunks=True)

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        with self._stack.pop_all() as stack:
            stack.push(self._close_file)
            if kind is not None:
                # Handing the error on makes `replacing` remove the temporary file.
                stack.__exit__(kind, error, trace)
                return
            if self.rows == 0:
                raise ValueError(f"{self.path}: a shard needs at least one row")
            self._flush(whole_chunks=False)
            self._write_attributes()
            self._close_file()
            self._trim()

    def _close_file(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _trim(self) -> None:
        """Release space that was reserved and not used: HDF5 does it to a file that is too long."""
        import h5py

        h5py.File(self._temporary, "r+").close()

    def _stored(self, activations: Tensor | Array) -> Array:
        """Convert rows to the stored type, and check them."""
        source = torch.as_tensor(activations).detach()
        if source.ndim != 2 or source.shape[1] == 0:
            raise ValueError(f"activations must be [n, D], got shape {tuple(source.shape)}")
        storage_of(source.dtype)
        if self._d_in not in (0, source.shape[1]):
            raise ValueError(f"activations have width {source.shape[1]}, before {self._d_in}")
        self._d_in = source.shape[1]
        rows = as_numpy(source.to("cpu", self._storage.torch_dtype).contiguous(), self._storage)
        bad = nonfinite_rows(rows, self._storage)
        if bad.size:
            raise ValueError(
                f"{self.path}: row {self.rows + int(bad[0])} is not finite in {self._storage.name}"
            )
        return rows

    def _note_rows(self, rows: Array) -> None:
        """Add rows to the digest that has no order, which is checked as they are first read."""
        if self._row_digest is None:
            self._row_digest = RowDigest(self._d_in * self._storage.itemsize)
        hashes = np.empty(len(rows), np.uint64)
        self._row_digest.hash(rows, hashes)
        self._row_digest.add(self.rows, hashes)

    def _flush(self, *, whole_chunks: bool) -> None:
        """Write pending rows; before the end only whole chunks, so that each is written once."""
        chunk_rows = self._chunk_rows or chunk_rows_of(self._d_in * self._storage.itemsize)
        count = self._pending_rows
        if whole_chunks:
            count -= count % chunk_rows
        if count == 0:
            return
        self._reserve(count)
        require_memory()
        for name, parts in self._pending.items():
            column = np.concatenate(parts)
            # A shard shorter than one chunk gets a chunk of its own size, not one padded on disk.
            self._extend(name, column[:count], min(chunk_rows, self.rows))
            self._pending[name] = [column[count:]]
        self._pending_rows -= count

    def _reserve(self, count: int) -> None:
        """Reserve space for the next `count` rows, as large as they are without compression."""
        assert self._file is not None
        firsts = [parts[0] for parts in self._pending.values()]
        row_bytes = sum(first.itemsize * math.prod(first.shape[1:]) for first in firsts)
        needed = self._file.id.get_filesize() + count * row_bytes + BESIDE_BYTES
        reserve(self._temporary, self._reserved, needed)
        self._reserved = max(self._reserved, needed)

    def _extend(self, name: str, rows: Array, chunk_rows: int) -> None:
        assert self._file is not None
        if name not in self._file:
            self._file.create_dataset(
                name,
                shape=(0, *rows.shape[1:]),
                maxshape=(None, *rows.shape[1:]),
                chunks=(chunk_rows, *rows.shape[1:]),
                dtype=rows.dtype,
                **self._filters,
            )
        dataset = self._file[name]
        before = len(dataset)
        dataset.resize(before + len(rows), axis=0)
        dataset[before:] = rows

    def _write_attributes(self) -> None:
        assert self._file is not None
        own = {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "d_in": self._d_in,
            "dtype": self._storage.name,
            "rows": self.rows,
            "checksum": f"sha256:{self._digest.hexdigest()}",
        }
        if self._row_digest is not None:
            own[ROW_DIGEST] = self._row_digest.text()
        for name, value in {**self._metadata.attributes(), **own}.items():
            self._file.attrs[name] = value
        if self._storage is BFLOAT16:
            self._file[DEFAULT_KEY].attrs["dtype"] = BFLOAT16.name


def write_shard(
    path: str | Path,
    activations: Tensor | Array,  # [n, D]
    *,
    dtype: str | None = None,
    metadata: ShardMetadata | None = None,
    chunk_rows: int | None = None,
    compression: str | None = None,
    labels: Mapping[str, Any] | None = None,
    **per_row: Any,
) -> None:
    """Write one shard from rows already in memory; `dtype` defaults to theirs."""
    if dtype is None:
        dtype = storage_of(torch.as_tensor(activations).dtype).name
    with ShardWriter(
        path, dtype=dtype, metadata=metadata, chunk_rows=chunk_rows, compression=compression
    ) as writer:
        writer.append(activations, labels=labels, **per_row)
