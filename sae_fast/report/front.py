"""Draw runs as points over L0 and FVU, the front that they reach: how sparse, and how exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_fast.report.plot import WIDE_SPAN, make_logarithmic, save_figure

# One column of a paper with two: letters stay readable where the figure is printed at this width.
_SIZE = (3.4, 2.7)  # inches
_LETTER = 8  # points
_DOTS_PER_INCH = 300
# The colours of Okabe and Ito, which readers without red or green receptors tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")


@dataclass(frozen=True)
class Point:
    """A run in the plot.

    Attributes:
        series: the name of the points that share a colour: the architecture.
        l0: active latents per token on held-out rows.
        fvu: fraction of variance unexplained on held-out rows.
    """

    series: str
    l0: float
    fvu: float


def front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other one surpasses, by L0.

    A point surpasses another if neither its L0 nor its FVU is larger and one of them is smaller.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.l0, point.fvu)):
        if not best or point.fvu < best[-1].fvu:
            best.append(point)
    return best


def draw_front(points: Sequence[Point], path: Path, title: str) -> Path:
    """Draw one point a run, and a line through the front of each series.

    An axis is logarithmic where its values span a factor of 3 or more.

    Args:
        points: the runs, one or more.
        path: the file to write, its name says of which kind; its directory is made.
        title: the line above the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DOTS_PER_INCH)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, series in enumerate(sorted({point.series for point in points})):
        members = [point for point in points if point.series == series]
        _draw_series(axes, series, members, number)
    _scale(axes, "x", [point.l0 for point in points])
    _scale(axes, "y", [point.fvu for point in points])
    axes.set_xlabel("L0", fontsize=_LETTER)
    axes.set_ylabel("held-out FVU", fontsize=_LETTER)
    axes.set_title(title, fontsize=_LETTER, parse_math=False, wrap=True)
    axes.tick_params(labelsize=_LETTER)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(fontsize=_LETTER, framealpha=0.8, edgecolor="none")
    save_figure(figure, path, _DOTS_PER_INCH)
    return path


def _draw_series(axes: Any, name: str, points: Sequence[Point], number: int) -> None:
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1}
    line = front(points)
    axes.plot([point.l0 for point in line], [point.fvu for point in line], label=name, **style)
    rest = [point for point in points if point not in line]
    style |= {"linestyle": "none", "markerfacecolor": "none"}
    axes.plot([point.l0 for point in rest], [point.fvu for point in rest], **style)


def _scale(axes: Any, which: str, values: Sequence[float]) -> None:
    least, most = min(values), max(values)
    if least > 0 and most / least >= WIDE_SPAN:
        make_logarithmic(axes, which, most / least)
