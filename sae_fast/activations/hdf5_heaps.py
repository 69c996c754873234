"""Global heaps of an HDF5 file, where texts of any length are kept, checked before HDF5 reads one.

HDF5 2.0 does not come to an end where a damaged heap says that an object takes no room: an
attribute that is a text then hangs whatever reads it.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from sae_fast.activations.errors import ShardError, one_line

SIGNATURE = b"GCOL\x01\0\0\0"  # with the version of all releases
HEADER_BYTES = 16  # of a heap, and of an object in it
# Attributes are written at the beginning of a file, or when it is closed.
SEARCHED_BYTES = 4 << 20


def require_sound_heaps(path: Path) -> None:
    """Raise ShardError for a heap, near either end of a file, that HDF5 would not come through."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            size = len(view)
            for start in sorted({0, max(0, size - SEARCHED_BYTES)}):
                place = view.find(SIGNATURE, start, start + SEARCHED_BYTES)
                while place >= 0:
                    if not _is_sound(view, place):
                        raise ShardError(f"{path}: damaged: a heap of texts, at byte {place}")
                    place = view.find(SIGNATURE, place + 1, start + SEARCHED_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path}: cannot be opened: {one_line(error)}") from error


def _is_sound(view: mmap.mmap, place: int) -> bool:
    """Whether the objects of a heap follow each other up to its end."""
    if len(view) - place < HEADER_BYTES:
        return True  # HDF5 says that the file is cut
    (size,) = struct.unpack_from("<Q", view, place + 8)
    position, end = place + HEADER_BYTES, place + size
    if end > len(view):
        return True  # as above
    while end - position >= HEADER_BYTES:
        number, _, _, length = struct.unpack_from("<HHIQ", view, position)
        # Object 0 is the free room, whose length counts its header.
        taken = HEADER_BYTES + -(-length // 8) * 8 if number else length
        if taken < HEADER_BYTES or position + taken > end:
            return False
        position += taken
    return True
