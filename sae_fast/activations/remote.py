"""Files elsewhere, with an address of fsspec such as s3://bucket/folder: copies on this machine.

Shards are read at random places many times, so they are copied first, each once. The copies stay in
the cache of the user, and a file is copied again only where it has changed at its address.

    ~/.cache/sae_fast/remote/<hash of the address>/<name of the folder>/…    the files
    ~/.cache/sae_fast/remote/<hash of the address>/copied.json              what each was copied of

XDG_CACHE_HOME, where it is set, takes the place of ~/.cache.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from sae_fast.activations.errors import ShardError, one_line
from sae_fast.atomic_files import replacing, write_json
from sae_fast.json_files import parse_json, read_regular

logger = logging.getLogger(__name__)

RECORD, MANIFEST_NAME = "copied.json", "manifest.json"
DEPTH = 2  # folders of a capture, one for each hook point, and the files in them
# Files of activations and the files that say what they are.
_WANTED = re.compile(
    r"\.(h5|hdf5|pt|pth|npy|npz|safetensors|arrow|parquet)$|(^|/)(manifest|state|config)\.json$"
    r"|\.zarr/",
    re.IGNORECASE,
)
# Stores that show a file only when all of it has arrived.
_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}
# Path makes one slash of two.
_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]+):/+(?=[^/])", re.IGNORECASE)


def address_of(place: str | Path) -> str | None:
    """Return the address of a place that is elsewhere; None: it is a path on this machine."""
    text = str(place)
    if not _ADDRESS.match(text) or Path(text).exists():
        return None
    return _ADDRESS.sub(r"\1://", text)


def local_place(place: str | Path) -> Path:
    """Return a path on this machine; what has an address of fsspec is copied, see this file.

    Args:
        place: a path, which is returned as it is, or the address of a folder, of a file, or a
            pattern of files in one folder, for which their folder is returned.

    Raises:
        ShardError: in one line, where there is nothing, or it cannot be read or written.
    """
    address = address_of(place)
    return Path(place) if address is None else _copied(address)


def copy_to(folder: Path, address: str) -> int:
    """Copy a finished folder of shards to an address of fsspec; return how many files were copied.

    Every manifest.json comes behind the files that it lists, so what has one is whole. A file that
    is there with the same number of bytes is not copied again. A store such as s3 shows a file when
    all of it has arrived; on other file systems it has another name until then.

    Raises ShardError in one line, where the address cannot be written.
    """
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")),
        key=lambda path: (path.name == MANIFEST_NAME, path),
    )
    copied = 0
    with _explained(address, "written"):
        system, root = _open(address)
        for path in files:
            target = f"{root.rstrip('/')}/{path.relative_to(folder).as_posix()}"
            if system.isfile(target) and system.size(target) == path.stat().st_size:
                continue
            system.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
            if _STORES.isdisjoint(_protocols(system)):
                arriving = f"{PurePosixPath(target).parent}/.{path.name}.tmp"
                system.put_file(str(path), arriving)
                system.mv(arriving, target)
            else:
                system.put_file(str(path), target)
            copied += 1
    return copied


def forget_copies() -> None:
    """Compare the copy of an address with the original again when it is next used.

    Without this call a process looks once at each address.
    """
    _copied.cache_clear()


def check_writable(address: str) -> None:
    """Raise ShardError in one line unless an address has a protocol whose package is there."""
    if address_of(address) is None:
        raise ShardError(f"{address}: must be an address of fsspec, such as s3://bucket/folder")
    with _explained(address, "written"):
        _open(address)


@functools.lru_cache(maxsize=64)
def _copied(address: str) -> Path:
    """Copy what is at an address, once a process; return its folder or file on this machine."""
    with _explained(address):
        system, path = _open(address)
        files = _files_at(system, path)
        if not files:
            raise ShardError(f"{address}: no such folder or file of activations")
        home = _cache() / hashlib.sha256(address.encode()).hexdigest()[:32]
        home.mkdir(parents=True, exist_ok=True)
        is_file = system.isfile(path)
        name = PurePosixPath(path).parent.name if is_file or _is_pattern(path) else None
        folder = home / (name or PurePosixPath(path).name or "files")
        with _locked(home):
            _bring(system, files, folder, home / RECORD)
    return folder / PurePosixPath(path).name if is_file else folder


def _bring(system: Any, files: dict[str, str], folder: Path, record: Path) -> None:
    """Copy the files that are new or have changed, and remove copies of others.

    Args:
        system: of fsspec.
        files: where each is in the system, by its name in the folder.
        folder: to copy to.
        record: says of what each file there is a copy.
    """
    known = _read_record(record)
    now = {name: [system.size(path), str(system.ukey(path))] for name, path in files.items()}
    missing = [
        name for name in files if known.get(name) != now[name] or not (folder / name).is_file()
    ]
    needed = sum(int(now[name][0] or 0) for name in missing)
    free = shutil.disk_usage(record.parent).free
    if needed > free:
        raise ShardError(
            f"{folder}: a copy needs {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free: "
            "set XDG_CACHE_HOME to a folder on a larger disk"
        )
    if missing:
        logger.info("copying %s files, %.2f GB, to %s", len(missing), needed / 1e9, folder)
    for name in missing:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder / name) as temporary:
            system.get_file(files[name], str(temporary))
        known[name] = now[name]
        write_json(record, known)
    for name in known.keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    write_json(record, now)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_regular(path))
    except (OSError, ValueError):  # nothing was copied yet, or the record is damaged
        return {}
    return content if isinstance(content, dict) else {}


def _files_at(system: Any, path: str) -> dict[str, str]:
    """Return the files of activations at a path, by their names relative to its folder."""
    if _is_pattern(path):
        found = [str(name) for name in system.glob(path) if system.isfile(name)]
        return {PurePosixPath(name).name: name for name in found}
    if system.isfile(path):
        return {PurePosixPath(path).name: path}
    if not system.isdir(path):
        return {}
    depth = None if path.rstrip("/").endswith(".zarr") else DEPTH
    prefix = path.rstrip("/") + "/"
    found = [str(name) for name in system.find(path, maxdepth=depth)]
    wanted = (name for name in found if _WANTED.search(name))
    return {name[len(prefix) :]: name for name in wanted if name.startswith(prefix)}


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _protocols(system: Any) -> set[str]:
    """Return the protocols that a file system has, as s3 and s3a."""
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def _open(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    import fsspec

    system, path = fsspec.core.url_to_fs(address)
    return system, str(path)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sae_fast" / "remote"


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Let one process at a time copy, and the others wait for it."""
    descriptor = os.open(home / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _explained(address: str, does: str = "read") -> Iterator[None]:
    """Turn any error of a file system elsewhere into a ShardError of one line."""
    try:
        yield
    except ShardError:
        raise
    except ImportError as error:
        raise ShardError(
            f"{address}: needs the package of its file system: pip install 'sae_fast[remote]' "
            f"({one_line(error)})"
        ) from error
    except Exception as error:  # whatever the client of a store raises
        raise ShardError(f"{address}: cannot be {does}: {one_line(error)}") from error
