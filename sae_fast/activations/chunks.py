"""Rows of a dataset, read from their places in the file and decoded outside HDF5.

h5py lets one thread at a time into HDF5, so two disks would wait for each other, and so would two
threads that decode. Where the chunks lie is asked of HDF5 when the file is opened. gzip and
Zstandard are decoded here, with or without HDF5's shuffle of bytes; Zstandard is taken from the
library of hdf5plugin, which a shard compressed so needs in any case.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sae_fast.activations.hdf5_layout import SHUFFLE
from sae_fast.activations.storage import Array, Storage

if TYPE_CHECKING:
    import h5py

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SLAB = 1 << 17  # numbers
_DEFLATE, _ZSTD = 1, 32015  # numbers of HDF5's filters

Inflate = Callable[[Array, int], Array]  # bytes [stored], size -> bytes [size]; raises OSError


class ChunkDecoder:
    """Decodes stored chunks into numbers."""

    def __init__(self, inflate: Inflate, *, shuffled: bool) -> None:
        self._inflate = inflate
        self._shuffled = shuffled

    def decode(self, stored: Array, out: Array) -> None:
        """Decode the stored bytes into `out`, a whole chunk; raise OSError for damaged ones."""
        decoded = self._inflate(stored, out.nbytes)
        if not self._shuffled:
            out.view(np.uint8).reshape(-1)[:] = decoded
            return
        # The lowest bytes of all numbers, then the next ones, shifted together in slabs that
        # stay in the cache: twice as fast as putting each byte in its place.
        numbers = out.reshape(-1).view(_UNSIGNED[out.itemsize])
        planes = decoded.reshape(out.itemsize, -1)
        for start in range(0, len(numbers), _SLAB):
            slab = numbers[start : start + _SLAB]
            slab[:] = planes[-1, start : start + _SLAB]
            for plane in planes[-2::-1]:
                np.left_shift(slab, 8, out=slab)
                np.bitwise_or(slab, plane[start : start + _SLAB], out=slab)


def chunk_decoder(dataset: h5py.Dataset) -> ChunkDecoder | None:
    """Return the decoder of a dataset's chunks; None: only HDF5 can decode them."""
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
    shuffled = filters[:1] == [SHUFFLE]
    inflate: Inflate | None = None
    if filters[shuffled:] == [_DEFLATE]:
        inflate = _inflate_gzip
    elif filters[shuffled:] == [_ZSTD]:
        inflate = _zstd()
    return None if inflate is None else ChunkDecoder(inflate, shuffled=shuffled)


def _inflate_gzip(stored: Array, size: int) -> Array:
    try:
        decoded = np.frombuffer(zlib.decompress(stored.data, bufsize=size), np.uint8)
    except zlib.error as error:
        raise OSError(f"a chunk is damaged: {error}") from error
    return _checked(decoded, len(decoded), size)


@functools.cache
def _zstd() -> Inflate | None:
    """Return the decompression of Zstandard; None: hdf5plugin's library does not have it."""
    try:
        import hdf5plugin

        (path,) = Path(hdf5plugin.PLUGIN_PATH).glob("libh5zstd.*")
        decompress = ctypes.CDLL(str(path)).ZSTD_decompress
    except (ImportError, ValueError, OSError, AttributeError):
        return None
    decompress.restype = ctypes.c_size_t
    decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t] * 2

    def inflate(stored: Array, size: int) -> Array:
        decoded = np.empty(size, np.uint8)
        # An error is a number near the largest there is.
        count = decompress(decoded.ctypes.data, size, stored.ctypes.data, stored.nbytes)
        return _checked(decoded, int(count), size)

    return inflate


def _checked(decoded: Array, count: int, size: int) -> Array:
    if count != size:
        raise OSError("a chunk is damaged: it does not decode to its size")
    return decoded


Places = npt.NDArray[np.int64]  # [n_chunks], in order
PIECE_BYTES = 2 << 20


class Piece(NamedTuple):
    """A part of the file: `size` bytes from `place` on, which hold the rows start..stop."""

    place: int
    size: int
    start: int
    stop: int


class DirectRows(Protocol):
    """Reads rows of an open file, from several threads at once if need be."""

    descriptor: int

    def pieces(self, rows: int) -> list[Piece]:
        """Return the parts of the file that hold these rows of the dataset, as they lie there."""

    def decode(self, stored: Array, out: Array) -> None:
        """Turn the bytes of a piece into its rows `out` [stop - start, D]; raise OSError."""

    def read(self, start: int, stop: int, out: Array) -> None:
        """Read rows start..stop into `out` [stop - start, D]; raise OSError."""

    def expect(self, start: int, stop: int) -> None:
        """Let the system fetch rows that will be read soon."""


