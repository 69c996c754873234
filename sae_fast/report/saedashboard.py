"""Pages of latents as SAEDashboard writes them: batch-N.json, which Neuronpedia reads.

    OUT/batch-0.json …        BATCH latents each, the ones that fire
    OUT/skipped_indexes.json  the latents that never fire
    OUT/run_settings.json     the settings that the pages are of

The fields of a latent are in `Dashboard.feature`. SAEDashboard's correlations are of activations;
here they are of firing as 0 and 1, which the pass counts. Lists that need the model's neurons are
empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sae_fast.atomic_files import replacing, write_json
from sae_fast.evaluation.code_store import Floats
from sae_fast.evaluation.contexts import TOP
from sae_fast.evaluation.latents import LatentPages
from sae_fast.evaluation.logits import LogitEffects
from sae_fast.evaluation.text_rows import TOKENS, TextRows
from sae_fast.evaluation.token_texts import TokenTexts
from sae_fast.report.page_source import PageSource

BATCH = 128  # latents of a file, as SAEDashboard has it by default
SKIPPED, SETTINGS = "skipped_indexes.json", "run_settings.json"
_ALIGNED = 3  # places of a decoder row that are listed
_DIGITS = 5  # behind the point, as SAEDashboard rounds


@dataclass(frozen=True)
class Dashboard:
    """The pages of one dictionary, in the fields of SAEDashboard.

    Attributes:
        pages: the numbers.
        text: the rows that they are of.
        tokens: the texts of tokens.
        directions: [F, D], what one unit of each latent adds to the activations.
        source: the place of the dictionary.
        context_tokens: tokens of a context, at most.
        logits: tokens that latents raise and lower; None: not known.
    """

    pages: LatentPages
    text: TextRows
    tokens: TokenTexts
    directions: Floats
    source: PageSource
    context_tokens: int
    logits: LogitEffects | None = None

    @property
    def n_prompts(self) -> int:
        """Pieces of `context_tokens` tokens that the rows amount to."""
        return -(-self.pages.rows // self.context_tokens)

    def batches(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield number and latents of each file; a latent that never fires is in none."""
        for number in range(-(-self.pages.d_sae // BATCH)):
            latents = range(number * BATCH, min((number + 1) * BATCH, self.pages.d_sae))
            yield number, [self.feature(j) for j in latents if self.pages.fired[j]]

    def feature(self, latent: int) -> dict[str, Any]:
        """Return the fields of a latent."""
        pages, largest = self.pages, float(self.pages.largest[latent])
        bins = pages.histogram.shape[1]
        return {
            "feature_index": latent,
            **self._alignment(latent),
            "correlated_neurons_indices": [],
            "correlated_neurons_l1": [],
            "correlated_neurons_pearson": [],
            **self._cofiring(latent),
            **self._logits(latent),
            "frac_nonzero": float(pages.fired[latent]) / max(pages.rows, 1),
            "freq_hist_data_bar_values": _middles(0.0, largest, bins),
            "freq_hist_data_bar_heights": pages.histogram[latent].tolist(),
            "n_prompts_total": self.n_prompts,
            "n_tokens_in_prompt": self.context_tokens,
            "dataset": self.source.dataset,
            "decoder_weights_dist": [],
            "activations": [self._activation(latent, n) for n in pages.contexts.of(latent)],
            "vector": _rounded(self.directions[latent]),
        }

    def _alignment(self, latent: int) -> dict[str, Any]:
        """Return the largest numbers of the direction, and their shares of its L1 norm."""
        direction = self.directions[latent]
        places = np.argsort(-direction, kind="stable")[:_ALIGNED]
        total = float(np.abs(direction).sum()) or 1.0
        return {
            "neuron_alignment_indices": places.tolist(),
            "neuron_alignment_values": _rounded(direction[places]),
            "neuron_alignment_l1": _rounded(np.abs(direction[places]) / total),
        }

    def _cofiring(self, latent: int) -> dict[str, Any]:
        """Return latents that fire with one: φ, and the cosine of firing as 0 and 1."""
        pages = self.pages
        partners = pages.cofiring_latents[latent]
        is_there = partners >= 0
        partners = partners[is_there]
        both = pages.cofiring_counts[latent][is_there].astype(np.float64)
        sizes = pages.cofiring_fired[partners] * pages.cofiring_fired[latent]
        return {
            "correlated_features_indices": partners.tolist(),
            "correlated_features_l1": _rounded(both / np.sqrt(np.maximum(sizes, 1))),
            "correlated_features_pearson": _rounded(pages.cofiring_phi[latent][is_there]),
        }

    def _logits(self, latent: int) -> dict[str, Any]:
        if self.logits is None:
            empty = ("neg_str", "neg_values", "pos_str", "pos_values")
            histogram = ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")
            return {name: [] for name in (*empty, *histogram)}
        logits = self.logits
        heights = logits.logit_histogram[latent].tolist()
        ends = float(logits.smallest_logit[latent]), float(logits.largest_logit[latent])
        return {
            "neg_str": self._texts(logits.suppressed[latent].tolist()),
            "neg_values": _rounded(logits.suppressed_logits[latent]),
            "pos_str": self._texts(logits.promoted[latent].tolist()),
            "pos_values": _rounded(logits.promoted_logits[latent]),
            "logits_hist_data_bar_heights": heights,
            "logits_hist_data_bar_values": _middles(*ends, len(heights)),
        }

    def _activation(self, latent: int, piece: int) -> dict[str, Any]:
        contexts = self.pages.contexts
        begin, end = int(contexts.begins[piece]), int(contexts.ends[piece])
        part = slice(contexts.offsets[piece], contexts.offsets[piece + 1])
        values = np.zeros(end - begin, np.float32)
        values[contexts.places[part]] = contexts.values[part]
        return {
            **self._bin(latent, int(contexts.intervals[piece])),
            "tokens": self._texts(self.text.numbers(TOKENS, np.arange(begin, end)).tolist()),
            "values": _rounded(values),
            "qualifying_token_index": int(contexts.rows[piece]) - begin,
        }

    def _bin(self, latent: int, interval: int) -> dict[str, float]:
        """Return the edges of an interval, and the share of the rows inside; 0 is in the lowest."""
        pages, largest = self.pages, float(self.pages.largest[latent])
        if interval == TOP:
            return {"bin_min": -1.0, "bin_max": _round(largest), "bin_contains": -1.0}
        count = pages.intervals.shape[1]
        inside = int(pages.intervals[latent, interval])
        if interval == 0:
            inside += pages.rows - int(pages.fired[latent])
        return {
            "bin_min": _round(largest * interval / count),
            "bin_max": _round(largest * (interval + 1) / count),
            "bin_contains": _round(inside / max(pages.rows, 1)),
        }

    def _texts(self, tokens: list[int]) -> list[str]:
        known = self._known
        new = [token for token in dict.fromkeys(tokens) if token not in known]
        if new:
            known.update(zip(new, self.tokens.of(new), strict=True))
        return [known[token] for token in tokens]

    @cached_property
    def _known(self) -> dict[int, str]:
        return {}


def write_saedashboard(
    dashboard: Dashboard,
    out: Path,
    settings: Mapping[str, Any],
    check: Callable[[], object] = lambda: None,
) -> None:
    """Write the files of SAEDashboard into a folder, which is made.

    Args:
        dashboard: the pages.
        out: the folder.
        settings: of the pages, for run_settings.json.
        check: called after each file; it may raise to stop.
    """
    out.mkdir(parents=True, exist_ok=True)
    source = dashboard.source
    place = {"model_id": source.model_id, "layer": source.layer, "sae_set": source.set_name}
    for number, features in dashboard.batches():
        batch = {**place, "sae_id_suffix": None, "features": features}
        with replacing(out / f"batch-{number}.json", flush=False) as temporary:
            temporary.write_text(json.dumps(batch), encoding="utf-8")
        check()
    skipped = np.flatnonzero(dashboard.pages.fired == 0).tolist()
    others = {**place, "layer": str(source.layer), "log_sparsity": 0, "skipped_indexes": skipped}
    write_json(out / SKIPPED, others)
    write_json(out / SETTINGS, dict(settings))


def _middles(low: float, high: float, bins: int) -> list[float]:
    """Return the middles of bins of equal width from `low` to `high`."""
    return _rounded(low + (np.arange(bins) + 0.5) / bins * (high - low))


def _rounded(values: Any) -> list[float]:
    numbers: list[float] = np.round(np.asarray(values, np.float64), _DIGITS).tolist()
    return numbers


def _round(value: float) -> float:
    return round(value, _DIGITS)
