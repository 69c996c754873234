"""The report of dictionaries that were measured: metrics, distributions, impact, contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sae_fast import __version__
from sae_fast.evaluation.concepts import TOKEN
from sae_fast.evaluation.definitions import CAUSAL, DEFINITIONS
from sae_fast.evaluation.excerpts import excerpts
from sae_fast.evaluation.results import Evaluation
from sae_fast.report.charts import Chart, Series
from sae_fast.report.page import Page, Row
from sae_fast.report.panels import Row as MetricsRow
from sae_fast.report.run_charts import (
    cosine_chart,
    curves,
    density_chart,
    evaluated,
    front_chart,
)

LATENTS = 12  # with contexts, of each dictionary
CONTEXTS = 5  # of a latent
_CURVES = 6  # charts of a training
_MASS = "density times mean activation"


def evaluation_page(
    evaluations: Sequence[Evaluation], runs: Mapping[str, Sequence[MetricsRow]]
) -> Page:
    """Return the report of measured dictionaries.

    Args:
        evaluations: of each dictionary.
        runs: by the name of a dictionary that is a run, the rows of its metrics.jsonl.
    """
    names = [evaluation.name for evaluation in evaluations]
    title = "Evaluation of " + (names[0] if len(names) == 1 else f"{len(names)} dictionaries")
    page = Page(title, [*map(_line, evaluations), f"sae_fast {__version__}"])
    _distributions(page, evaluations, runs)
    _metrics(page, evaluations)
    for evaluation in evaluations:
        _causal(page, evaluation, is_alone=len(evaluations) == 1)
        _probes(page, evaluation)
        _contexts(page, evaluation)
    if runs:
        page.heading("Training", "What the trainings logged, over their tokens.")
        page.charts(curves(runs)[:_CURVES])
    return page


def _line(evaluation: Evaluation) -> str:
    config = evaluation.sae.config
    told = ", ".join(f"{name} {value}" for name, value in evaluation.measured_on.items())
    size = f"{config.arch}, {config.d_in} to {config.d_sae:,} latents"
    return f"{evaluation.name}: {size}; measured on {told}"


def _distributions(
    page: Page, evaluations: Sequence[Evaluation], runs: Mapping[str, Sequence[MetricsRow]]
) -> None:
    page.heading("Latents at a glance")
    charts = []
    points = {
        evaluation.name: [
            (
                evaluation.sections["sparsity"]["l0"],
                evaluation.sections["reconstruction_quality"]["fvu"],
            )
        ]
        for evaluation in evaluations
    }
    over_time = {f"{name}, evaluations": evaluated(rows) for name, rows in runs.items()}
    points |= {name: found for name, found in over_time.items() if found}
    charts.append(front_chart(points, "small is better in both; evaluations are of the training"))
    for evaluation in evaluations:
        ending = "" if len(evaluations) == 1 else f", {evaluation.name}"
        charts.append(density_chart(evaluation.density_histogram, f"Densities{ending}"))
        cosines = evaluation.latents["max_decoder_cosine_sim"]
        charts.append(cosine_chart(cosines, f"Largest cosines{ending}"))
    page.charts(charts)


def _metrics(page: Page, evaluations: Sequence[Evaluation]) -> None:
    page.heading("Metrics", "Each with its definition; the same numbers are in metrics.json.")
    names = [evaluation.name for evaluation in evaluations]
    for group, definitions in DEFINITIONS.items():
        rows = [
            Row(name, tuple(_shown(item, group, name) for item in evaluations), text)
            for name, text in definitions.items()
            if any(name in item.sections.get(group, {}) for item in evaluations)
        ]
        if rows:
            page.table([group.replace("_", " "), *names], rows)


def _shown(evaluation: Evaluation, group: str, name: str) -> str:
    value = evaluation.sections.get(group, {}).get(name)
    if value is None:
        return ""
    if not math.isfinite(value):
        return "no value"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


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
    for name, text in CAUSAL.items():
        page.paragraph(f"{name}: {text}")
    points = [(row["attribution"], row["loss_change"]) for row in ablated]
    ends = [min(map(min, points)), max(map(max, points))]
    chart = Chart(
        "Exact change and its estimate",
        "estimate of the change [nats a token]",
        "change of the loss [nats a token]",
        [
            Series(points, kind="points", names=[str(int(row["latent"])) for row in ablated]),
            Series([(end, end) for end in ends]),
        ],
        "on the line both are equal",
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


def _contexts(page: Page, evaluation: Evaluation) -> None:
    purity = evaluation.concepts.purity.get(TOKEN)
    if purity is None:
        return
    numbers = evaluation.latents
    mass = numbers["feature_density"] * numbers["mean_activation"]
    largest = mass.topk(min(LATENTS, len(mass))).indices.tolist()
    if evaluation.causal is not None:
        largest = list(dict.fromkeys([*evaluation.causal.latents, *largest]))[:LATENTS]
    page.heading(
        f"Contexts, {evaluation.name}",
        f"The rows on which each of these latents is strongest, with its activation. They are the "
        f"latents with the largest {_MASS}, after ablated ones if there are any. "
        "python -m sae_fast.latents makes such pages of all latents.",
    )
    if not evaluation.token_texts:
        page.paragraph("Tokens are shown by their numbers: --tokenizer names a tokenizer.")
    columns = evaluation.concepts.columns
    for latent in largest:
        found = excerpts(purity, latent, columns, evaluation.token_texts, CONTEXTS)
        share = float(purity.purity[latent])
        told = [
            f"active on {float(numbers['feature_density'][latent]):.2%} of the rows",
            f"largest activation {float(numbers['max_activation'][latent]):.3g}",
        ]
        if not math.isnan(share):
            told.append(f"token purity {share:.0%}")
        if "attribution" in numbers:
            told.append(f"attribution {float(numbers['attribution'][latent]):.2g} nats")
        page.contexts(
            f"latent {latent}",
            ", ".join(told),
            [(item.activation, item.texts, item.place) for item in found],
        )
