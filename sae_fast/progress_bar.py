"""`progress_bar`: the progress bars of the commands, which need no thread."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class _Bar(tqdm):  # type: ignore[misc]
    # tqdm's thread redraws bars that stand still. Its start waits for ever if the thread gets no
    # memory to begin.
    monitor_interval = 0


def progress_bar(*, total: int, unit: str, shown: bool = True, **options: Any) -> tqdm:
    """Return a tqdm bar on stderr; it is disabled where stderr is no terminal.

    Args:
        total: steps, rows or tokens at the end.
        unit: what is counted, in the singular.
        shown: False disables the bar in any case.
        options: others of tqdm's.
    """
    disable = not shown or not sys.stderr.isatty()
    # With miniters=1 the bar looks at the clock in every update, as it has no thread that does.
    return _Bar(total=total, unit=unit, disable=disable, dynamic_ncols=True, miniters=1, **options)
