"""`progress_bar`: the progress bars of the commands and of notebooks, which need no thread."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from tqdm import tqdm

_NOTEBOOK_COLUMNS = 100  # of a bar of text, where no terminal has a width


class _Bar(tqdm):  # type: ignore[misc]
    # tqdm's thread redraws bars that stand still. Its start waits for ever if the thread gets no
    # memory to begin.
    monitor_interval = 0


def in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this process and shows what it writes in a notebook."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def progress_bar(*, total: int, unit: str, shown: bool = True, **options: Any) -> tqdm:
    """Return a tqdm bar: on stderr where that is a terminal, or in the notebook that runs this.

    Elsewhere it is disabled. A notebook has a bar of ipywidgets, or of text where these are not
    installed.

    Args:
        total: steps, rows or tokens at the end.
        unit: what is counted, in the singular.
        shown: False disables the bar in any case.
        options: others of tqdm's.
    """
    # With miniters=1 the bar looks at the clock in every update, as it has no thread that does.
    options = {"total": total, "unit": unit, "miniters": 1, **options}
    if shown and in_notebook():
        if importlib.util.find_spec("ipywidgets") is not None:
            return _widget_bar(options)
        return _Bar(ncols=_NOTEBOOK_COLUMNS, **options)
    return _Bar(disable=not shown or not sys.stderr.isatty(), dynamic_ncols=True, **options)


def _widget_bar(options: dict[str, Any]) -> tqdm:
    from tqdm.notebook import tqdm as notebook_tqdm

    class WidgetBar(notebook_tqdm):  # type: ignore[misc]
        monitor_interval = 0

    return WidgetBar(**options)
