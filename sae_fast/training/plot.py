"""A plot of a run's metrics, one panel a quantity."""

from pathlib import Path
from typing import Any

from sae_fast.training.metrics import Row

_PANELS: tuple[tuple[str, bool, tuple[tuple[str, str], ...]], ...] = (
    # title, logarithmic axis, (metric, label) ...
    ("Loss", True, (("loss", "total"), ("recon_loss", "reconstruction"))),
    ("Fraction of variance unexplained", True, (("fvu", "train"), ("heldout_fvu", "held out"))),
    ("L0: active latents per token", False, (("l0", "train"), ("heldout_l0", "held out"))),
    ("Dead latents", False, (("dead_fraction", "train"), ("heldout_dead_fraction", "held out"))),
    ("Learning rate", False, (("learning_rate", ""),)),
    ("Gradient norm, before clipping", True, (("grad_norm", ""),)),
)


def plot_run(rows: list[Row], path: Path, title: str) -> Path:
    """Draws the metrics of a run over its steps into a PNG.

    Args:
        rows: the rows of metrics.jsonl.
        path: the file to write; its directory is made.
        title: the line above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: a notebook's own figures and backend stay as they are
    for axes, (name, logarithmic, curves) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        series = [(label, *_series(rows, key)) for key, label in curves]
        _draw_panel(axes, name, logarithmic, series)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _draw_panel(
    axes: Any, title: str, logarithmic: bool, curves: list[tuple[str, list[int], list[float]]]
) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    values = [value for _, _, series in curves for value in series]
    for number, (label, steps, series) in enumerate(curves):
        marker = "o" if label == "held out" or len(series) == 1 else None
        style = "-" if number == 0 else "--"  # curves may lie on each other
        axes.plot(steps, series, style, label=label, marker=marker, markersize=4, linewidth=1.4)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.grid(alpha=0.3)
    if logarithmic and values and min(values) > 0:
        _make_logarithmic(axes)
    elif values:
        axes.set_ylim(bottom=0, top=1.08 * max(values) if max(values) > 0 else 1.0)
    if title == "Dead latents":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    if any(label and steps for label, steps, _ in curves):
        axes.legend(fontsize=8, frameon=False)


def _make_logarithmic(axes: Any) -> None:
    """A logarithmic axis whose labels are plain numbers, also within one decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