class PlainRows:
    """Rows that are stored as they are, in chunks of `chunk_rows` rows."""

    def __init__(self, descriptor: int, offsets: Places, chunk_rows: int, row_bytes: int) -> None:
        self.descriptor = descriptor
        self._offsets = offsets
        self._chunk_rows = chunk_rows
        self._row_bytes = row_bytes
        # A run is chunks that follow each other in the file too: one read takes all that is wanted.
        breaks = np.flatnonzero(np.diff(offsets) != chunk_rows * row_bytes) + 1
        self._run_ends = np.append(breaks, len(offsets)) * chunk_rows

    def read(self, start: int, stop: int, out: Array) -> None:
        """Read rows start..stop into `out` [stop - start, D]; raise OSError."""
        view = out.view(np.uint8).reshape(-1).data
        for place, size in self._parts(start, stop):
            _read_bytes(self.descriptor, view[:size], place)
            view = view[size:]

    def expect(self, start: int, stop: int) -> None:
        """Let the system fetch rows that will be read soon."""
        for place, size in self._parts(start, stop):
            _expect_bytes(self.descriptor, place, size)

    def pieces(self, rows: int) -> list[Piece]:
        """Return the parts of the file that hold these rows of the dataset, as they lie there."""
        step, pieces = max(1, PIECE_BYTES // self._row_bytes), []
        for number, offset in enumerate(self._offsets.tolist()):
            first = number * self._chunk_rows
            for start in range(first, min(rows, first + self._chunk_rows), step):
                stop = min(start + step, rows, first + self._chunk_rows)
                place = offset + (start - first) * self._row_bytes
                pieces.append(Piece(place, (stop - start) * self._row_bytes, start, stop))
        return sorted(pieces)

    def decode(self, stored: Array, out: Array) -> None:
        """Turn the bytes of a piece into its rows `out` [stop - start, D]."""
        out.view(np.uint8).reshape(-1)[:] = stored

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Return place and length of each piece of the file with rows start..stop."""
        position = start
        while position < stop:
            chunk, first = divmod(position, self._chunk_rows)
            run = int(self._run_ends[np.searchsorted(self._run_ends, position, side="right")])
            end = min(stop, run)
            place = int(self._offsets[chunk]) + first * self._row_bytes
            yield place, (end - position) * self._row_bytes
            position = end


class CodedRows:
    """Rows in compressed chunks, each decoded whole."""

    def __init__(
        self,
        descriptor: int,
        offsets: Places,
        sizes: Places,
        chunk_rows: int,
        decoder: ChunkDecoder,
    ) -> None:
        self.descriptor = descriptor
        self._offsets, self._sizes = offsets, sizes
        self._chunk_rows = chunk_rows
        self._decoder = decoder

    def read(self, start: int, stop: int, out: Array) -> None:
        """Read rows start..stop into `out` [stop - start, D]; raise OSError."""
        position = start
        while position < stop:
            chunk, first = divmod(position, self._chunk_rows)
            end = min(stop, (chunk + 1) * self._chunk_rows)
            stored = np.empty(self._sizes[chunk], np.uint8)
            _read_bytes(self.descriptor, stored.data, int(self._offsets[chunk]))
            self._decode(stored, out[position - start : end - start], first)
            position = end

    def pieces(self, rows: int) -> list[Piece]:
        """Return the parts of the file that hold these rows of the dataset, as they lie there."""
        starts = range(0, rows, self._chunk_rows)
        lies = zip(self._offsets.tolist(), self._sizes.tolist(), starts, strict=True)
        return sorted(
            Piece(place, size, start, min(rows, start + self._chunk_rows))
            for place, size, start in lies
        )

    def decode(self, stored: Array, out: Array) -> None:
        """Turn the bytes of a piece into its rows `out` [stop - start, D]; raise OSError."""
        self._decode(stored, out, 0)

    def _decode(self, stored: Array, out: Array, first: int) -> None:
        """Decode a chunk and copy its rows from number `first` on to `out`."""
        if len(out) == self._chunk_rows:
            self._decoder.decode(stored, out)
            return
        whole = np.empty((self._chunk_rows, out.shape[1]), out.dtype)
        self._decoder.decode(stored, whole)
        out[:] = whole[first : first + len(out)]

    def expect(self, start: int, stop: int) -> None:
        """Let the system fetch rows that will be read soon."""
        for chunk in range(start // self._chunk_rows, -(-stop // self._chunk_rows)):
            _expect_bytes(self.descriptor, int(self._offsets[chunk]), int(self._sizes[chunk]))


def direct_rows(
    file: h5py.File, dataset: h5py.Dataset, storage: Storage, row_bytes: int
) -> DirectRows | None:
    """Locate the rows of a dataset; None: HDF5 has to convert, decode or look for them."""
    from h5py import h5d

    if dataset.file.filename != file.filename:  # behind a link
        return None
    properties = dataset.id.get_create_plist()
    if (
        not hasattr(os, "preadv")
        or file.driver != "sec2"
        or file.userblock_size
        or not _is_plain(dataset, storage)
        or properties.get_external_count()
    ):
        return None
    rows, descriptor = math.prod(dataset.shape[:-1]), file.id.get_vfd_handle()
    if properties.get_layout() == h5d.CONTIGUOUS:
        if (offset := dataset.id.get_offset()) is None:
            return None
        return PlainRows(descriptor, np.array([offset], np.int64), rows, row_bytes)
    if properties.get_layout() != h5d.CHUNKED or dataset.chunks[1:] != dataset.shape[1:]:
        return None
    chunk_rows = int(dataset.chunks[0]) * (rows // dataset.shape[0])
    if (chunks := _chunks(dataset, -(-rows // chunk_rows))) is None:
        return None
    offsets, sizes = chunks
    if properties.get_nfilters() == 0:
        return PlainRows(descriptor, offsets, chunk_rows, row_bytes)
    if (decoder := chunk_decoder(dataset)) is None:
        return None
    return CodedRows(descriptor, offsets, sizes, chunk_rows, decoder)


def _chunks(dataset: h5py.Dataset, count: int) -> tuple[Places, Places] | None:
    """Return places and lengths of all chunks; None: one lacks, or skipped a filter."""
    if not hasattr(dataset.id, "chunk_iter"):
        return None
    offsets, sizes, masks = np.zeros((3, count), np.int64)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        number = chunk.chunk_offset[0] // dataset.chunks[0]
        if number < count:
            offsets[number], sizes[number] = chunk.byte_offset, chunk.size
            masks[number] = chunk.filter_mask

    # Where the file's index of its chunks is damaged, what HDF5 reads is refused or has another
    # checksum.
    try:
        dataset.id.chunk_iter(note)
    except RuntimeError:
        return None
    return (offsets, sizes) if offsets.all() and not masks.any() else None


def walk_file(
    direct: DirectRows, rows: int, like: Array, note: Callable[[memoryview], object]
) -> Iterator[tuple[int, Array]]:
    """Read a file once, from its first byte to its last, and give all of them to `note`.

    Yields the rows [n, D] of every piece on the way, of the type and width of `like` [0, D], with
    the number of the first; the memory is reused. Raises OSError.
    """
    position = 0
    largest = np.empty(0, np.uint8)
    for piece in direct.pieces(rows):
        if piece.place < position:
            raise OSError("chunks lie upon each other")
        _note_bytes(direct.descriptor, position, piece.place - position, note)
        if largest.size < piece.size:
            largest = np.empty(piece.size, np.uint8)
        stored = largest[: piece.size]
        _read_bytes(direct.descriptor, stored.data, piece.place)
        note(stored.data)
        out = np.empty((piece.stop - piece.start, like.shape[1]), like.dtype)
        direct.decode(stored, out)
        yield piece.start, out
        position = piece.place + piece.size
    end = os.fstat(direct.descriptor).st_size
    _note_bytes(direct.descriptor, position, end - position, note)


def _note_bytes(
    descriptor: int, place: int, size: int, note: Callable[[memoryview], object]
) -> None:
    """Give `note` some bytes of a file in pieces."""
    for start in range(place, place + size, PIECE_BYTES):
        view = memoryview(bytearray(min(PIECE_BYTES, place + size - start)))
        _read_bytes(descriptor, view, start)
        note(view)


def _is_plain(dataset: h5py.Dataset, storage: Storage) -> bool:
    """Return whether numbers are stored as they are in memory, bit for bit.

    Types of other tools may differ in more than their size, such as in the bits of the exponent.
    """
    from h5py import h5t

    in_memory = h5t.py_create(storage.numpy_dtype)
    return bool(dataset.id.get_type() == in_memory)


def _read_bytes(descriptor: int, view: memoryview, place: int) -> None:
    while len(view):
        count = os.preadv(descriptor, [view], place)
        if count == 0:
            raise OSError("the file ends before these rows do")
        view, place = view[count:], place + count


def _expect_bytes(descriptor: int, place: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):  # which macOS lacks
        os.posix_fadvise(descriptor, place, size, os.POSIX_FADV_WILLNEED)
