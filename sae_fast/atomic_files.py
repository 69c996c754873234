"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success flush it to disk and rename it to `path`.

    After a failure, or a kill at any moment, whatever was at `path` before is still there. Without
    `flush`, which waits for the disk, that does not hold for a power cut.
    """
    # The leading dot and the ending keep an abandoned file from being taken for a shard.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if flush:
            _flush(temporary)
        temporary.replace(path)
        if flush:
            _flush(path.parent)  # a rename survives a power cut only then
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def reserve(path: Path, start: int, stop: int) -> None:
    """Reserve bytes start..stop of a file on the disk; raise OSError if they do not fit.

    A write into them does not fail then. Where the system has no such call, nothing is done.
    """
    if not hasattr(os, "posix_fallocate") or stop <= start:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, start, stop - start)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Write what the system holds of a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
