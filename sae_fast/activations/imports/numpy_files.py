""".npy files, mapped into memory, and .npz archives, read as streams, compressed or not."""

from __future__ import annotations

import io
import math
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.errors import ShardError
from sae_fast.activations.imports.arrays import (
    LARGEST_COMPRESSION,
    WHOLE_FILE,
    Arrays,
    LazyArrays,
    SourceArray,
    short,
)
from sae_fast.activations.storage import Array

# The type under which NumPy saves JAX's bfloat16: two bytes without a meaning.
BFLOAT16_BITS = np.dtype("V2")
# Until 3.11.4 Python's parser of literals, which reads a header, fails in several threads at once.
_parsing = threading.Lock()
HEADER_BYTES = 10_000  # as NumPy itself limits a header, but after reading it
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes


@contextmanager
def open_npy(path: Path) -> Iterator[Arrays]:
    """Open the array of a .npy file."""
    with path.open("rb") as file:
        _read_header(path, path.name, file)
    with _parsing:
        whole = np.load(path, mmap_mode="r", allow_pickle=False)
    array = SourceArray(
        whole.shape,
        _torch_dtype(whole.dtype),
        lambda start, stop: _as_tensor(whole[start:stop]),
        path.stat().st_size,
    )
    yield {WHOLE_FILE: [array]}


@contextmanager
def open_npz(path: Path) -> Iterator[Arrays]:
    """Open the arrays of a .npz archive."""
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path))
        members = {
            member.filename.removesuffix(".npy"): member
            for member in archive.infolist()
            if member.filename.endswith(".npy")
        }

        def look(name: str) -> SourceArray:
            member = members[name]
            if member.compress_type not in COMPRESSIONS:
                raise ShardError(f"{path}: {short(member.filename)} is not of NumPy")
            return _stream_array(path, member, stack.enter_context(archive.open(member)))

        yield LazyArrays(members, look)


def _read_header(
    path: Path, name: str, stream: IO[bytes]
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, order and type of an array; leave `stream` at its first number."""
    start = stream.read(8)
    version = np.lib.format.read_magic(io.BytesIO(start))
    known: dict[tuple[int, int], tuple[int, Any]] = {
        (1, 0): (2, np.lib.format.read_array_header_1_0),
        (2, 0): (4, np.lib.format.read_array_header_2_0),
    }
    if version not in known:
        raise ShardError(f"{path}: {short(name)} has the unknown .npy version {version}")
    size, parse = known[version]
    length = stream.read(size)
    count = int.from_bytes(length, "little")
    if count > HEADER_BYTES:
        raise ShardError(f"{path}: {short(name)} has a header of {count:,} bytes")
    header = io.BytesIO(length + stream.read(count))
    with _parsing:
        shape, by_columns, dtype = parse(header)
    return shape, by_columns, dtype


def _stream_array(path: Path, info: zipfile.ZipInfo, stream: IO[bytes]) -> SourceArray:
    member = short(info.filename)
    stored = min(info.file_size, info.compress_size * LARGEST_COMPRESSION)
    shape, by_columns, dtype = _read_header(path, member, stream)
    if dtype.hasobject:
        return SourceArray(shape, None, _unreadable, stored)
    if by_columns and len(shape) > 1:
        raise ShardError(
            f"{path}: {member} is stored column by column (Fortran order) in an archive; "
            "save it with numpy.save, or numpy.ascontiguousarray first"
        )
    begin = stream.tell()
    entry_bytes = dtype.itemsize * math.prod(shape[1:])

    def read(start: int, stop: int) -> Tensor:
        # Reading on where the last piece ended keeps the archive's checksum of it in force.
        if stream.tell() != (place := begin + start * entry_bytes):
            stream.seek(place)
        data = bytearray((stop - start) * entry_bytes)
        filled = 0
        while count := stream.readinto(memoryview(data)[filled:]):  # type: ignore[attr-defined]
            filled += count
        if filled < len(data):
            raise ShardError(f"{path}: {member} ends after {stream.tell() - begin} bytes")
        return _as_tensor(np.frombuffer(data, dtype).reshape(stop - start, *shape[1:]))

    return SourceArray(shape, _torch_dtype(dtype), read, stored)


def _unreadable(start: int, stop: int) -> Tensor:
    raise TypeError("Python objects are not read")


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    if dtype == BFLOAT16_BITS:
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError:
        return None


def _as_tensor(piece: Array) -> Tensor:
    """Copy the numbers to memory of their own, in the byte order of this machine."""
    if piece.dtype == BFLOAT16_BITS:
        bits = np.ascontiguousarray(piece).view(np.int16).copy()
        return torch.from_numpy(bits).view(torch.bfloat16)
    return torch.from_numpy(np.array(piece, piece.dtype.newbyteorder("="), order="C"))
