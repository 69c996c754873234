"""The activations that a conversion reads: array, shape, and the numbers beside it.

Activations are [n, D], rows one after the other, or [sequences, tokens, D]. Further axes after
them, such as (heads, d_head), make up one row if their product is the width that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sae_fast.activations.errors import ShardError
from sae_fast.activations.imports.arrays import (
    FLOATS,
    Arrays,
    SourceArray,
    contents_of,
    described,
    opened,
    short,
)
from sae_fast.activations.imports.formats import opener_of
from sae_fast.activations.imports.zarr_files import bytes_of
from sae_fast.activations.shard import DEFAULT_KEY
from sae_fast.activations.storage import FLOAT32, Storage, storage_of

# Columns that a file may have beside the activations, with the names in use for each.
COLUMN_NAMES = {
    "token_ids": ("token_ids", "input_ids", "tokens"),
    "doc_id": ("doc_id", "doc_ids"),
    "position": ("position", "positions"),
}
MASK_NAMES = ("attention_mask",)
BESIDE = {name for names in (*COLUMN_NAMES.values(), MASK_NAMES) for name in names}


@dataclass(frozen=True)
class ArrayLayout:
    """One array of activations."""

    entries: int  # of the first axis
    tokens: int  # of each entry; 0: it has no such axis
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Rows, padding among them."""
        return self.entries * max(1, self.tokens)


@dataclass(frozen=True)
class SourceFile:
    """A file without its numbers."""

    path: Path
    bytes: int
    arrays: tuple[ArrayLayout, ...]
    columns: tuple[tuple[str, str], ...]  # what is written and the name in the file
    mask: str | None


