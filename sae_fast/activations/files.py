"""The files of a directory that are shards, and the held-out ones among them."""

from __future__ import annotations

import glob
import logging
import os
import re
import stat
from fnmatch import fnmatch
from pathlib import Path

from sae_fast.activations.errors import ShardError, listed, one_line
from sae_fast.activations.remote import address_of, local_place

logger = logging.getLogger(__name__)

SUFFIXES = (".h5", ".hdf5")
# Files of tensors that are read in place.
TENSOR_SUFFIXES = (".pt", ".pth", ".npy", ".safetensors")
# Files that sae_fast.convert_shards turns into shards.
IMPORTED_SUFFIXES = (
    *(".pt", ".pth", ".npy", ".npz", ".safetensors", ".arrow", ".parquet"),
    ".zarr",
)
HELDOUT_PATTERN = "heldout*"
MODEL_CONFIG = "config.json"  # beside the tensors of a model, which are no activations
SHOWN_FOLDERS = 10


def require_regular(path: Path) -> os.stat_result:
    """Return the status of a file; raise ShardError for what cannot be read like one.

    Opening a pipe waits for its other end, a device may never end, and HDF5 and the records of a
    run cannot name a path that is not UTF-8.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        what = "a link to nothing" if path.is_symlink() else "no such file"
        raise ShardError(f"{path}: {what}") from error
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be opened: {one_line(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, device or socket"
        raise ShardError(f"{path}: cannot be opened: it is {kind}, not a file")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ShardError(f"{os.fsencode(path)!r}: the path is not UTF-8, rename it") from error
    return status


def find_shards(
    shard_dir: str | Path, heldout: str | Path | None = None, *, for_training: bool = True
) -> tuple[list[Path], list[Path]]:
    """Return training and held-out shards, sorted by path, or by the numbers in it.

    `shard_dir` is a directory, or one file, also with an address of fsspec such as s3://, for which
    its copy on this machine is returned. A directory without HDF5 files may hold files of
    tensors instead, of one format, which are sorted by the numbers in their names. Held-out shards
    are its files named heldout*; where `heldout` is given, a directory or a glob pattern, they are
    its files instead. None of them is ever trained on. Where there are no shards, but files that
    can be converted, the error names the command that does it. Held-out shards alone are refused
    `for_training`.
    """
    directory = local_place(shard_dir)
    if directory.is_dir():
        if shards := shards_in(directory):
            warn_of_unread(directory, "it holds HDF5 shards")
        else:
            shards = tensor_files_in(directory)
        if not shards:
            _name_conversion(directory, list(directory.iterdir()))
    elif directory.is_file():
        if directory.suffix.lower() not in TENSOR_SUFFIXES:
            _name_conversion(directory, [directory])
        shards = [directory]
    else:
        raise ShardError(f"{directory}: no such directory or file of activation shards")
    reserved = [path for path in shards if fnmatch(path.name, HELDOUT_PATTERN)]
    held = reserved if heldout is None else _matching(str(heldout))
    # realpath, as Path.resolve raises RuntimeError where links lead in a circle.
    excluded = {os.path.realpath(path) for path in [*reserved, *held]}
    train = [path for path in shards if os.path.realpath(path) not in excluded]
    if not train and (for_training or not held):
        aside = f" besides {len(shards)} held-out ones" if shards else ""
        inside = [folder.name for folder in folders_of_shards(directory)]
        hint = f"; there are some in {listed(inside, SHOWN_FOLDERS)}: name one of these"
        hint = hint if inside else ""
        kinds = ", ".join(f"*{suffix}" for suffix in (*SUFFIXES, *TENSOR_SUFFIXES))
        raise ShardError(f"{directory}: no shards to train on ({kinds}){aside}{hint}")
    return train, held


def shards_in(directory: Path) -> list[Path]:
    """Return the files of a directory that are shards by their names, sorted."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def tensor_files_in(directory: Path) -> list[Path]:
    """Return the files of tensors of a directory in the order of their numbers.

    .pt and .pth are one format.
    """
    files = _tensor_files(directory)
    suffixes = {path.suffix.lower().replace(".pth", ".pt") for path in files}
    if len(suffixes) > 1:
        raise ShardError(f"{directory}: holds {' and '.join(sorted(suffixes))} files, not one kind")
    return sorted(files, key=natural_key)


def warn_of_unread(directory: Path, reason: str) -> None:
    """Warn of files of tensors that are not read, because the directory holds something else."""
    if unread := _tensor_files(directory):
        names = listed([path.name for path in unread], SHOWN_FOLDERS)
        logger.warning("%s: %s not read, because %s", directory, names, reason)


def _tensor_files(directory: Path) -> list[Path]:
    return [
        path
        for path in directory.iterdir()
        if path.suffix.lower() in TENSOR_SUFFIXES and not path.name.startswith(".")
    ]


def natural_key(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sort numbers in names by their value: acts_2 comes before acts_10."""
    parts = re.findall(r"\d+|\D+", path.name)
    key = [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
    return key, str(path)


def _name_conversion(place: Path, files: list[Path]) -> None:
    """Raise, with the command that makes shards of them, where files are of another format."""
    others = sorted({file.suffix for file in files if file.suffix.lower() in IMPORTED_SUFFIXES})
    if others:
        target = f"{place.with_suffix('') if place.is_file() else place.resolve()}_shards"
        raise ShardError(
            f"{place}: {', '.join(others)} files are no shards; this makes shards of them: "
            f"python -m sae_fast.convert_shards {place} {target}"
        )


def folders_of_shards(directory: Path) -> list[Path]:
    """Return the folders in a directory that hold shards, one a hook point in a capture, sorted.

    Where none holds HDF5 files, folders with files of tensors are folders of shards.
    """
    of_shards, of_tensors = _folders_by_kind(directory)
    return of_shards or of_tensors


def require_one_kind(directory: Path) -> None:
    """Raise ShardError where some folders hold HDF5 shards and others files of tensors."""
    of_shards, of_tensors = _folders_by_kind(directory)
    if of_shards and of_tensors:
        names = listed([path.name for path in of_tensors], SHOWN_FOLDERS)
        others = listed([path.name for path in of_shards], SHOWN_FOLDERS)
        raise ShardError(
            f"{directory}: {names} with files of tensors beside {others} with HDF5 shards, not "
            "one kind: move them apart, or name one folder"
        )


def _folders_by_kind(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders with HDF5 shards, and the others with files of tensors; no models."""
    if not directory.is_dir():
        return [], []
    folders = sorted(
        path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    of_shards = [path for path in folders if shards_in(path)]
    of_tensors = [
        path
        for path in folders
        if path not in of_shards and _tensor_files(path) and not (path / MODEL_CONFIG).exists()
    ]
    return of_shards, of_tensors


def _matching(heldout: str) -> list[Path]:
    """Return the shards of a directory, or the files that a glob pattern names."""
    if address_of(heldout) is not None:
        copy = local_place(heldout)
        paths = [copy] if copy.is_file() else shards_in(copy) or tensor_files_in(copy)
    elif Path(heldout).is_dir():
        paths = shards_in(Path(heldout)) or tensor_files_in(Path(heldout))
    else:
        paths = sorted(Path(name) for name in glob.glob(heldout))
    if not paths:
        raise ShardError(f"{heldout}: no held-out shards there")
    return paths
