"""Text files that stand for links to a directory, where the file system makes no symbolic links."""

from __future__ import annotations

import re
from pathlib import Path

_LONGEST_NAME = 64  # bytes


def followed(path: str | Path) -> Path:
    """Return the directory that a text file at `path` names, which lies beside it; else `path`."""
    path = Path(path)
    if not path.is_file():
        return path
    try:
        with path.open("rb") as file:
            name = file.read(_LONGEST_NAME + 1).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return path
    is_name = len(name) <= _LONGEST_NAME and re.fullmatch(r"\w[\w.-]*", name)
    target = path.parent / name
    return target if is_name and target.is_dir() else path
