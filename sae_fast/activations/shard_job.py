"""`ShardJob`: the directory of a job that writes many shards and can be killed at any moment.

    DIR/<record>            says what the job is; written before the first shard
    DIR/<lock>              exists while a process writes to the directory
    DIR/**/.*.tmp           a file that was not whole at a kill; removed when the job continues
    DIR/**/manifest.json    beside the shards, written at the end

A shard appears when it is whole, see `replacing`. So the same job, started again, finds what is
done and makes the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_fast.activations.manifest import MANIFEST_NAME, write_manifest
from sae_fast.atomic_files import write_json
from sae_fast.directory_lock import FileLock
from sae_fast.json_files import parse_json, read_regular


class ShardJob:
    """The directory of one job; entered with `with` by a process that writes to it.

    Args:
        path: the directory, which is made when it is entered.
        record: name of the file that says what the job is.
        lock: name of the file that a writing process locks.
        folders: names of the folders with shards; default: the directory itself.
    """

    def __init__(self, path: Path, record: str, lock: str, folders: Sequence[str] = (".",)) -> None:
        self.path = path
        self.record = path / record
        self.folders = [path / name for name in folders]
        self._lock = FileLock(path / lock)

    def __enter__(self) -> ShardJob:
        """Make the directory and lock it; raise HeldError where another process has locked it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def read_record(self) -> Any:
        """Return what the record says; raise FileNotFoundError where the job has not begun.

        Raises OSError or ValueError where the record cannot be read.
        """
        return parse_json(read_regular(self.record))

    def names(self) -> list[str]:
        """Return the names of all files and folders in the directory but hidden ones, sorted."""
        return sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))

    def begin(self, record: Mapping[str, Any], unfinished: Sequence[str] = ("*",)) -> None:
        """Write the record unless it is there, and remove files that were not whole at a kill.

        `unfinished` are patterns of the names of shards that this process writes.
        """
        if not self.record.exists():
            write_json(self.record, record)
        for folder in self.folders:
            folder.mkdir(exist_ok=True)
            for pattern in unfinished:
                for abandoned in folder.glob(f".{pattern}.*.tmp"):
                    abandoned.unlink()

    @property
    def free_bytes(self) -> int:
        """Bytes that are free on the disk where the directory is, or will be."""
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    @property
    def is_finished(self) -> bool:
        """Whether every folder has its manifest."""
        return all((folder / MANIFEST_NAME).exists() for folder in self.folders)

    def finish(self) -> None:
        """Write the manifest of every folder."""
        for folder in self.folders:
            write_manifest(folder)
