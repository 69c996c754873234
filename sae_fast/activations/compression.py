"""Compression of rows on disk: the filters that shards are written with, and reading them back.

gzip is in every HDF5. Zstandard and Blosc2 are filters of hdf5plugin, the extra `compression`,
which is imported when a shard that has one is written or read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_fast.activations.errors import ShardError

if TYPE_CHECKING:
    import h5py

COMPRESSIONS = ("none", "gzip", "zstd", "blosc2")
INSTALL = "pip install 'sae_fast[compression]'"


def dataset_options(compression: str | None) -> dict[str, Any]:
    """Return the options of h5py's create_dataset for a compression; None means "none".

    Bytes are shuffled before all of them: the first bytes of a chunk's numbers, then the second
    ones. Shuffling bits, which suits counts, costs a tenth of the ratio on activations: mantissas
    are noise, and a byte of sign and exponent says more than its bits apart. Higher levels than 1
    take longer to write and gain nothing. benchmarks/compression.py has the measurements. Raises
    ValueError for an unknown name, or where hdf5plugin is missing.
    """
    if compression in (None, "none"):
        return {}
    if compression not in COMPRESSIONS:
        raise ValueError(
            f"compression must be one of {', '.join(COMPRESSIONS)}, got {compression!r}"
        )
    if compression == "gzip":
        return {"compression": "gzip", "shuffle": True}
    try:
        import hdf5plugin
    except ImportError:
        raise ValueError(f"compression {compression!r} needs hdf5plugin: {INSTALL}") from None
    if compression == "zstd":
        return {"compression": hdf5plugin.Zstd(clevel=1), "shuffle": True}
    shuffled = hdf5plugin.Blosc2(cname="zstd", clevel=1, filters=hdf5plugin.Blosc2.SHUFFLE)
    return {"compression": shuffled}  # shuffles in blocks by itself


def require_filters(path: Path, dataset: h5py.Dataset) -> None:
    """Make the filters of a dataset known to HDF5; raise ShardError where one is missing."""
    from h5py import h5z

    properties = dataset.id.get_create_plist()
    for number in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(number)
        if h5z.filter_avail(code):
            continue
        what = f"{path}: {dataset.name[1:]} is compressed with {_filter_name(code, name)}"
        try:
            import hdf5plugin  # noqa: F401  # registers its filters
        except ImportError:
            raise ShardError(f"{what}, which needs hdf5plugin: {INSTALL}") from None
        if not h5z.filter_avail(code):
            raise ShardError(f"{what}, which neither HDF5 nor hdf5plugin has")


def _filter_name(code: int, name: bytes) -> str:
    return f"{name.decode(errors='replace').split(';')[0]!r} (HDF5 filter {code})"
