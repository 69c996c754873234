"""Plots of any rows that a run can write, with readable axes."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from sae_fast.report.panels import loss_terms, overview
from sae_fast.report.plot import draw, plot_run
from sae_fast.training.metrics import Row

_FULL = [
    {"step": step, "tokens": 100_000 * step, "loss": 90.0 / step, "recon_loss": 80.0 / step}
    | {"fvu": 1 / step, "l0": 32.0, "dead_fraction": 0.0, "learning_rate": 1e-3, "grad_norm": 2.0}
    | {"tokens_per_second": 2e4, "probe_accuracy": 0.5}
    for step in range(1, 50)
]
_HELD_OUT: Row = {"step": 3, "tokens": 9, "heldout_fvu": 0.2, "averaged_heldout_fvu": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[], _FULL[:1], _FULL, [_HELD_OUT]])
def test_plot_is_a_readable_image(tmp_path: Path, rows: list[Row]) -> None:
    path = plot_run(rows, tmp_path / "plots" / "training.png", "a run")
    with Image.open(path) as image:
        assert image.size[0] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("rows", [_FULL[:1], _FULL, [*_FULL, _HELD_OUT]])
def test_no_text_of_a_plot_lies_on_another(
    tmp_path: Path, rows: list[Row], figures: list[Figure]
) -> None:
    later = [{**row, "tokens": 40 * row["tokens"], "mean_threshold": 0.1} for row in rows]
    both = {"a": rows, f"{'long ' * 20}name": later}
    plot_run(rows, tmp_path / "one.png", "a run")
    draw(both, [*overview(rows), *loss_terms(rows)], tmp_path / "two.png", "runs")
    for figure in figures:
        placed = []
        for axes in figure.axes:
            texts = [axes.title, axes.xaxis.label, *_tick_labels(axes)]
            placed += [text for text in texts if text.get_text()]
        placed += [*figure.texts, *figure.legends]
        boxes = [one.get_window_extent() for one in placed]
        assert len(boxes) > 50
        for number, box in enumerate(boxes):
            on_it = [
                one
                for one, other in zip(placed, boxes[:number], strict=False)
                if box.overlaps(other)
            ]
            assert on_it == [], placed[number]
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def _tick_labels(axes: Axes) -> list[Text]:
    """Return the labels within the limits of an axis."""
    found = []
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    found += [tick for tick in axes.get_xticklabels() if left <= tick.get_position()[0] <= right]
    found += [tick for tick in axes.get_yticklabels() if low <= tick.get_position()[1] <= high]
    return found


@pytest.mark.slow
def test_an_axis_is_logarithmic_where_values_span_much_and_are_above_0(
    tmp_path: Path, figures: list[Figure]
) -> None:
    plot_run(_FULL, tmp_path / "a.png", "a run")
    plot_run([*_FULL[:3], {**_FULL[3], "loss": 0.0, "fvu": -0.1}], tmp_path / "b.png", "a run")
    wide, with_zero = ([axes.get_yscale() for axes in figure.axes[:3]] for figure in figures)
    assert wide == ["log", "log", "linear"]
    assert with_zero == ["linear", "linear", "linear"]


@pytest.mark.slow
def test_every_axis_has_two_labels_or_more(tmp_path: Path, figures: list[Figure]) -> None:
    for number, span in enumerate((1.0, 1.5, 2.9, 3.1, 8.0, 60.0, 2e4)):
        rows = [{"step": step, "loss": 0.52 * span ** (step / 20)} for step in range(21)]
        plot_run(rows, tmp_path / f"{number}.png", "a run")
        axes = figures[-1].axes[0]
        low, high = axes.get_ylim()
        assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2


@pytest.mark.slow
def test_an_accuracy_is_drawn_on_an_axis_from_0_to_all(
    tmp_path: Path, figures: list[Figure]
) -> None:
    plot_run(_FULL, tmp_path / "a.png", "a run")
    (axes,) = (axes for axes in figures[0].axes if axes.get_title() == "Probe accuracy")
    low, high = axes.get_ylim()
    assert low == 0
    assert 1 < high < 1.1
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert "100 %" in labels


@pytest.mark.slow
def test_every_run_has_a_colour_of_its_own(tmp_path: Path, figures: list[Figure]) -> None:
    runs = {str(number): _FULL[:2] for number in range(14)}
    draw(runs, overview(_FULL), tmp_path / "a.png", "runs")
    colours = {str(line.get_color()) for line in figures[0].axes[1].get_lines()}
    assert len(colours) == 14


def test_a_number_that_is_not_finite_is_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [*_FULL[:3], {**_FULL[3], "loss": None}, {**_FULL[4], "loss": float("nan")}]
    plot_run(rows, tmp_path / "a.png", "a run")
    assert len(figures[0].axes[0].get_lines()[0].get_ydata()) == 3


def test_cross_entropy_is_drawn_beside_that_of_the_model_itself() -> None:
    rows: list[Row] = [{"step": 1, "loss": 2.0, "heldout_ce": 2.0, "heldout_ce_model": 1.5}]
    (panel,) = [panel for panel in overview(rows) if "entropy" in panel.title]
    assert [curve.metric for curve in panel.curves] == ["heldout_ce", "heldout_ce_model"]
    assert not [panel for panel in overview(rows) if panel.main == "ce_model"]
