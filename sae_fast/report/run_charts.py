"""Charts that several reports share: curves of runs, fronts, densities and cosines of latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sae_fast.evaluation.core import LOG_DENSITIES
from sae_fast.report.charts import Chart, Series, histogram
from sae_fast.report.front import Point, front
from sae_fast.report.panels import Row, overview

_MOST_POINTS = 400  # of a curve; the eye sees no more
COSINE_BINS = 40
L0, FVU = "heldout_l0", "heldout_fvu"


def curves(runs: Mapping[str, Sequence[Row]]) -> list[Chart]:
    """Return a chart for each metric of runs over their tokens, as in plot.png.

    Args:
        runs: rows of metrics.jsonl by the name of the run.
    """
    charts = []
    every = [row for rows in runs.values() for row in rows]
    for panel in overview(every):
        series = []
        for name, rows in runs.items():
            drawn: list[list[tuple[float, float]]] = []
            for curve in panel.curves:
                points = _points(rows, curve.metric)
                if points and points not in drawn:  # a curve on another one would hide it
                    drawn.append(points)
                    label = curve.label if len(runs) == 1 else f"{name}, {curve.label}"
                    series.append(Series(points, label, "curve" if len(points) > 30 else "both"))
        if series:
            wide = (False, panel.is_wide)
            charts.append(Chart(panel.title, "tokens", "", series, may_be_logarithmic=wide))
    return charts


def metric_chart(runs: Mapping[str, Sequence[Row]], metric: str, title: str) -> Chart:
    """Return the chart of one metric over tokens, with a curve for each run that logged it.

    Args:
        runs: rows of metrics.jsonl by the name of the run.
        metric: its name.
        title: above the chart.
    """
    drawn = {name: points for name, rows in runs.items() if (points := _points(rows, metric))}
    series = [Series(points, name) for name, points in drawn.items()]
    return Chart(title, "tokens", "", series, may_be_logarithmic=(False, True))


def _points(rows: Sequence[Row], metric: str) -> list[tuple[float, float]]:
    found = [
        (float(row["tokens"]), float(row[metric])) for row in rows if row.get(metric) is not None
    ]
    step = max(1, len(found) // _MOST_POINTS)
    return found[::step] if step == 1 else [*found[:-1:step], found[-1]]


def front_chart(series: Sequence[Series], about: str) -> Chart:
    """Return the chart of FVU over L0, with a line through the points that no other one surpasses.

    Args:
        series: points of L0 and FVU, of checkpoints, dictionaries or evaluations.
        about: a line below it.
    """
    every = [point for part in series for point in part.finite().points]
    best = front(Point("", *point) for point in every)
    drawn = list(series)
    if len(best) > 1:
        points = [(point.l0, point.fvu) for point in best]
        drawn.append(Series(points, "Pareto front", "line"))
    axes = "L0: active latents a row", "FVU"
    return Chart("FVU over L0", *axes, drawn, about, (True, True))


def evaluated(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return L0 and FVU on held-out rows at each evaluation of a run."""
    return [(row[L0], row[FVU]) for row in rows if row.get(L0) and row.get(FVU)]


def density_chart(counts: Sequence[int], title: str) -> Chart:
    """Return the histogram of densities, from the counts of `CoreMetrics.density_histogram`."""
    used = [place for place, count in enumerate(counts) if count] or [0]
    first, last = max(used[0] - 1, 0), min(used[-1] + 2, len(counts))
    return histogram(
        LOG_DENSITIES[first : last + 1],
        counts[first:last],
        title=title,
        x="log10 of the share of rows on which a latent is active",
        about="latents that are active on no row are left out",
    )


def density_counts(
    rates: Tensor,  # [F], shares of rows
) -> list[int]:
    """Return how many latents are in each interval of LOG_DENSITIES."""
    edges = torch.tensor(LOG_DENSITIES, dtype=torch.float64)
    logs = rates[rates > 0].double().cpu().log10()
    places = (torch.searchsorted(edges, logs, right=True) - 1).clamp(0, len(edges) - 2)
    return torch.bincount(places, minlength=len(edges) - 1).tolist()


def cosine_chart(
    cosines: Tensor,  # [n]
    title: str,
    x: str = "largest cosine with another latent",
    about: str = "decoder directions; at 1 two latents are one",
) -> Chart:
    """Return a histogram of cosines."""
    values = cosines[~cosines.isnan()].double().clamp(-1, 1)
    low = min(0.0, float(values.min())) if len(values) else 0.0
    low = -1.0 if low < 0 else 0.0
    high = min(1.0, math.ceil(10 * float(values.max())) / 10) if len(values) else 1.0
    high = max(high, low + 0.1)
    counts = torch.histc(values, bins=COSINE_BINS, min=low, max=high).long().tolist()
    edges = torch.linspace(low, high, COSINE_BINS + 1, dtype=torch.float64).tolist()
    return histogram(edges, counts, title=title, x=x, about=about)
