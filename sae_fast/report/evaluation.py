"""`Evaluation`: the metrics of a dictionary, and the files with them.

The files are JSON, Markdown, CSV, SAEBench's core output and the report.
"""

from __future__ import annotations

import csv
import io
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_fast import __version__
from sae_fast.activations.capture.hooks import transformer_lens_name
from sae_fast.atomic_files import write_json, write_text
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.evaluation.causal import CausalImpact
from sae_fast.evaluation.concepts import TOKEN, Concepts
from sae_fast.evaluation.core import LOG_DENSITIES, CoreMetrics, Section
from sae_fast.evaluation.definitions import CAUSAL, DEFINITIONS, LATENTS
from sae_fast.evaluation.purity import token_rows
from sae_fast.interop.hook_names import hook_named_by
from sae_fast.markdown import markdown_table
from sae_fast.report.evaluation_page import evaluation_page
from sae_fast.report.page import REPORT
from sae_fast.report.panels import Row

JSON, MARKDOWN, CSV, SAEBENCH = "metrics.json", "metrics.md", "latents.csv", "saebench_core.json"
CAUSAL_CSV, TOKENS_CSV, PROBES_CSV = "causal.csv", "tokens.csv", "probes.csv"
_OPTIONAL_TABLES = (CAUSAL_CSV, TOKENS_CSV, PROBES_CSV)
NOT_MEASURED = -1.0  # SAEBench's own value where a metric was not computed
_DIGITS = 10
# The metrics in SAEBench's core output, by group.
_SAEBENCH: dict[str, tuple[str, ...]] = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        *("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"),
    ),
    "reconstruction_quality": (
        *("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    ),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
    "misc_metrics": (
        *("freq_over_1_percent", "freq_over_10_percent"),
        *("normalized_freq_over_1_percent", "normalized_freq_over_10_percent"),
        *("average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim", "frac_alive"),
    ),
}
_SAEBENCH_LATENTS = (
    *("feature_density", "consistent_activation_heuristic", "encoder_bias", "encoder_norm"),
    *("encoder_decoder_cosine_sim", "max_decoder_cosine_sim", "max_encoder_cosine_sim"),
)


@dataclass
class Evaluation:
    """The metrics of one dictionary.

    Attributes:
        name: tells it apart from others.
        sae: the dictionary.
        place: where it was read from; empty for a dictionary in memory.
        measured_on: what the metrics were measured on, as JSON values.
        metrics: by name, by the name of their group; definitions.py has the formula of each. NaN: a
            metric that has no value, such as 0 / 0.
        latents: a number for each latent [F], by name.
        density_histogram: see `CoreMetrics`.
        causal: what ablations of latents change, if they were made.
        concepts: the tokens and labels that latents stand for.
        token_texts: texts of tokens, by token, as far as they are known.
        training: the metrics that its training logged, where it was read from a run.
    """

    name: str
    sae: SparseAutoencoder
    place: str
    measured_on: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Section] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)
    density_histogram: list[int] = field(default_factory=list)
    causal: CausalImpact | None = None
    concepts: Concepts = field(default_factory=Concepts)
    token_texts: Mapping[int, str] = field(default_factory=dict)
    training: Sequence[Row] = ()

    def described(self) -> str:
        """Return the kind of the dictionary, its sizes, and what it was measured on."""
        config, told = self.sae.config, dict(self.measured_on)
        parts = []
        if (rows := told.pop("rows", None)) is not None:
            place = f" of {told.pop('shards')}" if "shards" in told else ""
            parts = [f"{rows:,} rows{place}, one a token"]
        parts += [f"{name} {value}" for name, value in told.items()]
        size = f"{config.arch}, {config.d_in} to {config.d_sae:,} latents"
        return f"{size}; measured on {', '.join(parts)}"

    def add(self, sections: Mapping[str, Section]) -> None:
        """Add metrics to their groups."""
        for group, metrics in sections.items():
            self.metrics.setdefault(group, {}).update(metrics)

    def add_core(self, core: CoreMetrics) -> None:
        """Add the metrics of rows."""
        self.add(core.sections)
        self.latents |= core.latents
        self.density_histogram = core.density_histogram

    def add_causal(self, causal: CausalImpact) -> None:
        """Add what ablations of latents change, and its estimate for all latents."""
        self.causal = causal
        self.latents["attribution"] = causal.all_latents.attribution

    def add_concepts(self, concepts: Concepts, texts: Mapping[int, str]) -> None:
        """Add what latents stand for, with the texts of tokens."""
        self.add(concepts.sections)
        self.latents |= concepts.latents
        self.concepts, self.token_texts = concepts, texts

    def shown(self, group: str, name: str) -> str:
        """Return the text of a metric in tables; "" where none of the name was measured."""
        value = self.metrics.get(group, {}).get(name)
        if value is None:
            return ""
        if not math.isfinite(value):
            return "no value"
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

    def save(self, directory: str | Path) -> None:
        """Write metrics.json, metrics.md, saebench_core.json, report.html and tables of latents.

        The tables are latents.csv and, where they were measured, causal.csv, tokens.csv and
        probes.csv. One of these three that an earlier measurement left there is removed where this
        one does not have it.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tables = self._optional_tables()
        _remove(directory, [name for name in _OPTIONAL_TABLES if name not in tables])
        write_json(directory / JSON, self.to_dict())
        write_json(directory / SAEBENCH, self.saebench())
        write_text(directory / CSV, _latent_table(self.latents))
        write_text(directory / MARKDOWN, markdown([self]))
        evaluation_page([self]).write(directory / REPORT)
        for name, text in tables.items():
            write_text(directory / name, text)

    def _optional_tables(self) -> dict[str, str]:
        """Return the tables of what is not always measured, as CSV, by the name of their file."""
        tables = {}
        if self.causal is not None:
            names = ("latent", *CAUSAL)
            rows = [[_cell(row[name]) for name in names] for row in self.causal.rows()]
            tables[CAUSAL_CSV] = _csv(names, rows)
        concepts = self.concepts
        if TOKEN in concepts.purity:
            names = ("latent", "token", "text", "share")
            found = token_rows(concepts.purity[TOKEN], self.token_texts)
            rows = [[_cell(value) for value in row] for row in found]
            tables[TOKENS_CSV] = _csv(names, rows)
        if concepts.probes:
            names = ("label", "latents", "accuracy")
            rows = [
                [str(item.label), " ".join(map(str, item.latents)) or "rows", _cell(item.accuracy)]
                for item in concepts.probes
            ]
            tables[PROBES_CSV] = _csv(names, rows)
        return tables

    def to_dict(self) -> dict[str, Any]:
        """Return what metrics.json holds; a metric that has no value, such as 0 / 0, is null."""
        config = self.sae.config
        return {
            "sae": {
                "path": self.place or None,
                "origin": dict(self.sae.origin),
                "arch": config.arch,
                "d_in": config.d_in,
                "d_sae": config.d_sae,
                "k": config.k,
            },
            "measured_on": self.measured_on,
            "sae_fast": __version__,
            "metrics": {
                group: {name: _finite(value) for name, value in self.metrics[group].items()}
                for group in DEFINITIONS
                if group in self.metrics
            },
            "density_histogram": {
                "log10_edges": list(LOG_DENSITIES),
                "latents": self.density_histogram,
            },
            **({} if self.causal is None else {"causal_impact": list(self.causal.rows())}),
        }

    def saebench(self) -> dict[str, Any]:
        """Return the metrics in the layout of SAEBench's core output, with −1 for missing ones."""
        metrics = {
            group: {name: self._saebench_number(group, name) for name in names}
            for group, names in _SAEBENCH.items()
        }
        stats = metrics["token_stats"]
        metrics["token_stats"] = {name: max(0, round(value)) for name, value in stats.items()}
        columns = {
            name: self.latents[name].tolist() if name in self.latents else None
            for name in _SAEBENCH_LATENTS
        }
        details = [
            {
                "index": latent,
                **{
                    name: NOT_MEASURED if column is None else round(column[latent], _DIGITS)
                    for name, column in columns.items()
                },
            }
            for latent in range(self.sae.d_sae)
        ]
        origin = self.sae.origin
        has_model = "model_performance_preservation" in self.metrics
        hook = hook_named_by(origin)
        return {
            "eval_type_id": "core",
            "eval_config": {
                "model_name": str(origin.get("model", "")),
                "llm_dtype": str(self.measured_on.get("model_dtype", "")),
                "dataset": str(self.measured_on.get("dataset", "")),
                "context_size": int(self.measured_on.get("ctx_len", 0)),
                "compute_kl": has_model,
                "compute_ce_loss": has_model,
                "compute_l2_norms": True,
                "compute_sparsity_metrics": True,
                "compute_variance_metrics": True,
                "compute_featurewise_density_statistics": True,
                "compute_featurewise_weight_based_metrics": True,
            },
            "eval_id": str(uuid.uuid4()),
            "datetime_epoch_millis": int(time.time() * 1000),
            "eval_result_metrics": metrics,
            "eval_result_details": details,
            "sae_bench_commit_hash": "",
            "sae_lens_id": self.name,
            "sae_lens_release_id": f"sae_fast {__version__}",
            "sae_lens_version": "",
            "sae_cfg_dict": {
                "architecture": self.sae.config.arch,
                "d_in": self.sae.d_in,
                "d_sae": self.sae.d_sae,
                "model_name": origin.get("model"),
                "hook_name": transformer_lens_name(hook) if hook else None,
                "hook_layer": origin.get("layer"),
            },
            "eval_result_unstructured": {"measured_on": self.measured_on},
        }

    def _saebench_number(self, group: str, name: str) -> float:
        value = self.metrics.get(group, {}).get(name, NOT_MEASURED)
        return float(value) if math.isfinite(value) else NOT_MEASURED


