"""The report of a training: its figures, curves, the front of its evaluations, its latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sae_fast import __version__
from sae_fast.evaluation.definitions import DEFINITIONS
from sae_fast.evaluation.sampled_latents import SampledLatents
from sae_fast.report.charts import Series
from sae_fast.report.page import Page, Row
from sae_fast.report.panels import Row as MetricsRow
from sae_fast.report.run_charts import (
    cosine_chart,
    curves,
    density_chart,
    density_counts,
    evaluated,
    front_chart,
)
from sae_fast.report.top_latents import add_top_latents

_QUALITY, _SPARSITY = DEFINITIONS["reconstruction_quality"], DEFINITIONS["sparsity"]
_LOSSES = DEFINITIONS["model_performance_preservation"]
# Definitions of final figures; heldout_ before a name says on which rows it was measured.
_DEFINITIONS = {
    "fvu": _QUALITY["explained_variance"].replace("1 − ", "", 1) + "; of training: of one batch",
    "explained_variance": "1 − fvu",
    "explained_variance_overall": _QUALITY["explained_variance_overall"],
    "l0": _SPARSITY["l0"],
    "dead_fraction": "share of latents that count as dead",
    "gram_mean": DEFINITIONS["misc_metrics"]["mean_squared_decoder_cosine"],
    "ce": _LOSSES["ce_loss_with_sae"],
    "ce_model": _LOSSES["ce_loss_without_sae"],
    "ce_increase": "ce − ce_model",
    "ce_score": _LOSSES["ce_loss_score"],
    "loss": "what the training minimised, of the last batch that was logged",
    "reader_stall_fraction": "share of the time spent waiting for rows",
}


@dataclass(frozen=True)
class LatentFigures:
    """Numbers of the latents of a trained dictionary.

    Attributes:
        rates: share of the held-out rows on which each fires, [F]; None: there are none.
        cosines: the largest cosine of latents with another one, [n], of all or of a sample.
        sample: what a few held-out rows show of the latents; None: there are no such rows.
    """

    rates: Tensor | None
    cosines: Tensor
    sample: SampledLatents | None = None


def training_page(
    title: str,
    rows: Sequence[MetricsRow],
    summary: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    latents: LatentFigures,
) -> Page:
    """Return the report of a training.

    Args:
        title: of the run.
        rows: of metrics.jsonl.
        summary: of the training.
        settings: that it was trained with, by section.
        latents: of the dictionary.
    """
    steps, tokens = summary["steps"], summary["tokens"]
    line = f"{steps:,} steps, {tokens:,} tokens, {summary['seconds']:.1f} s"
    page = Page(title, [line, f"sae_fast {__version__}"])
    for warning in summary["warnings"]:
        page.paragraph(f"Warning: {warning}")
    page.heading("Figures at the end")
    page.table(["figure", "value"], _figures(summary))
    page.heading("Curves")
    page.charts(curves({"": rows}))
    page.heading("Latents at the end")
    charts = []
    if points := evaluated(rows):
        about = "a point for each evaluation on held-out rows; small is better in both"
        charts.append(front_chart([Series(points, "evaluations", "points")], about))
    if latents.rates is not None:
        charts.append(density_chart(density_counts(latents.rates), "Densities on held-out rows"))
    charts.append(cosine_chart(latents.cosines, "Largest cosines"))
    page.charts(charts)
    if (sample := latents.sample) is not None:
        heading = f"Top latents on {sample.rows:,} held-out rows"
        add_top_latents(page, heading, sample.numbers, sample.concepts, sample.texts)
    page.heading("Settings")
    for section, values in settings.items():
        told = [Row(name, (_told(value),)) for name, value in values.items() if value is not None]
        page.table([section, ""], told)
    return page


def _figures(summary: Mapping[str, Any]) -> list[Row]:
    rows = []
    finals = {
        name: value
        for name, value in summary.items()
        if name.startswith("final_") and isinstance(value, int | float)
    }
    # Held-out figures first; a term of the loss that is 0 is not trained.
    for name, value in sorted(finals.items(), key=lambda item: "heldout" not in item[0]):
        if name.endswith("_loss") and value == 0:
            continue
        plain = name.removeprefix("final_")
        bare = plain.removeprefix("averaged_").removeprefix("heldout_")
        rows.append(Row(plain, (f"{value:.5g}",), _DEFINITIONS.get(bare, "")))
    return rows


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)
