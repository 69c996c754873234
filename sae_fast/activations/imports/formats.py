"""The files of a directory that are to be converted, their order, and their readers."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path

from sae_fast.activations.errors import ShardError, one_line
from sae_fast.activations.files import IMPORTED_SUFFIXES, SUFFIXES, natural_key
from sae_fast.activations.imports.arrays import Opener, short
from sae_fast.activations.imports.arrow_files import open_arrow, open_parquet
from sae_fast.activations.imports.numpy_files import open_npy, open_npz
from sae_fast.activations.imports.tensor_files import open_safetensors, open_torch
from sae_fast.activations.imports.zarr_files import ZARR_SUFFIX, open_zarr
from sae_fast.activations.remote import local_place
from sae_fast.json_files import parse_json, read_regular

OPENERS: dict[str, Opener] = {
    ".pt": open_torch,
    ".pth": open_torch,
    ".npy": open_npy,
    ".npz": open_npz,
    ".safetensors": open_safetensors,
    ".arrow": open_arrow,
    ".parquet": open_parquet,
    ZARR_SUFFIX: open_zarr,
}
DATASET_STATE = "state.json"  # of a dataset that `datasets` saved; names its files in order


def opener_of(path: Path) -> Opener:
    """Return the reader of a file, by its name."""
    return OPENERS[path.suffix.lower()]


def find_files(source: str | Path) -> list[Path]:
    """Find the files of a directory or a glob pattern, or one file, sorted by their numbers.

    What has an address of fsspec is copied, and the copy is read. A folder of zarr is one file.

    Raises ShardError where there are none, or several formats.
    """
    place = local_place(source)
    if place.suffix.lower() == ZARR_SUFFIX and place.is_dir():
        candidates = [place]
    elif place.is_dir():
        candidates = [path for path in place.iterdir() if not path.name.startswith(".")]
        if any(path.name == DATASET_STATE for path in candidates):
            return _dataset_files(place)
    elif place.is_file():
        candidates = [place]
    else:
        candidates = [Path(name) for name in glob.glob(str(source))]
        if not candidates:
            raise ShardError(f"{source}: no such file or directory, and no file matches it")
    files = [path for path in candidates if path.suffix.lower() in OPENERS and _is_source(path)]
    if not files:
        raise ShardError(f"{source}: {_what_instead(place, candidates)}")
    kinds = Counter(OPENERS[path.suffix.lower()] for path in files)
    if len(kinds) > 1:
        counts = Counter(path.suffix for path in files)
        there = " and ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        raise ShardError(
            f"{source}: holds {there} files; convert one kind at a time, as in '{source}/*.pt'"
        )
    return sorted(files, key=natural_key)


def _is_source(path: Path) -> bool:
    """Return whether a path is a file, or a folder of zarr."""
    return path.is_dir() if path.suffix.lower() == ZARR_SUFFIX else path.is_file()


def _dataset_files(directory: Path) -> list[Path]:
    """Return the files of a saved dataset, without what `datasets` may have cached there."""
    path = directory / DATASET_STATE
    try:
        state = parse_json(read_regular(path))
        files = [_file_in(directory, item["filename"]) for item in state["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        text = short(one_line(error))
        raise ShardError(f"{path}: not the state of a saved dataset: {text}") from error
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ShardError(
            f"{directory}: rows of the dataset are chosen by an index beside it; "
            "save it anew after flatten_indices()"
        )
    if not files:
        raise ShardError(f"{directory}: the dataset has no files")
    return files


def _file_in(directory: Path, name: str) -> Path:
    """Return a file of a dataset; raise ValueError unless it is one of the directory's own."""
    if name != Path(name).name or "\0" in name:
        raise ValueError(f"it names {short(repr(name))}, which is no file beside it")
    path = directory / name
    if path.suffix.lower() not in OPENERS or (path.exists() and not path.is_file()):
        raise ValueError(f"it names {short(repr(name))}, which is no file of activations")
    return path


def _what_instead(place: Path, candidates: list[Path]) -> str:
    """Say why nothing can be converted, by what there is."""
    if any(path.suffix in SUFFIXES for path in candidates):
        return f"HDF5 files are shards already: python -m sae_fast.train --shard-dir {place}"
    expected = f"no {', '.join(IMPORTED_SUFFIXES)} file"
    if place.is_file():
        return f"is {expected}"
    folders = [path for path in candidates if path.is_dir()]
    nested = [f for f in sorted(folders) if any(p.suffix in OPENERS for p in f.iterdir())]
    if nested:
        return f"{expected} there, but in {', '.join(map(str, nested[:3]))}"
    return f"{expected} there" + ("" if candidates else ", the directory is empty")
