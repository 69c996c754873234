"""The report of a task with known answers: scores with their definitions, pictures, data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from sae_fast.ground_truth.overlap import OVERLAP
from sae_fast.ground_truth.results import Results, machine
from sae_fast.report.page import Page, Row


def results_page(results: Results, pictures: Mapping[str, bytes]) -> Page:
    """Return the report of a task.

    Args:
        results: of its trainings.
        pictures: PNG files, by the text that stands for each.
    """
    seeds = sorted({int(entry["seed"]) for entry in results.entries})
    page = Page(results.task.title, [results.task.about, results.command])
    page.heading("Scores", f"Mean ± standard deviation over the seeds {' '.join(map(str, seeds))}.")
    archs = results.architectures
    rows = [
        Row(
            score.heading,
            tuple(_spread(results.values(arch, score.name)) for arch in archs),
            f"{score.definition} {score.source}".strip(),
        )
        for score in results.scores
    ]
    rows += [
        Row(
            score.heading,
            tuple(_shown(results.overlap.get(arch, {}).get(score.name)) for arch in archs),
            f"{score.definition} {score.source}".strip(),
        )
        for score in OVERLAP
        if any(results.overlap.values())
    ]
    page.table(["score", *archs], rows)
    page.heading("Pictures")
    for text, png in pictures.items():
        page.picture(png, text)
    page.heading("Data and settings")
    settings = results.task.config.of_the_task()
    for heading, values in (("fact", results.facts), ("setting", settings), ("machine", machine())):
        told = [Row(name, (_told(value),)) for name, value in values.items() if value is not None]
        page.table([heading, ""], told)
    return page


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return _shown(values[0] if values else None)
    return f"{_shown(statistics.fmean(values))} ± {_shown(statistics.stdev(values))}"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
