"""The report of dictionaries that were measured: metrics, distributions, impact, contexts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae_fast import __version__
from sae_fast.evaluation.definitions import CAUSAL, DEFINITIONS
from sae_fast.report.charts import COLOURS, Chart, Series
from sae_fast.report.page import Page, Row
from sae_fast.report.run_charts import (
    cosine_chart,
    curves,
    density_chart,
    evaluated,
    front_chart,
)
from sae_fast.report.top_latents import add_top_latents

if TYPE_CHECKING:
    from sae_fast.report.evaluation import Evaluation

_CURVES = 6  # charts of a training
_RUN_AND_STEP = re.compile(r"(.+)/checkpoints/step-0*(\d+)$")  # of a checkpoint


def evaluation_page(evaluations: Sequence[Evaluation]) -> Page:
    """Return the report of measured dictionaries."""
    names = [evaluation.name for evaluation in evaluations]
    title = "Evaluation of " + (names[0] if len(names) == 1 else f"{len(names)} dictionaries")
    told = [f"{evaluation.name}: {evaluation.described()}" for evaluation in evaluations]
    page = Page(title, [*told, f"sae_fast {__version__}"])
    _distributions(page, evaluations)
    _metrics(page, evaluations)
    for evaluation in evaluations:
        _causal(page, evaluation, is_alone=len(evaluations) == 1)
        _probes(page, evaluation)
        add_top_latents(
            page,
            f"Top latents, {evaluation.name}",
            evaluation.latents,
            evaluation.concepts,
            evaluation.token_texts,
            [] if evaluation.causal is None else evaluation.causal.latents,
        )
    runs = {
        evaluation.name: evaluation.training for evaluation in evaluations if evaluation.training
    }
    if runs:
        page.heading("Training", "What the trainings logged, over their tokens.")
        page.charts(curves(runs)[:_CURVES])
    return page


def _distributions(page: Page, evaluations: Sequence[Evaluation]) -> None:
    page.heading("Latents at a glance")
    charts = [_front(evaluations)]
    for evaluation in evaluations:
        ending = "" if len(evaluations) == 1 else f", {evaluation.name}"
        charts.append(density_chart(evaluation.density_histogram, f"Densities{ending}"))
        cosines = evaluation.latents["max_decoder_cosine_sim"]
        charts.append(cosine_chart(cosines, f"Largest cosines{ending}"))
    page.charts(charts)


def _front(evaluations: Sequence[Evaluation]) -> Chart:
    """Return FVU over L0, in a colour for each dictionary and each run with its checkpoints."""
    places = [_RUN_AND_STEP.search(Path(item.place).as_posix()) for item in evaluations]
    groups: dict[str, list[tuple[str, Evaluation]]] = {}
    for item, found in zip(evaluations, places, strict=True):
        key, name = (item.name, item.name) if found is None else (found[1], f"step {found[2]}")
        groups.setdefault(key, []).append((name, item))
    if len(groups) > COLOURS:
        groups = {"dictionaries": [(item.name, item) for item in evaluations]}
    series = [
        Series(
            [_l0_and_fvu(item) for _, item in members],
            key.rpartition("/")[2],
            "rings",
            [name for name, _ in members],
            are_written=len(members) > 1,
        )
        for key, members in groups.items()
    ]
    owners = {item.name: place for place, m in enumerate(groups.values()) for _, item in m}
    series += [
        Series(points, f"{item.name} during its training", "points", like=owners[item.name])
        for item in evaluations
        if (points := evaluated(item.training))
    ]
    return front_chart(series, "small is better in both")


def _l0_and_fvu(evaluation: Evaluation) -> tuple[float, float]:
    metrics = evaluation.metrics
    return metrics["sparsity"]["l0"], metrics["reconstruction_quality"]["fvu"]


def _metrics(page: Page, evaluations: Sequence[Evaluation]) -> None:
    page.heading("Metrics", "Each with its definition; the same numbers are in metrics.json.")
    names = [evaluation.name for evaluation in evaluations]
    for group, definitions in DEFINITIONS.items():
        rows = [
            Row(name, tuple(item.shown(group, name) for item in evaluations), text)
            for name, text in definitions.items()
            if any(name in item.metrics.get(group, {}) for item in evaluations)
        ]
        if rows:
            page.table([group.replace("_", " "), *names], rows)


def _causal(page: Page, evaluation: Evaluation, *, is_alone: bool) -> None:
    if evaluation.causal is None:
        return
    page.heading(
        "Causal impact" + ("" if is_alone else f", {evaluation.name}"),
        "Latents ablated one at a time in the language model, the strongest first.",
    )
    ablated = list(evaluation.causal.rows())
    page.table(
        ["latent", *CAUSAL],
        [
            Row(str(int(row["latent"])), tuple(f"{row[name]:.3g}" for name in CAUSAL))
            for row in ablated
        ],
    )
    page.definitions(CAUSAL)
    points = [(row["attribution"], row["loss_change"]) for row in ablated]
    ends = [min(map(min, points)), max(map(max, points))]
    chart = Chart(
        "Exact change and its estimate",
        "estimate of the change [nats a token]",
        "change of the loss [nats a token]",
        [
            Series(points, kind="points", names=[str(int(row["latent"])) for row in ablated]),
            Series([(end, end) for end in ends], "equal", "line"),
        ],
        "each point is an ablated latent",
    )
    page.charts([chart])


def _probes(page: Page, evaluation: Evaluation) -> None:
    probes = evaluation.concepts.probes
    if not probes:
        return
    page.heading(
        f"Probes for labels, {evaluation.name}",
        "Balanced accuracy on test rows; the latents are the ones that a probe looks at.",
    )
    rows = []
    for label in dict.fromkeys(probe.label for probe in probes):
        own = [probe for probe in probes if probe.label == label]
        latents = " ".join(map(str, own[-1].latents))
        cells = tuple(f"{probe.accuracy:.3f}" for probe in own)
        rows.append(Row(f"label {label}", cells, f"latents {latents}"))
    sizes = [len(probe.latents) for probe in probes if probe.label == probes[0].label]
    headings = [f"{size} latents" if size > 1 else "1 latent" if size else "row" for size in sizes]
    page.table(["", *headings], rows)
