"""manifest.json: what the shards of a directory should be, so that a wrong one is noticed.

A directory may lack it: files of other tools need none. Where there is one it must name every
shard beside it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_fast.activations.errors import ShardError, one_line, shortened
from sae_fast.activations.files import shards_in
from sae_fast.activations.shard import DEFAULT_KEY, Shard, inspect_shard
from sae_fast.atomic_files import write_json
from sae_fast.json_files import parse_json, read_regular

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
HASH_READ_BYTES = 1 << 20
LONGEST_NAME = 255  # characters of a file's name
MAX_MANIFEST_BYTES = 64 << 20  # some 400,000 shards


@dataclass(frozen=True)
class ManifestEntry:
    """One shard as it was when the manifest was written."""

    file: str
    rows: int
    bytes: int
    sha256: str  # of the file


Manifest = dict[str, ManifestEntry]  # by file name


def write_manifest(directory: str | Path, key: str = DEFAULT_KEY) -> None:
    """Write the manifest of all shards in `directory`, training and held-out."""
    folder = Path(directory)
    entries = []
    for path in shards_in(folder):
        shard = inspect_shard(path, key)
        entries.append(ManifestEntry(path.name, shard.rows, shard.file_bytes, file_sha256(path)))
    content = {"format_version": MANIFEST_VERSION, "shards": [asdict(entry) for entry in entries]}
    write_json(folder / MANIFEST_NAME, content)


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest of a directory; None: it has none."""
    path = directory / MANIFEST_NAME
    if not os.path.lexists(path):  # a link to nothing is a manifest that is lost
        return None
    try:
        content = parse_json(read_regular(path, MAX_MANIFEST_BYTES))
        version = content["format_version"]
        entries = [_entry(item) for item in content["shards"]]
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {one_line(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: not a manifest: {one_line(error)}") from error
    if version != MANIFEST_VERSION:
        raise ShardError(f"{path}: format version {version}, this release reads {MANIFEST_VERSION}")
    return {entry.file: entry for entry in entries}


def check_listing(directory: Path, manifest: Manifest) -> None:
    """Raise if the directory holds other shards than its manifest names."""
    present = {path.name for path in shards_in(directory)}
    for name in sorted(manifest):
        if name not in present:
            shown = shortened(repr(name)[1:-1], LONGEST_NAME)
            raise ShardError(f"{directory / shown}: in {MANIFEST_NAME}, but missing")
    for name in sorted(present - set(manifest)):
        raise ShardError(
            f"{directory / name}: not in {MANIFEST_NAME}; remove the file, or let "
            "sae_fast.activations.write_manifest write the manifest anew"
        )


def check_entry(shard: Shard, manifest: Manifest) -> None:
    """Raise if a shard's size or row count is not what its manifest says."""
    entry = manifest[shard.path.name]
    for what, expected, actual in (
        ("bytes", entry.bytes, shard.file_bytes),
        ("rows", entry.rows, shard.rows),
    ):
        if expected != actual:
            raise ShardError(
                f"{shard.path}: {MANIFEST_NAME} says {expected} {what}, the file has {actual}"
            )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASH_READ_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {one_line(error)}") from error
    return digest.hexdigest()


def _entry(item: Any) -> ManifestEntry:
    entry = ManifestEntry(**item)
    for name, kind in (("file", str), ("rows", int), ("bytes", int), ("sha256", str)):
        if not isinstance(getattr(entry, name), kind):
            raise TypeError(f"{name} of shard {entry.file!r} is {getattr(entry, name)!r}")
    return entry
