"""Draw how much dictionaries have in common: a heatmap a figure, and the matched cosines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sae_fast.evaluation.comparison import Comparison
from sae_fast.report.plot import save_figure

_DOTS_PER_INCH = 110
_WRITTEN = 12  # dictionaries up to which each cell has its number
_LEAST_CELL = 0.55  # inches
_LEAST_PANEL = 3.4
_BINS = 60
_LEGEND = 10  # pairs up to which each has a curve of its own colour and name
_LONGEST_NAME = 24


def draw_overlap(comparison: Comparison, path: Path) -> Path:
    """Draw PW-MCC and shared latents of all pairs as heatmaps, and the matched cosines.

    The rows of a heatmap of shared latents are the dictionaries whose latents are counted.

    Args:
        comparison: of two dictionaries or more.
        path: the file to write, its name says of which kind; its directory is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [_shortened(name) for name in comparison.names]
    matrices = [("PW-MCC: mean matched cosine", comparison.matrix())]
    for threshold in comparison.thresholds:
        title = f"Latents of the row shared at {threshold:g}"
        matrices.append((title, comparison.matrix(threshold)))
    side = max(_LEAST_PANEL, _LEAST_CELL * len(names) + 1.5)
    n_panels = len(matrices) + 1
    n_columns = 2 if n_panels == 4 else min(n_panels, 3)
    n_rows = -(-n_panels // n_columns)
    size = (n_columns * (side + 0.8), n_rows * side)
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    cells = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axes, (title, matrix) in zip(cells, matrices, strict=False):
        _draw_matrix(figure, axes, names, matrix, title)
    _draw_cosines(cells[len(matrices)], comparison)
    for axes in cells[n_panels:]:
        axes.set_axis_off()
    save_figure(figure, path, _DOTS_PER_INCH)
    return path


def _draw_matrix(figure: Any, axes: Any, names: list[str], matrix: Tensor, title: str) -> None:
    image = axes.imshow(matrix.numpy(), vmin=min(0.0, float(matrix.min())), vmax=1, cmap="viridis")
    axes.set_title(title, fontsize=11)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=9)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a name may hold a $
    figure.colorbar(image, ax=axes, shrink=0.8)
    if len(names) > _WRITTEN:
        return
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            if row != column:
                colour = "black" if value > 0.6 else "white"
                style = {"ha": "center", "va": "center", "fontsize": 9}
                axes.text(column, row, f"{value:.2f}", color=colour, **style)


def _draw_cosines(axes: Any, comparison: Comparison) -> None:
    """Draw the share of matched pairs over their cosine, a curve for each two dictionaries."""
    pairs = comparison.pairs
    is_named = len(pairs) <= _LEGEND
    for number, pair in enumerate(pairs):
        cosines = pair.matching.cosines.numpy()
        label = f"{_shortened(pair.a)}, {_shortened(pair.b)}" if is_named else None
        style: dict[str, Any] = {"color": f"C{number}" if is_named else "C0", "linewidth": 1.3}
        if not is_named:
            style["alpha"] = 0.4
        weights = [1 / len(cosines)] * len(cosines)
        span = (min(0.0, float(cosines.min())), 1.0)
        axes.hist(
            cosines, _BINS, range=span, weights=weights, histtype="step", label=label, **style
        )
    for threshold in comparison.thresholds:
        axes.axvline(threshold, color="grey", linestyle=":", linewidth=1)
    axes.set_title("Cosines of the matched pairs", fontsize=11)
    axes.set_xlabel("cosine", fontsize=10)
    axes.set_ylabel("share of the pairs", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    if is_named:
        legend = axes.legend(fontsize=8, frameon=False, loc="best")
        for text in legend.get_texts():
            text.set_parse_math(False)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
