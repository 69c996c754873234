"""Fronts of L0 and FVU: the points on them, their colours, and figures that can be read."""

from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from sae_fast.report.front import Point, draw_front, front

_POINTS = [
    *(Point("topk", 8.0 * 2**step, 0.5 / 1.7**step) for step in range(5)),
    *(Point("relu", 10.0 * 2**step, 0.6 / 1.6**step) for step in range(5)),
    Point("topk", 20.0, 0.6),  # surpassed by another
]


def test_a_front_leaves_out_points_that_others_surpass() -> None:
    points = [Point("a", 4, 0.2), Point("a", 2, 0.4), Point("a", 3, 0.4), Point("a", 4, 0.3)]
    assert front(points) == [Point("a", 2, 0.4), Point("a", 4, 0.2)]
    assert front([points[0], points[0]]) == [points[0]]
    assert front([]) == []


def test_every_run_is_a_point_and_every_series_has_its_colour_and_marker(
    tmp_path: Path, figures: list[Figure]
) -> None:
    draw_front(_POINTS, tmp_path / "a.png", "11 runs")
    (axes,) = figures[0].axes
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 0]
    points = {point for line in lines for point in zip(*line.get_data(), strict=True)}
    assert points == {(point.l0, point.fvu) for point in _POINTS}
    named = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == ["relu", "topk"]
    assert len({to_hex(line.get_color()) for line in named}) == 2
    assert len({line.get_marker() for line in named}) == 2
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("L0", "held-out FVU")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


@pytest.mark.parametrize("points", [_POINTS, _POINTS[:1], _POINTS[:2]])
def test_a_front_is_readable_in_one_column_of_a_paper(
    points: list[Point], tmp_path: Path, figures: list[Figure]
) -> None:
    path = draw_front(points, tmp_path / "new" / "a.png", "a run")
    with Image.open(path) as image:
        assert image.size[0] > 900
    (axes,) = figures[0].axes
    assert figures[0].get_size_inches()[0] < 3.5  # the width of a column
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    texts = [axes.xaxis.label, axes.yaxis.label, axes.title, *ticks]
    assert min(text.get_fontsize() for text in texts) >= 8
    for ends, places in (
        (axes.get_xlim(), axes.get_xticks()),
        (axes.get_ylim(), axes.get_yticks()),
    ):
        assert sum(ends[0] <= place <= ends[1] for place in places) >= 2


def test_an_fvu_of_0_leaves_a_linear_axis(tmp_path: Path, figures: list[Figure]) -> None:
    draw_front([*_POINTS, Point("topk", 300.0, 0.0)], tmp_path / "a.pdf", "12 runs")
    assert figures[0].axes[0].get_yscale() == "linear"
