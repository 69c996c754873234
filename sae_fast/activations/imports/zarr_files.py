"""Zarr arrays and groups, of format 2 and 3, which are folders named *.zarr."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_fast.activations.errors import ShardError
from sae_fast.activations.imports.arrays import (
    LARGEST_COMPRESSION,
    WHOLE_FILE,
    Arrays,
    LazyArrays,
    SourceArray,
)

ZARR_SUFFIX = ".zarr"


@contextmanager
def open_zarr(path: Path) -> Iterator[Arrays]:
    """Open an array, or the arrays of a group and of the groups in it, by their paths."""
    zarr = _package(path)
    node = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Array):
        yield {WHOLE_FILE: [_source_array(node, path)]}
        return
    names = sorted(_paths(zarr, node, ""))
    yield LazyArrays(names, lambda name: _source_array(node[name], path / name))


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())


def _package(path: Path) -> Any:
    try:
        return importlib.import_module("zarr")
    except ImportError as error:
        raise ShardError(
            f"{path}: needs zarr: install it (pip install 'sae_fast[remote]')"
        ) from error


def _paths(zarr: Any, group: Any, prefix: str) -> Iterator[str]:
    for name in group:
        member = group[name]
        if isinstance(member, zarr.Array):
            yield prefix + name
        else:
            yield from _paths(zarr, member, f"{prefix}{name}/")


def _source_array(array: Any, folder: Path) -> SourceArray:
    def read(start: int, stop: int) -> torch.Tensor:
        piece = np.asarray(array[start:stop])
        return torch.from_numpy(np.array(piece, piece.dtype.newbyteorder("="), order="C"))

    # Parts that are not there are read as the fill value, which no activations are made of.
    stored = bytes_of(folder) * LARGEST_COMPRESSION
    return SourceArray(tuple(array.shape), _torch_dtype(array.dtype), read, stored)


def _torch_dtype(dtype: Any) -> torch.dtype | None:
    try:
        return torch.from_numpy(np.empty(0, np.dtype(dtype).newbyteorder("="))).dtype
    except TypeError:
        return None