def save_overview(evaluations: Sequence[Evaluation], directory: Path) -> None:
    """Write metrics.md and report.html with several dictionaries beside each other.

    The other files of one dictionary that was measured into the directory before are removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / JSON).exists():
        _remove(directory, [JSON, SAEBENCH, CSV, *_OPTIONAL_TABLES])
    write_text(directory / MARKDOWN, markdown(evaluations))
    evaluation_page(evaluations).write(directory / REPORT)


def _remove(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """Return the metrics of dictionaries as tables, with the definition of each metric."""
    lines = ["# Metrics of dictionaries", ""]
    for evaluation in evaluations:
        lines += [f"- **{evaluation.name}**: {evaluation.described()}"]
    names = [evaluation.name for evaluation in evaluations]
    for group, definitions in DEFINITIONS.items():
        rows = [
            [f"`{name}`", *(item.shown(group, name) for item in evaluations), text]
            for name, text in definitions.items()
            if any(name in item.metrics.get(group, {}) for item in evaluations)
        ]
        if rows:
            lines += ["", f"## {group}", "", markdown_table(["metric", *names, "definition"], rows)]
    for evaluation in evaluations:
        if evaluation.causal is not None:
            lines += _causal_section(evaluation, is_alone=len(evaluations) == 1)
    lines += ["", "## latents.csv", ""]
    lines += [f"- `{name}`: {text}" for name, text in LATENTS.items()]
    return "\n".join(lines) + "\n"


def _causal_section(evaluation: Evaluation, *, is_alone: bool) -> list[str]:
    """Return the lines of Markdown about the latents that were ablated, the strongest first."""
    assert evaluation.causal is not None
    ending = "" if is_alone else f" of {evaluation.name}"
    rows = [
        [str(int(row["latent"])), *(f"{row[name]:.4g}" for name in CAUSAL)]
        for row in evaluation.causal.rows()
    ]
    lines = ["", f"## causal_impact{ending}", ""]
    lines += [markdown_table(["latent", *CAUSAL], rows), ""]
    return lines + [f"- `{name}`: {text}" for name, text in CAUSAL.items()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _latent_table(latents: Mapping[str, Tensor]) -> str:
    names = [name for name in LATENTS if name in latents]
    columns = [latents[name].tolist() for name in names]
    rows = [
        [str(number), *map(_cell, row)] for number, row in enumerate(zip(*columns, strict=True))
    ]
    return _csv(("latent", *names), rows)


def _csv(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    table.writerows(rows)
    return text.getvalue()


def _cell(value: str | float) -> str:
    """Return a value as it stands in a table; a number that there is not is an empty cell."""
    if isinstance(value, str):
        return value
    return f"{value:.9g}" if math.isfinite(value) else ""
