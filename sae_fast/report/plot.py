"""Draw the metrics of runs into an image, one panel a quantity; panels.py lists the panels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_fast.atomic_files import replacing
from sae_fast.report.panels import HELD_OUT, TARGET, Curve, Panel, Row, overview

_PANEL = (4.2, 3.1)  # inches
_PADDING = 0.08
_LEAST_WIDTH = 6.5  # for the title
_COLUMNS = {4: 2, 5: 3, 6: 3, 9: 3}  # by number of panels, 4 for other than these: few are empty
_DOTS_PER_INCH = 110
_TITLE_LETTER, _NAME_LETTER = 0.11, 0.09  # inches
_NAME_LENGTH = 60
_STYLES = ("-", "--", ":", "-.")  # curves may lie on each other
_LEGEND: dict[str, dict[str, Any]] = {  # of several runs
    HELD_OUT: {"linestyle": "--", "marker": "o", "markersize": 3.5},
    TARGET: {"linestyle": "-.", "linewidth": 1},
}
WIDE_SPAN = 3.0  # from here on a logarithmic axis has two labels or more, see make_logarithmic
_LEAST_SHARE = 0.01  # the end of the axis where all are smaller
_LEAST_R2 = -1.0  # it starts far below 0, where nothing is to be seen


def plot_run(rows: list[Row], path: Path, title: str) -> Path:
    """Draw the metrics of a run over its steps into a PNG, without the terms of the loss.

    Args:
        rows: the rows of metrics.jsonl.
        path: the file to write; its directory is made.
        title: the line above the panels.
    """
    return draw({"": rows}, overview(rows), path, title)


def draw(
    runs: Mapping[str, Sequence[Row]], panels: Sequence[Panel], path: Path, title: str
) -> Path:
    """Draw panels of one run over its steps, or of several in one panel over their tokens.

    Args:
        runs: rows of metrics.jsonl by the name of the run.
        panels: what to draw.
        path: the file to write, its name says of which kind; its directory is made.
        title: the line above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_columns = _COLUMNS.get(len(panels), min(len(panels), 4))
    n_rows = -(-len(panels) // n_columns)
    width = max(n_columns * _PANEL[0], _LEAST_WIDTH)
    figure = Figure(figsize=(width, n_rows * _PANEL[1]), dpi=_DOTS_PER_INCH)
    figure.set_layout_engine("constrained", w_pad=_PADDING, h_pad=_PADDING)
    FigureCanvasAgg(figure)  # no pyplot: a notebook's own figures and backend stay as they are
    colours = _colours(len(runs))
    cells = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    labels: set[str] = set()
    for axes, panel in zip(cells, panels, strict=False):
        labels |= _draw_panel(axes, panel, list(runs.values()), colours)
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    if len(runs) > 1:
        _name_runs(figure, width, list(runs), colours, labels)
    lines = textwrap.fill(title, int(width / _TITLE_LETTER))
    figure.suptitle(lines, fontsize=13, parse_math=False)  # a name may hold a $
    save_figure(figure, path, _DOTS_PER_INCH)
    return path


def save_figure(figure: Any, path: Path, dots_per_inch: int) -> None:
    """Write the image whole or not at all: a viewer may read it while the run continues.

    Args:
        figure: of matplotlib.
        path: the file, its name says of which kind; its directory is made.
        dots_per_inch: the resolution, of a PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dots_per_inch, format=path.suffix[1:])


def _draw_panel(
    axes: Any, panel: Panel, runs: Sequence[Sequence[Row]], colours: Sequence[Any]
) -> set[str]:
    """Draw one panel; return the labels of the curves in it."""
    from matplotlib.ticker import MaxNLocator

    single = len(runs) == 1
    axis = "step" if single else "tokens"
    drawn: dict[str, None] = {}
    places: list[float] = [0.0]
    values: list[float] = []
    for run, rows in enumerate(runs):
        for number, curve in enumerate(_shown(panel, single=single)):
            x, y = _series(rows, axis, curve.metric)
            is_off = panel.main.endswith("_loss") and not any(y)  # a term of another run
            if y and not is_off:
                colour = f"C{number}" if single else colours[run]
                _draw_curve(axes, curve, x, y, _STYLES[number], colour)
                drawn[curve.label] = None
                places += x
                values += y
    axes.set_title(panel.title, fontsize=12)
    axes.set_xlabel(axis, fontsize=10)
    axes.tick_params(labelsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(_plain(max(places)))
    axes.grid(alpha=0.3)
    _scale(axes, panel, values)
    if single and len(drawn) > 1:
        axes.legend(fontsize=10, framealpha=0.8, edgecolor="none")
    return set(drawn)


def _draw_curve(
    axes: Any, curve: Curve, x: list[float], y: list[float], style: str, colour: Any
) -> None:
    if curve.label == TARGET:  # one value, also where a run has logged one row
        axes.axhline(y[-1], linestyle="-.", color=colour, linewidth=1, label=curve.label)
        return
    marker = "o" if curve.label.startswith(HELD_OUT) or len(y) == 1 else None
    options = {"label": curve.label, "marker": marker, "markersize": 3.5, "linewidth": 1.4}
    axes.plot(x, y, style, color=colour, **options)


def _shown(panel: Panel, *, single: bool) -> Sequence[Curve]:
    """Return the curves of a panel; of several runs only those that they are compared by."""
    if single:
        return panel.curves
    compared = (HELD_OUT, TARGET)
    return [
        curve for curve in panel.curves if curve.metric == panel.main or curve.label in compared
    ]


def _series(rows: Sequence[Row], axis: str, name: str) -> tuple[list[float], list[float]]:
    found = [(row[axis], row.get(name)) for row in rows]
    points = [(x, y) for x, y in found if y is not None and math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def _scale(axes: Any, panel: Panel, values: Sequence[float]) -> None:
    """Choose the axis of the values: from 0 on, or logarithmic where they span much."""
    if not values:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="grey")
        return
    least, most = min(values), max(values)
    if panel.is_wide and least > 0 and most / least >= WIDE_SPAN:
        make_logarithmic(axes, "y", most / least)
        return
    if panel.main.endswith("_r2"):
        least = max(least, _LEAST_R2)
    top = 1.08 * most if most > 0 else 0.0
    if panel.is_share:
        top = 1.03 if panel.is_accuracy else max(top, _LEAST_SHARE)
    axes.set_ylim(min(0.0, 1.08 * least), top if top > least else 1.0)
    axes.yaxis.set_major_formatter(_formatter(panel, most))


def _formatter(panel: Panel, most: float) -> Any:
    """Return what writes the numbers at an axis: percentages, or plain numbers."""
    from matplotlib.ticker import FuncFormatter

    if panel.is_share:
        return FuncFormatter(lambda value, _: f"{100 * value:g} %")
    return _plain(most)


def _plain(most: float) -> Any:
    """Return what writes numbers up to `most`, large ones in thousands or millions."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    return EngFormatter(sep="") if most >= 1e4 else FuncFormatter(lambda value, _: f"{value:g}")


def make_logarithmic(axes: Any, which: str, span: float) -> None:
    """Make an axis logarithmic, its labels plain numbers, also within one decade.

    Args:
        axes: of matplotlib.
        which: "x" or "y".
        span: the largest value divided by the smallest.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = math.log10(span)
    parts = (1, 1.5, 2, 3, 5, 7) if decades < 1.2 else (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=parts))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _colours(count: int) -> list[Any]:
    """Return as many colours as there are runs."""
    from matplotlib import colormaps

    if count <= 10:
        return [f"C{number}" for number in range(count)]
    return [colormaps["turbo"](number / (count - 1)) for number in range(count)]


def _name_runs(
    figure: Any, width: float, names: Sequence[str], colours: Sequence[Any], curves: Container[str]
) -> None:
    """Draw one legend below all panels, in as many columns as there is room for.

    It names the runs by their colours, and held-out values and targets where `curves` has them.
    """
    from matplotlib.lines import Line2D

    labels = [_shortened(name, _NAME_LENGTH) for name in names]
    lines: list[Any] = [Line2D([], [], color=colour) for colour in colours]
    for label, style in _LEGEND.items():
        if label in curves:
            lines.append(Line2D([], [], color="grey", **style))
            labels.append(label)
    longest = max(map(len, labels))
    n_columns = max(1, min(len(labels), int(width / (0.7 + _NAME_LETTER * longest))))
    place = {"loc": "outside lower center", "ncols": n_columns}
    legend = figure.legend(lines, labels, fontsize=11, frameon=False, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"
