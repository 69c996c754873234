"""Texts of any length in an HDF5 file, checked before HDF5 reads one.

An attribute that is such a text has its length and a place in a global heap. HDF5 2.0 does not come
to an end where a damaged heap says that an object takes no room, and reads or allocates whatever
length the attribute states.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from sae_fast.activations.errors import ShardError, one_line

SIGNATURE = b"GCOL\x01\0\0\0"  # with the version of all releases
HEADER_BYTES = 16  # of a heap, of an object in it, and of an object header
# Attributes are written at the beginning of a file, or when it is closed.
SEARCHED_BYTES = 4 << 20
MOST_BLOCKS = 1000  # of an object header
_CONTINUATION, _ATTRIBUTE, _VARIABLE = 0x10, 0x0C, 9
_TEXT = struct.Struct("<IQI")  # length, heap and number of the object in it


def require_sound_heaps(path: Path) -> None:
    """Raise ShardError for a heap near either end of a file that would hang or crash HDF5."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            size = len(view)
            for start in sorted({0, max(0, size - SEARCHED_BYTES)}):
                place = view.find(SIGNATURE, start, start + SEARCHED_BYTES)
                while place >= 0:
                    if _objects(view, place) is None:
                        raise ShardError(f"{path}: damaged: a heap of texts, at byte {place}")
                    place = view.find(SIGNATURE, place + 1, start + SEARCHED_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path}: cannot be opened: {one_line(error)}") from error


def require_sound_texts(path: Path, address: int) -> None:
    """Raise ShardError if an attribute of the object at an address has a wrong length.

    Headers of HDF5's newer form have a checksum, which HDF5 compares, and are not looked at.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        try:
            for unit, texts in _texts(view, address):
                for length, heap, number in _TEXT.iter_unpack(texts):
                    is_heap = heap < len(view) and view[heap : heap + 8] == SIGNATURE
                    objects = _objects(view, heap) if is_heap else None
                    if length and (objects or {}).get(number) != length * unit:
                        raise ShardError(f"{path}: damaged: a text of {length:,} bytes")
        except struct.error as error:
            raise ShardError(f"{path}: damaged: an object header: {error}") from error


def _objects(view: mmap.mmap, place: int) -> dict[int, int] | None:
    """Return lengths of the objects of a heap by number; None unless they follow to its end."""
    if len(view) - place < HEADER_BYTES:
        return {}  # HDF5 says that the file is cut
    (size,) = struct.unpack_from("<Q", view, place + 8)
    position, end = place + HEADER_BYTES, place + size
    if end > len(view):
        return {}  # as above
    lengths: dict[int, int] = {}
    while end - position >= HEADER_BYTES:
        number, _, _, length = struct.unpack_from("<HHIQ", view, position)
        # Object 0 is the free room, whose length counts its header.
        taken = HEADER_BYTES + -(-length // 8) * 8 if number else length
        if taken < HEADER_BYTES or position + taken > end:
            return None
        lengths[number] = length
        position += taken
    return lengths


def _texts(view: mmap.mmap, address: int) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of a unit, and the values, of each attribute of variable length."""
    if view[address : address + 2] != b"\x01\0":
        return
    (size,) = struct.unpack_from("<I", view, address + 8)
    blocks = [(address + HEADER_BYTES, size)]
    for position, length in blocks:
        end = min(position + length, len(view))
        while end - position >= 8 and len(blocks) < MOST_BLOCKS:
            kind, taken = struct.unpack_from("<HH", view, position)
            content = view[position + 8 : min(position + 8 + taken, end)]
            if kind == _CONTINUATION:
                blocks.append(struct.unpack_from("<QQ", content))
            elif kind == _ATTRIBUTE:
                yield _text(content)
            position += 8 + taken


def _text(message: bytes) -> tuple[int, bytes]:
    """Return the bytes of a unit of an attribute, and its values if their length varies."""
    version, _, *sizes = struct.unpack_from("<BBHHH", message)
    if version == 1:  # each part fills whole words
        sizes = [-(-size // 8) * 8 for size in sizes]
    place = (9 if version == 3 else 8) + sizes[0]
    kind, bits = struct.unpack_from("<BB", message, place)
    if kind & 15 != _VARIABLE:
        return 1, b""
    if bits & 15 > 1 or bits >> 4 > 2:  # neither sequences nor texts: HDF5 crashes
        raise struct.error("a type of variable length that there is not")
    (unit,) = struct.unpack_from("<I", message, place + 12)  # of the type within
    values = message[place + sizes[1] + sizes[2] :]
    return unit, values[: len(values) // _TEXT.size * _TEXT.size]