@dataclass(frozen=True)
class SavedActivations:
    """Files with the same kind of activations."""

    files: tuple[SourceFile, ...]
    key: str
    d_in: int

    @property
    def rows(self) -> int:
        """Rows of all files, padding among them."""
        return sum(array.rows for file in self.files for array in file.arrays)

    @property
    def sequences(self) -> int:
        """Sequences of all files; 0 where nothing says what a sequence is."""
        arrays = [array for file in self.files for array in file.arrays]
        return sum(array.entries for array in arrays if array.tokens > 0)

    @property
    def storage(self) -> Storage:
        """Type that holds the numbers of all files."""
        kinds = {storage_of(array.dtype) for file in self.files for array in file.arrays}
        return kinds.pop() if len(kinds) == 1 else FLOAT32

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are written beside the activations."""
        names = {name for name, _ in self.files[0].columns}
        if self.sequences:
            names |= {"doc_id", "position"}
        return tuple(sorted(names))


def candidates(path: Path) -> dict[str, str]:
    """Return the names in a file that could be activations, described."""
    with opened(path, opener_of(path)) as arrays:
        return {
            name: described(name, parts) for name, parts in arrays.items() if _fits(name, parts)
        }


def _fits(name: str, arrays: list[SourceArray]) -> bool:
    is_float = all(array.dtype in FLOATS and len(array.shape) >= 2 for array in arrays)
    return bool(arrays) and is_float and name.rpartition("/")[2] not in BESIDE


def choose_key(paths: Sequence[Path], key: str | None) -> str:
    """Return the name of the activations; raise ShardError where it has to be given."""
    path = paths[0]
    with opened(path, opener_of(path)) as arrays:
        there = contents_of(arrays)
        fitting = [name for name, parts in arrays.items() if _fits(name, parts)]
    if key is not None:
        return key
    if DEFAULT_KEY in fitting:
        return DEFAULT_KEY
    if not fitting:
        raise ShardError(
            f"{path}: no activations in it, real numbers of 2 or 3 dimensions; it holds {there}"
        )
    if len(fitting) > 1:
        raise ShardError(
            f"{path}: holds {there}; name the activations with --key, "
            "or take all with --all-keys, each into a folder of its own"
        )
    return fitting[0]


def inspect(paths: Sequence[Path], key: str, d_in: int | None = None) -> SavedActivations:
    """Check the files against each other; raise ShardError for the first that differs."""
    files: list[SourceFile] = []
    width = d_in
    for path in paths:
        with opened(path, opener_of(path)) as arrays:
            if key not in arrays:
                name = repr(key) if key else "array without a name"
                raise ShardError(f"{path}: no {name}; it holds {contents_of(arrays)}")
            if width is None:
                width = next((a.shape[-1] for a in arrays[key] if a.shape and a.shape[0]), None)
            layouts = tuple(_layout(path, array, width, d_in) for array in arrays[key])
            columns, mask = _beside(path, key, arrays, layouts)
        files.append(SourceFile(path, bytes_of(path), layouts, columns, mask))
        _check_like_first(files)
    source = SavedActivations(tuple(files), key, width or 0)
    if source.rows == 0:
        raise ShardError(f"{paths[0]}: no rows in it or in the other {len(paths) - 1} files")
    return source


def _layout(path: Path, array: SourceArray, width: int | None, asked: int | None) -> ArrayLayout:
    shape, place = list(array.shape), described("", [array])
    if array.dtype not in FLOATS or len(shape) < 2:
        raise ShardError(
            f"{path}: activations must be real numbers, [n, d_in] or [sequences, tokens, d_in], "
            f"got {place}"
        )
    if not array.is_backed:
        claimed = short(f"{array.claimed:,}")
        raise ShardError(
            f"{path}: activations {place} are {claimed} bytes, the file has at most "
            f"{array.stored:,} for them: it is damaged, repeats its numbers or is compressed "
            "beyond what activations are; save them anew, contiguous and not compressed"
        )
    if shape[-1] == 0 and shape[0] > 0:
        raise ShardError(f"{path}: activations must have a width of at least 1, got {place}")
    if width is None or 0 in shape:
        return ArrayLayout(0, 0, array.dtype)
    leading = len(shape) - 1
    while leading > 1 and math.prod(shape[leading:]) < width:
        leading -= 1
    if math.prod(shape[leading:]) != width or leading > 2:
        wanted = f"[n, {width}] or [sequences, tokens, {width}]"
        hint = "" if asked else " (--d-in joins the last axes where several make up a row)"
        raise ShardError(f"{path}: activations must be {wanted}, got {place}{hint}")
    return ArrayLayout(shape[0], shape[1] if leading == 2 else 0, array.dtype)


def _beside(
    path: Path, key: str, arrays: Arrays, layouts: Sequence[ArrayLayout]
) -> tuple[tuple[tuple[str, str], ...], str | None]:
    """Find the columns and the mask in the same dictionary as the activations."""
    folder = key.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""

    def find(names: Sequence[str]) -> str | None:
        there = [prefix + name for name in names if prefix + name in arrays]
        return there[0] if there and there[0] != key else None

    names_of = {column: find(names) for column, names in COLUMN_NAMES.items()}
    columns = tuple((column, name) for column, name in names_of.items() if name is not None)
    mask = find(MASK_NAMES)
    for column, name in (*columns, *([("mask", mask)] if mask else [])):
        _check_beside(path, name, arrays[name], layouts, column == "doc_id")
    return columns, mask


def _check_beside(
    path: Path,
    name: str,
    columns: list[SourceArray],
    layouts: Sequence[ArrayLayout],
    a_sequence: bool,  # whether one number for a whole sequence is enough
) -> None:
    good = len(columns) == len(layouts)
    for column, rows in zip(columns, layouts, strict=False):
        wanted = (rows.entries, rows.tokens) if rows.tokens else (rows.entries,)
        fits = column.shape == wanted or (a_sequence and column.shape == wanted[:1])
        good = good and (fits or not rows.entries) and _whole(column)
    if not good:
        raise ShardError(
            f"{path}: {name} must be whole numbers, one for each of {layouts[0].rows} tokens, "
            f"got {described('', columns)}"
        )


def _whole(array: SourceArray) -> bool:
    return array.dtype is not None and not array.dtype.is_floating_point


def _check_like_first(files: Sequence[SourceFile]) -> None:
    """Refuse a file that has other columns, or other axes, than the first."""
    first, last = files[0], files[-1]
    for what, one, other in (
        ("columns", dict(first.columns), dict(last.columns)),
        ("mask", first.mask, last.mask),
    ):
        if one != other:
            there, here = (x or "none" for x in (one, other))
            raise ShardError(f"{last.path}: {what}: {here}, in {first.path}: {there}")
    axes = {a.tokens > 0 for file in (first, last) for a in file.arrays if a.entries}
    if len(axes) > 1:
        raise ShardError(
            f"{last.path}: rows one after the other and sequences of rows are mixed, in it or "
            f"with {first.path}; convert them apart"
        )
