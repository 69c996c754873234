"""The picture that all tasks have: each score of each architecture, a dot for every seed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_fast.ground_truth.results import Results
from sae_fast.report.plot import save_figure

DOTS_PER_INCH = 110
_PANEL = (3.6, 2.9)  # inches
_COLUMNS = 4


def new_figure(n_rows: int, n_columns: int, panel: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Return a figure, without pyplot, and its axes row by row.

    Args:
        n_rows: rows of panels.
        n_columns: columns of panels.
        panel: width and height of a panel in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (n_columns * panel[0], n_rows * panel[1])
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(n_rows, n_columns, squeeze=False).flat)


def finish(figure: Any, title: str, path: Path) -> Path:
    """Write a figure with a title over its panels; return the file."""
    figure.suptitle(title, fontsize=12, parse_math=False)
    save_figure(figure, path, DOTS_PER_INCH)
    return path


def draw_scores(results: Results, path: Path) -> Path:
    """Draw a panel for each score: a dot for every seed, a line at the mean.

    Args:
        results: with an entry or more.
        path: the file to write.
    """
    scores = [score for score in results.scores if _any_value(results, score.name)]
    n_columns = min(_COLUMNS, len(scores))
    n_rows = -(-len(scores) // n_columns)
    figure, cells = new_figure(n_rows, n_columns, _PANEL)
    names = results.architectures
    for axes, score in zip(cells, scores, strict=False):
        draw_dots(axes, names, functools.partial(results.values, score=score.name))
        axes.set_title(score.heading, fontsize=11)
        if score.is_share:
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    for axes in cells[len(scores) :]:
        axes.set_axis_off()
    return finish(figure, f"{results.task.title} (a dot for each seed, a line at the mean)", path)


def draw_dots(axes: Any, names: list[str], values: Callable[[str], list[float]]) -> None:
    """Draw the values of each name over its place, and their mean as a line."""
    for place, name in enumerate(names):
        own = values(name)
        if own:
            colour = f"C{place}"
            axes.plot([place] * len(own), own, "o", color=colour, markersize=4, alpha=0.6)
            mean = sum(own) / len(own)
            axes.plot([place - 0.3, place + 0.3], [mean, mean], "-", color=colour, linewidth=2)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)


def _any_value(results: Results, score: str) -> bool:
    return any(results.values(arch, score) for arch in results.architectures)
