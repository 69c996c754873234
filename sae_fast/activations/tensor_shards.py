"""Shards that are files of tensors, .pt, .npy or .safetensors, read in place like HDF5 shards.

Each holds one tensor of activations, [n, D] or [sequences, tokens, D], alone or under a name, and
perhaps a number for each row under other names. Blocks are cut as in the shard that conversion
makes of the file, so training on either gives the same results.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from sae_fast.activations.errors import ShardError, one_line
from sae_fast.activations.files import TENSOR_SUFFIXES, require_regular
from sae_fast.activations.imports.arrays import (
    WHOLE_FILE,
    Arrays,
    SourceArray,
    contents_of,
    described,
    opened,
)
from sae_fast.activations.imports.formats import opener_of
from sae_fast.activations.imports.saved_activations import choose_key, inspect
from sae_fast.activations.shard import (
    DEFAULT_KEY,
    OpenShard,
    Shard,
    ShardFile,
    file_state,
    inspect_shard,
)
from sae_fast.activations.storage import Array, as_tensor, storage_of
from sae_fast.activations.writer import chunk_rows_of


def describe_shard(path: Path, key: str = DEFAULT_KEY, option: str = "--activations-key") -> Shard:
    """Open a shard of any format, check its structure and describe it; its rows are not read.

    Raises ShardError. `option` is the flag that names another key, for errors.
    """
    if not is_tensor_file(path):
        return inspect_shard(path, key, option)
    status = require_regular(path)
    name = _name_of(path, key, option)  # which says what is wrong with a damaged archive
    if path.suffix.lower() in (".pt", ".pth") and not zipfile.is_zipfile(path):
        raise ShardError(f"{path}: is of torch before 1.6; {_conversion(path)}")
    whole = inspect([path], name)
    (source,), d_in = whole.files, whole.d_in
    if source.mask is not None or len(source.arrays) > 1:
        what = f"a mask, {source.mask!r}" if source.mask is not None else "a list of tensors"
        raise ShardError(f"{path}: holds {what}; {_conversion(path)}")
    (layout,) = source.arrays
    storage = storage_of(layout.dtype)
    row_bytes = d_in * storage.itemsize
    return Shard(
        path=path,
        key=name or key,
        rows=layout.rows,
        d_in=d_in,
        storage=storage,
        tokens=max(1, layout.tokens),
        chunk_rows=min(layout.rows, chunk_rows_of(row_bytes)),
        compressed=False,
        file_bytes=status.st_size,
        checksum=None,
        metadata={},
        state=file_state(status),
    )


def open_shard(shard: Shard) -> OpenShard:
    """Open a shard of any format for reading; raise ShardError."""
    return TensorShardFile(shard) if is_tensor_file(shard.path) else ShardFile(shard)


def is_tensor_file(path: Path) -> bool:
    """Return whether a file is one of tensors, by its name."""
    return path.suffix.lower() in TENSOR_SUFFIXES


class TensorShardFile:
    """A file of tensors held open for reading."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._stack = ExitStack()
        with ExitStack() as stack:
            require_regular(shard.path)
            self._arrays: Arrays = stack.enter_context(opened(shard.path, opener_of(shard.path)))
            there = self._arrays.get(shard.key) or self._arrays.get(WHOLE_FILE)
            if not there or _rows(there[0], shard.d_in) != shard.rows:
                raise ShardError(f"{shard.path}: changed since it was checked")
            self._rows = there[0]
            self._stack = stack.pop_all()

    def read(self, start: int, stop: int, out: Array) -> None:
        """Read rows start..stop into `out` [stop - start, D] (C-contiguous, the stored type)."""
        tokens, storage = self.shard.tokens, self.shard.storage
        entry = start // tokens
        try:
            rows = self._rows.read(entry, -(-stop // tokens)).reshape(-1, self.shard.d_in)
            as_tensor(out, storage).copy_(rows[start - entry * tokens : stop - entry * tokens])
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            raise ShardError(
                f"{self.shard.path}: rows {start} to {stop - 1} cannot be read: {one_line(error)}"
            ) from error

    def walk(self, note: Callable[[memoryview], object]) -> Iterator[tuple[int, Array]] | None:
        """Return None: the library of the format knows where rows lie."""
        return None

    def expect(self, start: int, stop: int) -> None:
        """Do nothing: the file is mapped, and the system reads ahead in it."""

    def read_column(self, name: str, start: int, stop: int) -> Array:
        """Return numbers [stop - start] of these rows from an array of one number a row."""
        if name not in self._arrays:
            raise ShardError(f"{self.shard.path}: no array {name!r}; it holds {self.contents()}")
        column = self._arrays[name][0]
        if column.dtype is None or math.prod(column.shape) != self.shard.rows:
            raise ShardError(
                f"{self.shard.path}: array {name!r} must have one number a row, "
                f"{self.shard.rows}, got {described('', [column])}"
            )
        return column.read(0, column.shape[0]).reshape(-1).numpy()[start:stop]

    def has(self, name: str) -> bool:
        """Return whether the file has anything of this name."""
        return name in self._arrays

    def contents(self) -> str:
        """Describe its arrays by names and shapes, for errors."""
        return contents_of(self._arrays)

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def __enter__(self) -> TensorShardFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _name_of(path: Path, key: str, option: str) -> str:
    """Return the name of the activations: the key or, without one, the only fitting name."""
    with opened(path, opener_of(path)) as arrays:
        if key in arrays:
            return key
        if set(arrays) == {WHOLE_FILE}:
            return WHOLE_FILE
        if key != DEFAULT_KEY:
            raise ShardError(
                f"{path}: no array {key!r}; it holds {contents_of(arrays)} (name one with {option})"
            )
    try:
        return choose_key([path], None)
    except ShardError as error:
        reason = str(error).partition("; name the")[0]  # --key is a flag of the conversion
        raise ShardError(f"{reason} (name one with {option})") from error


def _rows(array: SourceArray, d_in: int) -> int:
    return math.prod(array.shape) // d_in


def _conversion(path: Path) -> str:
    target = f"{path.absolute().parent}_shards"
    command = f"python -m sae_fast.convert_shards {path.parent} {target}"
    return f"this makes shards of it: {command}"
