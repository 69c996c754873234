"""Decoding the chunks of a compressed dataset outside HDF5, which would do one chunk at a time.

gzip and Zstandard, with or without HDF5's shuffle of bytes. Zstandard is taken from the library of
hdf5plugin, which a shard compressed so needs in any case.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_fast.activations.hdf5_layout import SHUFFLE
from sae_fast.activations.storage import Array

if TYPE_CHECKING:
    import h5py

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SLAB = 1 << 17  # numbers
_DEFLATE, _ZSTD = 1, 32015  # numbers of HDF5's filters

Inflate = Callable[[Array, int], Array]  # bytes [stored], size -> bytes [size]; raises OSError


class ChunkDecoder:
    """Turns what is stored of a chunk into its numbers."""

    def __init__(self, inflate: Inflate, *, shuffled: bool) -> None:
        self._inflate = inflate
        self._shuffled = shuffled

    def decode(self, stored: Array, out: Array) -> None:
        """Decode the stored bytes into `out`, a whole chunk; raises OSError for damaged ones."""
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
    """What decodes a dataset's chunks; None: only HDF5 can."""
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
    """Decompression of Zstandard; None where hdf5plugin's library does not have it."""
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
