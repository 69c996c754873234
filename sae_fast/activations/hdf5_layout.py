"""Where HDF5 keeps the numbers of a dataset: found, and checked, before any of them is read.

HDF5 gives zeros for what was never written, follows links into any file, and trusts the sizes that
a damaged file states. All of that is refused here, by metadata alone.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sae_fast.activations.errors import ShardError, listed, one_line
from sae_fast.activations.files import require_regular

if TYPE_CHECKING:
    import h5py

Places = npt.NDArray[np.int64]  # [n_chunks], in order

MAX_LINKS = 16  # soft links that are followed for one name, as HDF5 itself follows
# HDF5 and zlib decode a compressed chunk whole for any row of it, at some 0.3 GB/s.
MAX_DECODED_BYTES = 1 << 30
SHOWN_NAMES = 20
SHUFFLE = 2  # number of HDF5's filter that sorts the bytes of a chunk's numbers by their place
FLETCHER = 3  # number of HDF5's filter that appends a checksum of 4 bytes to a chunk


def find_item(path: Path, file: h5py.File, name: str) -> Any:
    """Return the dataset or group of this name, None without one.

    Links are followed to files in the directory of `path` only. Raises ShardError for others.
    """
    import h5py

    home = path.parent
    parts = deque(part for part in name.split("/") if part)
    group: Any = file
    hops = 0
    while parts:
        if not isinstance(group, h5py.Group):
            return None
        part = parts.popleft()
        link = group.get(part, getlink=True)
        if isinstance(link, h5py.SoftLink):
            hops += 1
            if hops > MAX_LINKS:
                raise ShardError(f"{path}: {name!r} is a link that leads back to itself")
            if link.path.startswith("/"):
                group = group.file
            parts.extendleft(reversed([part for part in link.path.split("/") if part]))
            continue
        if isinstance(link, h5py.ExternalLink):
            hops += 1
            if hops > MAX_LINKS:
                raise ShardError(f"{path}: {name!r} is a link that leads back to itself")
            _require_inside(path, home, link.filename, f"{name!r} is a link to")
        try:
            group = None if link is None else group.get(part)
        except KeyError as error:  # what h5py makes of a header that HDF5 cannot read
            raise ShardError(f"{path}: damaged: {name!r}: {one_line(error)}") from error
    return group


def contents(file: h5py.File) -> str:
    """Describe the datasets of a file, the first of many, by name and shape, for errors."""
    import h5py

    there: list[str] = []

    def note(name: str, item: Any) -> bool | None:
        if isinstance(item, h5py.Dataset):
            there.append(f"{name} {item.shape}")
        return True if len(there) > SHOWN_NAMES else None

    file.visititems(note)
    more = " …" if len(there) > SHOWN_NAMES else ""
    return listed(there[:SHOWN_NAMES], SHOWN_NAMES) + more or "no dataset at all"


def require_written(path: Path, dataset: h5py.Dataset) -> None:
    """Raise ShardError unless every number of a dataset is in the file, or in one beside it."""
    _require_written(path, dataset, inside_virtual=False)


def _require_written(path: Path, dataset: h5py.Dataset, *, inside_virtual: bool) -> None:
    from h5py import h5d

    name = repr((dataset.name or "?").lstrip("/"))
    properties = dataset.id.get_create_plist()
    if properties.get_external_count():
        raise ShardError(
            f"{path}: {name} keeps its numbers in another file, {_external_name(properties)!r}; "
            "copy them into the shard"
        )
    layout = properties.get_layout()
    if layout == h5d.VIRTUAL:
        if inside_virtual:
            raise ShardError(f"{path}: {name} is a virtual dataset of a virtual dataset")
        _require_whole_virtual(path, dataset, name)
        return
    numbers = math.prod(int(size) for size in dataset.shape)
    size = numbers * dataset.id.get_type().get_size()
    file_bytes = os.stat(dataset.file.filename).st_size
    if layout == h5d.CHUNKED:
        _require_chunks(path, dataset, name, file_bytes)
    elif layout == h5d.CONTIGUOUS and size:
        if dataset.id.get_offset() is None or dataset.id.get_storage_size() < size:
            raise ShardError(f"{path}: {name} was never written: the file has room for none of it")
        if size > file_bytes:
            raise ShardError(f"{path}: {name} has {size:,} bytes, the file {file_bytes:,}")


def _require_chunks(path: Path, dataset: h5py.Dataset, name: str, file_bytes: int) -> None:
    pairs = list(zip(dataset.shape, dataset.chunks, strict=True))
    expected = math.prod(-(-int(size) // int(chunk)) for size, chunk in pairs)
    # A chunk takes more than a byte of the index; so many cannot be counted, nor need they be.
    present = 0 if expected > file_bytes else int(dataset.id.get_num_chunks())
    if present < expected:
        rows = int(dataset.chunks[0]) * (int(dataset.shape[1]) if dataset.ndim == 3 else 1)
        raise ShardError(
            f"{path}: {name} was not written whole: {expected - present:,} of its {expected:,} "
            f"chunks of {rows:,} rows are missing, and HDF5 would give zeros for them"
        )
    if present > expected:
        raise ShardError(f"{path}: damaged: {name} has {expected:,} chunks, its index {present:,}")
    properties = dataset.id.get_create_plist()
    n_filters = properties.get_nfilters()
    number_bytes = dataset.id.get_type().get_size()
    chunk_bytes = math.prod(int(chunk) for chunk in dataset.chunks) * number_bytes
    for code, _, values, _ in map(properties.get_filter, range(n_filters)):
        # HDF5 would put the bytes of numbers together wrongly, and say nothing.
        if code == SHUFFLE and tuple(values[:1]) != (number_bytes,):
            raise ShardError(
                f"{path}: damaged: {name} has numbers of {number_bytes} bytes, and a shuffle of "
                f"{', '.join(map(str, values)) or 'no'} bytes"
            )
    if n_filters and chunk_bytes > MAX_DECODED_BYTES:
        raise ShardError(
            f"{path}: {name} has compressed chunks of {chunk_bytes:,} bytes, which any read "
            f"decodes whole; {MAX_DECODED_BYTES:,} is the most, store it in smaller ones"
        )
    if hasattr(dataset.id, "chunk_iter") and expected:
        _require_places(path, dataset, name, chunk_bytes, file_bytes)
        _require_found(path, dataset, name)


def _require_places(
    path: Path, dataset: h5py.Dataset, name: str, chunk_bytes: int, file_bytes: int
) -> None:
    """Raise ShardError for chunks beyond the file, overlapping ones or impossible sizes."""
    places: list[tuple[int, int, int]] = []
    dataset.id.chunk_iter(
        lambda chunk: places.append((chunk.byte_offset, chunk.size, chunk.filter_mask))
    )
    properties = dataset.id.get_create_plist()
    codes = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
    # HDF5 crashes on a chunk that is shorter than the checksum at its end.
    least = 4 if FLETCHER in codes else 0
    exact = chunk_bytes + least if set(codes) <= {FLETCHER} else None
    for _, size, mask in places:
        # A chunk that a filter has passed by is stored without what the filter adds.
        if size < least or (exact is not None and size != exact and not mask):
            raise ShardError(f"{path}: damaged: a chunk of {name} is stored as {size} bytes")
    # Places of a damaged file go up to 2^64; as float64 they are exact where a file can end.
    offsets, sizes, _ = np.array(sorted(places), np.uint64).astype(np.float64).T
    ends = offsets + sizes
    if (ends > file_bytes).any() or (ends[:-1] > offsets[1:]).any():
        raise ShardError(f"{path}: damaged: chunks of {name} lie upon each other or beyond its end")


def _require_found(path: Path, dataset: h5py.Dataset, name: str) -> None:
    """Raise ShardError for a chunk that HDF5 lists and does not find, and would read as zeros.

    That is so where the keys of a damaged index are out of order. A search takes 7 µs.
    """
    pairs = zip(dataset.shape, dataset.chunks, strict=True)
    for place in itertools.product(*(range(0, int(size), int(chunk)) for size, chunk in pairs)):
        try:
            dataset.id.read_direct_chunk(place, out=bytearray())
        except (ValueError, RuntimeError, OSError) as error:
            if "bytes required" not in str(error):  # else it was found, and needs more room
                raise ShardError(
                    f"{path}: damaged: the index of {name} does not lead to the chunk that begins "
                    f"at {list(place)}: {one_line(error)}"
                ) from error


def _require_whole_virtual(path: Path, dataset: h5py.Dataset, name: str) -> None:
    """Raise ShardError unless written datasets of files beside it make a virtual one whole."""
    import h5py

    covered: list[tuple[int, int]] = []
    for source in dataset.virtual_sources():
        if source.file_name == ".":
            target = path
        else:
            what = f"{name} is a virtual dataset with parts in"
            target = _require_inside(path, path.parent, source.file_name, what)
        covered.append(_covered(path, name, source.vspace, dataset.shape))
        with h5py.File(target, "r", locking="best-effort") as file:
            part = find_item(target, file, source.dset_name)
            if not isinstance(part, h5py.Dataset):
                raise ShardError(f"{path}: {name}: {target} has no dataset {source.dset_name!r}")
            _require_written(target, part, inside_virtual=True)
            if not _holds(part, source):
                raise ShardError(f"{path}: {name}: {target} has fewer rows than it asks for")
    end = 0
    for start, stop in sorted(covered):
        if start > end:
            break
        end = max(end, stop)
    if end < dataset.shape[0]:
        raise ShardError(f"{path}: {name} is a virtual dataset without a source for row {end}")


def _holds(part: h5py.Dataset, source: Any) -> bool:
    """Return whether a dataset has all the numbers that a virtual one takes from it."""
    import h5py

    if source.src_space.get_select_type() == h5py.h5s.SEL_ALL:
        return bool(math.prod(part.shape) == source.vspace.get_select_npoints())
    _, last = source.src_space.get_select_bounds()
    return len(last) == part.ndim and all(map(int.__lt__, map(int, last), map(int, part.shape)))


def _covered(path: Path, name: str, space: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the entries start..stop of the first axis that one source of a dataset fills."""
    first, last = space.get_select_bounds()
    sizes = [end - start + 1 for start, end in zip(first, last, strict=True)]
    whole = math.prod(sizes) == space.get_select_npoints() and sizes[1:] == list(shape[1:])
    if not whole or last[0] >= shape[0]:
        raise ShardError(f"{path}: {name} is a virtual dataset of parts that are no whole rows")
    return int(first[0]), int(last[0]) + 1


def _require_inside(path: Path, home: Path, filename: str, what: str) -> Path:
    """Return the file that a link names, which must be a file in the directory of the shard."""
    target = home / filename
    if Path(os.path.realpath(target)).parent != Path(os.path.realpath(home)):
        raise ShardError(f"{path}: {what} {filename!r}, which is not directly in {home}")
    require_regular(target)
    return target


def _external_name(properties: h5py.h5p.PropDCID) -> str:
    name: bytes = properties.get_external(0)[0]
    return os.fsdecode(name)
