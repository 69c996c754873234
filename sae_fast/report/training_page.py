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
    "ordinary_fvu": "fvu without the 1 % of the rows with the largest norms",
    "l0": f"{_SPARSITY['l0']}; of training: by its own rule, of one batch",
    "activation_fraction": "l0 divided by the number of latents",
    "dead_fraction": "share of latents that fire on no held-out row, or on a smaller share than "
    "dead_percentage_threshold; of training: silent on the last dead_after_tokens tokens",
    "silent_fraction": "share of latents that were silent for a tenth of the run",
    "gram_mean": DEFINITIONS["misc_metrics"]["mean_squared_decoder_cosine"],
    "ce": _LOSSES["ce_loss_with_sae"],
    "ce_model": _LOSSES["ce_loss_without_sae"],
    "ce_increase": "ce − ce_model",
    "ce_score": _LOSSES["ce_loss_score"],
    "kl": DEFINITIONS["model_behavior_preservation"]["kl_div_with_sae"],
    "loss": "what the training minimised, the sum of the terms below, of the last batch that was "
    "logged",
    "recon_loss": "term of the loss: the error of the reconstruction by loss_fn, normalised rows",
    "l1_loss": "term of the loss: the penalty on the size of activations",
    "sparsity_loss": "term of the loss: the penalty that leads L0",
    "pre_act_loss": "term of the loss: the distance of dead latents below their thresholds",
    "decorr_loss": "term of the loss: the similarity of decoder rows",
    "aux_loss": "term of the loss: what dead latents (AuxK), or the gates, fail to reconstruct",
    "multi_topk_loss": "term of the loss: the error with a multiple of k latents active",
    "alignment_loss": "term of the loss: relation slots that differ from the labels",
    "value_loss": "term of the loss: answers that are predicted wrongly from relation slots",
    "probe_loss": "term of the loss: labels that the probe predicts wrongly from the code",
    "temporal_loss": "term of the loss: changes of the code from a token to the next",
    "independence_loss": "term of the loss: squared correlations of latents below "
    "correlation_split",
    "orthogonality_loss": "term of the loss: squared correlations of latents below "
    "correlation_split with the others",
    "mean_threshold": "the threshold above which a latent is active, averaged over latents",
    "sparsity_coeff": "the weight of the penalty at the end, led by target_l0",
    "objective": "what chooses the best checkpoint: fvu with the penalty",
    "k": "latents that a row could use at the end",
    "max_decoder_cosine": "largest cosine of a latent with another one, averaged over latents",
    "probe_accuracy": "share of labels that the probe predicts right, of one batch",
    "probe_r2": "1 − squared error of the probe / variance of the labels, of one batch",
    "learning_rate": "of the last step",
    "grad_norm": "norm of the gradients of the last step, before they are clipped",
    "tokens_per_second": "rows trained on a second, since the row before in the log",
    "time_per_step_ms": "milliseconds of a step, since the row before in the log",
    "reader_stall_fraction": "share of the time spent waiting for rows",
    "communication_fraction": "share of the time spent gathering from the other processes",
    "exchanged_bytes": "bytes that a process has given to the others in a step",
    "skipped_rows": "rows left out because they held NaN or Inf",
    "full_batches": "steps in which every score was computed for the selection, many times slower",
    "skipped_steps": "steps left out because gradients overflowed (fp16)",
    "variance": "Σ |x − mean(x)|² of the last batch",
    "loss_scale": "factor on the loss that keeps small gradients (fp16)",
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
