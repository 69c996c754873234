"""Names of directories or files in plots and tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def distinct_names(places: Sequence[Path], kind: str) -> list[str]:
    """Return names that tell paths apart: the paths without the part that they share.

    Args:
        places: the paths, one or more.
        kind: the plural of what lies there, for the error.

    Raises:
        ValueError: where two of them are one place, naming both.
    """
    resolved = [place.resolve() for place in places]
    first: dict[Path, Path] = {}
    for place, path in zip(places, resolved, strict=True):
        if path in first:
            raise ValueError(f"{kind} must be different ones: {first[path]} and {place} are {path}")
        first[path] = place
    shared = os.path.commonpath([path.parent for path in resolved])
    return [path.relative_to(shared).as_posix() for path in resolved]
