"""The report of a task with known answers: scores with their definitions, pictures, data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sae_fast.ground_truth.overlap import OVERLAP
from sae_fast.ground_truth.results import Results, machine
from sae_fast.report.charts import Series
from sae_fast.report.page import Page, Row
from sae_fast.report.panels import Row as MetricsRow
from sae_fast.report.run_charts import (
    cosine_chart,
    density_chart,
    density_counts,
    front_chart,
    metric_chart,
)
from sae_fast.report.training_page import LatentFigures


def results_page(
    results: Results,
    pictures: Mapping[str, bytes],
    latents: Mapping[str, LatentFigures],
    histories: Mapping[str, Sequence[MetricsRow]],
) -> Page:
    """Return the report of a task.

    Args:
        results: of its trainings.
        pictures: PNG files, by the text that stands for each.
        latents: by architecture, of the training with its first seed.
        histories: by architecture, what this training logged.
    """
    page = Page(results.task.title, [results.task.about, f"`{results.command}`"])
    page.heading("Scores", results.seeds_line())
    archs = results.architectures
    rows = [
        Row(
            score.heading,
            tuple(results.mean(arch, score.name) for arch in archs),
            f"{score.definition} {score.source}".strip(),
        )
        for score in results.scores
    ]
    rows += [
        Row(
            score.heading,
            tuple(results.shared(arch, score.name) for arch in archs),
            f"{score.definition} {score.source}".strip(),
        )
        for score in OVERLAP
        if any(results.overlap.values())
    ]
    page.table(["score", *archs], rows)
    if line := results.untrained_line():
        page.paragraph(line)
    page.heading("Pictures")
    for text, png in pictures.items():
        page.picture(png, text)
    page.heading("Trainings and latents", "Curves and histograms are of the first seed.")
    fronts = [
        Series(points, arch, "points")
        for arch in archs
        if (points := _pairs(results.values(arch, "l0"), results.values(arch, "fvu")))
    ]
    charts = [front_chart(fronts, "a point for each seed; small is better in both")]
    if histories:
        charts.append(metric_chart(histories, "fvu", "FVU of a batch in training"))
        charts.append(metric_chart(histories, "l0", "L0 of a batch in training"))
    for arch, figures in latents.items():
        if figures.rates is not None:
            charts.append(density_chart(density_counts(figures.rates), f"Densities, {arch}"))
        charts.append(cosine_chart(figures.cosines, f"Largest cosines, {arch}"))
    page.charts(charts)
    page.heading("Data and settings")
    settings = results.task.config.of_the_task()
    for heading, values in (("fact", results.facts), ("setting", settings), ("machine", machine())):
        told = [Row(name, (_told(value),)) for name, value in values.items() if value is not None]
        page.table([heading, ""], told)
    return page


def _pairs(l0: list[float], fvu: list[float]) -> list[tuple[float, float]]:
    """Return a point for each seed; none where a seed lacks a value."""
    return list(zip(l0, fvu, strict=True)) if len(l0) == len(fvu) else []


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
