"""Refuse files that are too large for the repository: `python tools/large_files.py FILE...`."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 500_000  # bytes
SHIPPED = Path("examples/activations")  # the demo's activations, which are larger than LIMIT


def too_large(names: list[str]) -> list[str]:
    """Return the files outside SHIPPED that are larger than LIMIT, each with its size in kB."""
    found = []
    for path in map(Path, names):
        if path.is_file() and SHIPPED not in path.parents and path.stat().st_size > LIMIT:
            found.append(f"{path}: {path.stat().st_size // 1000} kB")
    return found


if __name__ == "__main__":
    problems = too_large(sys.argv[1:])
    for problem in problems:
        print(f"error: {problem}, and a file of the repository has at most {LIMIT // 1000} kB")
    sys.exit(1 if problems else 0)
