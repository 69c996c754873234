"""One shard: an HDF5 file whose dataset of activations is (n, D) or (sequences, tokens, D).

Rows are numbered through the flattened array. Reads are of contiguous rows only, straight into the
caller's memory. Every failure is a `ShardError` of one line that begins with the file's path.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sae_fast.activations.chunks import direct_rows, walk_file
from sae_fast.activations.compression import require_filters
from sae_fast.activations.errors import ShardError, one_line, takes_too_much
from sae_fast.activations.files import require_regular
from sae_fast.activations.hdf5_heaps import require_sound_heaps, require_sound_texts
from sae_fast.activations.hdf5_layout import contents, find_item, require_written
from sae_fast.activations.storage import BFLOAT16, FLOAT16, FLOAT32, STORAGES, Array, Storage
from sae_fast.memory import require_memory

if TYPE_CHECKING:
    import h5py

DEFAULT_KEY = "activations"
FORMAT_NAME = "sae_fast.activations"
FORMAT_VERSION = 1
# A chunk is read once and whole, so a chunk cache only costs a copy: with HDF5's own 8 MiB an
# uncompressed shard of 3 MiB chunks reads at 2.6 M rows/s of 768 bytes, with 1 MiB at 4.5 M rows/s.
CHUNK_CACHE_BYTES = 1 << 20
READ_BYTES = 2 << 20  # a read is about this long where the chunks allow it
MAX_ATTRIBUTE = 1 << 20  # values of an attribute
ROW_DIGEST = "row_digest"  # attribute
SPLIT_BYTES = 32 << 20  # an uncompressed chunk longer than this is read in parts


FileState = tuple[int, ...]  # device, inode, bytes, times of the last write and change [ns]


@dataclass(frozen=True)
class Shard:
    """A shard as its metadata describe it, without its rows."""

    path: Path
    key: str
    rows: int
    d_in: int
    storage: Storage
    tokens: int  # rows of one entry of the first axis: 1 in a 2-D dataset
    chunk_rows: int  # rows that are stored together
    compressed: bool  # reading fewer rows than a chunk would cost as much
    file_bytes: int
    checksum: str | None  # "sha256:…" of the rows as stored, from the file's attributes
    metadata: dict[str, Any] = field(compare=False)
    # Changes whenever the file does; None if numbers lie in other files too.
    state: FileState | None = field(compare=False, default=None)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as stored."""
        return self.d_in * self.storage.itemsize

    def block_rows(self, limit: int | None = None) -> int:
        """Return how many rows to read at once: whole chunks of some READ_BYTES, up to `limit`.

        A single chunk is read whole even where it is longer than that.
        """
        wanted = max(1, READ_BYTES // self.row_bytes)
        if limit is not None:
            wanted = min(wanted, limit)
        return self.chunk_rows * max(1, wanted // self.chunk_rows)


class OpenShard(Protocol):
    """A shard held open for reading, whatever its format."""

    shard: Shard

    def read(self, start: int, stop: int, out: Array) -> None:
        """Read rows start..stop into `out` [stop - start, D] (C-contiguous, the stored type)."""

    def walk(self, note: Callable[[memoryview], object]) -> Iterator[tuple[int, Array]] | None:
        """Read the file once, whole; return None if it is not known where the rows lie."""

    def expect(self, start: int, stop: int) -> None:
        """Let the system fetch rows that will be read soon."""

    def read_column(self, name: str, start: int, stop: int) -> Array:
        """Return numbers [stop - start] of these rows from an array of one number a row."""

    def has(self, name: str) -> bool:
        """Return whether the file has anything of this name."""

    def contents(self) -> str:
        """Describe what the file holds by names and shapes, for errors."""

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> OpenShard: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class ShardFile:
    """A shard held open for reading."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._file = _open(shard.path)
        try:
            dataset = find_item(shard.path, self._file, shard.key)
            if dataset is None or math.prod(dataset.shape) != shard.rows * shard.d_in:
                raise ShardError(f"{shard.path}: changed since it was checked")
            require_filters(shard.path, dataset)
            self._dataset = dataset
            self._direct = direct_rows(self._file, dataset, shard.storage, shard.row_bytes)
        except ShardError:
            self.close()
            raise
        except MemoryError as error:
            self.close()
            raise takes_too_much(shard.path) from error
        except Exception as error:  # as in `_structure`
            self.close()
            raise ShardError(f"{shard.path}: changed since it was checked") from error

    def read(self, start: int, stop: int, out: Array) -> None:
        """Read rows start..stop into `out` [stop - start, D] (C-contiguous, the stored type)."""
        tokens = self.shard.tokens
        with self._explained(start, stop):
            if self._direct is not None:
                self._direct.read(start, stop, out)
                return
            position = start
            while position < stop:
                entry, first = divmod(position, tokens)
                if tokens == 1 or (first == 0 and stop - position >= tokens):
                    whole = (stop - position) // tokens
                    end = position + whole * tokens
                    source: Any = np.s_[entry : entry + whole]
                else:  # part of one entry of a 3-D dataset
                    last = min(tokens, first + stop - position)
                    end = position + last - first
                    source = np.s_[entry : entry + 1, first:last]
                self._read_selection(source, out[position - start : end - start])
                position = end

    def walk(self, note: Callable[[memoryview], object]) -> Iterator[tuple[int, Array]] | None:
        """Read the file once, whole: give `note` its bytes, and yield the rows with numbers.

        Rows come as they lie in the file. None is returned if it is not known where they lie.
        """
        if self._direct is None:
            return None
        return self._walk(note)

    def _walk(self, note: Callable[[memoryview], object]) -> Iterator[tuple[int, Array]]:
        like = np.empty((0, self.shard.d_in), self.shard.storage.numpy_dtype)
        assert self._direct is not None
        with self._explained(0, self.shard.rows):
            yield from walk_file(self._direct, self.shard.rows, like, note)

    def expect(self, start: int, stop: int) -> None:
        """Let the system fetch rows that will be read soon, if it is known where they lie."""
        if self._direct is not None:
            self._direct.expect(start, stop)

    def read_column(self, name: str, start: int, stop: int) -> Array:
        """Return numbers [stop - start] of these rows from a dataset of one number a row."""
        tokens = self.shard.tokens
        with self._explained(start, stop):
            dataset = self._column(name)
            if dataset.ndim == 1:
                return np.asarray(dataset[start:stop])
            entry = start // tokens
            numbers = np.asarray(dataset[entry : -(-stop // tokens)]).reshape(-1)
            return numbers[start - entry * tokens : stop - entry * tokens]

    def has(self, name: str) -> bool:
        """Return whether the file has anything of this name."""
        return find_item(self.shard.path, self._file, name) is not None

    def contents(self) -> str:
        """Describe its datasets by names and shapes, for errors."""
        return contents(self._file)

    def _column(self, name: str) -> h5py.Dataset:
        import h5py

        dataset = find_item(self.shard.path, self._file, name)
        if not isinstance(dataset, h5py.Dataset):
            raise ShardError(
                f"{self.shard.path}: no dataset {name!r}; it holds {contents(self._file)}"
            )
        rows = self._dataset.shape[:-1]
        if dataset.shape not in ((self.shard.rows,), rows):
            raise ShardError(
                f"{self.shard.path}: dataset {name!r} must have one number a row, "
                f"shape {rows}, got shape {dataset.shape}"
            )
        require_filters(self.shard.path, dataset)
        require_written(self.shard.path, dataset)
        return dataset

    @contextmanager
    def _explained(self, start: int, stop: int) -> Iterator[None]:
        """Name the rows in any error of HDF5 while it reads them."""
        try:
            yield
        except ShardError:
            raise
        except Exception as error:  # as in `_structure`
            raise ShardError(
                f"{self.shard.path}: rows {start} to {stop - 1} cannot be read: {one_line(error)}"
            ) from error

    def _read_selection(self, source: Any, out: Array) -> None:
        if self._dataset.ndim == 3:
            entries = source[0] if isinstance(source, tuple) else source
            out = out.reshape(entries.stop - entries.start, -1, self.shard.d_in)
        self._dataset.read_direct(out, source_sel=source)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def inspect_shard(path: Path, key: str = DEFAULT_KEY, option: str = "--activations-key") -> Shard:
    """Open a shard, check its structure and describe it; its rows are not read.

    `option` is the flag that names another key, for errors.
    """
    status = require_regular(path)
    if status.st_size:
        require_sound_heaps(path)
    with _structure(path) as file:
        dataset = _dataset(path, file, key, option)
        _require_sound_attributes(path, file, dataset)
        storage = _storage(path, key, dataset, file)
        rows, d_in = math.prod(dataset.shape[:-1]), int(dataset.shape[-1])
        if rows == 0 or d_in == 0:
            raise ShardError(f"{path}: dataset {key!r} is empty, shape {dataset.shape}")
        require_written(path, dataset)
        is_alone = dataset.file.filename == file.filename and not dataset.is_virtual
        metadata = {name: _attribute(path, file, name) for name in file.attrs}
        _check_attributes(path, metadata, rows, d_in if key == DEFAULT_KEY else None)
        tokens = int(dataset.shape[1]) if dataset.ndim == 3 else 1
        return Shard(
            path=path,
            key=key,
            rows=rows,
            d_in=d_in,
            storage=storage,
            tokens=tokens,
            chunk_rows=_chunk_rows(dataset, tokens, d_in * storage.itemsize),
            compressed=_is_compressed(dataset),
            file_bytes=status.st_size,
            checksum=metadata.get("checksum"),
            metadata=metadata,
            state=file_state(status) if is_alone else None,
        )


def stated_digest(shard: Shard) -> str | None:
    """Return the digest of its rows that a shard states, see row_digest.py; None: it has none."""
    value = shard.metadata.get(ROW_DIGEST)
    return value if isinstance(value, str) else None


def file_state(status: os.stat_result) -> FileState:
    """Return the parts of a file's status that change with its content."""
    times = status.st_mtime_ns, status.st_ctime_ns
    return (status.st_dev, status.st_ino, status.st_size, *times)


def iterate_stored(file: OpenShard) -> Iterator[Array]:
    """Yield all rows of a shard in order, as stored [n, D]; the memory is reused."""
    shard = file.shard
    step = shard.block_rows()
    buffer = np.empty((min(step, shard.rows), shard.d_in), shard.storage.numpy_dtype)
    for start in range(0, shard.rows, step):
        stop = min(start + step, shard.rows)
        piece = buffer[: stop - start]
        file.read(start, stop, piece)
        yield piece


def _open(path: Path) -> h5py.File:
    import h5py

    require_memory()
    try:
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES, locking="best-effort")
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such file") from error
    except OSError as error:
        reason = one_line(error)
        if "truncated file" in reason:
            reason = f"truncated: {reason}"
        elif "signature not found" in reason:
            reason = f"not an HDF5 file, or only the beginning of one: {reason}"
        raise ShardError(f"{path}: cannot be opened: {reason}") from error


@contextmanager
def _structure(path: Path) -> Iterator[h5py.File]:
    """Keep `path` open; turn any error of HDF5 over damaged metadata into a ShardError."""
    file = _open(path)
    try:
        yield file
    except ShardError:
        raise
    except MemoryError as error:
        raise takes_too_much(path) from error
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError, TypeError, ValueError
        raise ShardError(f"{path}: damaged HDF5 structure: {one_line(error)}") from error
    finally:
        file.close()


def _dataset(path: Path, file: h5py.File, key: str, option: str) -> h5py.Dataset:
    import h5py

    item = find_item(path, file, key)
    if not isinstance(item, h5py.Dataset):
        raise ShardError(
            f"{path}: no dataset {key!r}; it holds {contents(file)} (name one with {option})"
        )
    if item.ndim not in (2, 3):
        raise ShardError(
            f"{path}: dataset {key!r} must have 2 or 3 dimensions, its shape is {item.shape}"
        )
    require_filters(path, item)
    return item


def _storage(path: Path, key: str, dataset: h5py.Dataset, file: h5py.File) -> Storage:
    dtype = dataset.dtype
    holder = dataset if "dtype" in dataset.attrs else file
    named = _attribute(path, holder, "dtype") if "dtype" in holder.attrs else None
    if str(named) == BFLOAT16.name and dtype.str[1:] == "u2":
        return BFLOAT16
    if dtype.kind == "f":
        storage = {2: FLOAT16, 4: FLOAT32, 8: FLOAT32}.get(dtype.itemsize)
        if storage is not None:
            return storage
    hint = ' (bfloat16 as uint16 needs the attribute dtype="bfloat16")' if dtype.kind == "u" else ""
    raise ShardError(
        f"{path}: dataset {key!r} holds {dtype}; {', '.join(STORAGES)} or float64 is needed{hint}"
    )


def _check_attributes(path: Path, metadata: dict[str, Any], rows: int, d_in: int | None) -> None:
    """Compare a shard of our own format with its attributes; other tools' files pass.

    Without `d_in` the dataset is not the activations, whose width and checksum the attributes are.
    """
    is_own = metadata.get("format") == FORMAT_NAME
    if not is_own or d_in is None:
        for name in ("checksum", ROW_DIGEST):
            metadata.pop(name, None)  # whatever another tool means by that name
    if not is_own:
        return
    version = metadata.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ShardError(
            f"{path}: format version {version}, this release reads up to {FORMAT_VERSION}"
        )
    for name, actual in (("rows", rows), ("d_in", d_in)):
        if actual is not None and metadata.get(name) != actual:
            raise ShardError(
                f"{path}: attribute {name} says {metadata.get(name)}, the dataset has {actual}"
            )


def _chunk_rows(dataset: h5py.Dataset, tokens: int, row_bytes: int) -> int:
    """Return the rows of a chunk, 1 where rows can be read singly."""
    if dataset.chunks is None:
        return 1
    rows = int(dataset.chunks[0]) * tokens
    return 1 if rows * row_bytes > SPLIT_BYTES and not _is_compressed(dataset) else rows


def _is_compressed(dataset: h5py.Dataset) -> bool:
    """Return whether a filter makes HDF5 decode a whole chunk to read any part of it."""
    return bool(dataset.id.get_create_plist().get_nfilters())


def _require_sound_attributes(path: Path, file: h5py.File, dataset: h5py.Dataset) -> None:
    """Raise ShardError for attributes that would hang or crash HDF5."""
    from h5py import h5o

    if file.userblock_size:
        return
    for item in (file["/"], dataset):
        if item.file.filename == file.filename:
            require_sound_texts(path, h5o.get_info(item.id).addr)


def _attribute(path: Path, item: h5py.File | h5py.Dataset, name: str) -> Any:
    """Return an attribute as a plain value; raise ShardError for one of absurd size."""
    count = math.prod(item.attrs.get_id(name).shape or ())
    if count > MAX_ATTRIBUTE:
        raise ShardError(f"{path}: damaged: attribute {name[:80]!r} claims {count:,} values")
    return _plain(item.attrs[name])


def _plain(value: Any) -> Any:
    """Convert an attribute to a plain Python value."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value
