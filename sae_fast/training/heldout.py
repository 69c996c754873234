"""Evaluation of the models of a run on its held-out rows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.evaluation.metrics import evaluate, evaluate_slots, largest_ordinary_norm
from sae_fast.evaluation.sampled_latents import SampledLatents, sample_latents
from sae_fast.report.top_latents import CONTEXTS
from sae_fast.training.data import TrainingData
from sae_fast.training.downstream import Downstream

_SAMPLED_ROWS = 4096  # whose tokens the report shows; few, so that short trainings stay short


class HeldoutEvaluation:
    """Measure models on the held-out rows of a run.

    Args:
        data: of the run, with or without held-out rows.
        dead_rate: see `evaluate`.
        downstream: the model that continues from the reconstruction, and its held-out batches.

    Attributes:
        rates: the share of the rows on which each latent of the model fired at the last evaluation,
            [F] float64; None before the first one, and without held-out rows.
    """

    def __init__(self, data: TrainingData, dead_rate: float, downstream: Downstream) -> None:
        self._data = data
        self._dead_rate = dead_rate
        self._downstream = downstream
        self._ordinary_norm: float | None = None
        self.rates: Tensor | None = None

    def evaluate(
        self,
        sae: SparseAutoencoder,
        averaged: Callable[[], SparseAutoencoder] | None = None,
        *,
        in_model: bool = False,
    ) -> dict[str, float]:
        """Return the figures of a model by their names in a row of metrics.

        gram_mean needs no rows; without held-out rows it is alone.

        Args:
            sae: the model.
            averaged: makes the model with averaged weights; its figures have averaged_ before
                their names.
            in_model: whether eval_metrics is due.
        """
        measured = {"gram_mean": float(sae.mean_squared_cosine())}
        if in_model:
            measured |= self._downstream.eval_metrics(sae)
        if self._data.heldout is None:
            return measured
        rows = (self._data.heldout, self._data.heldout_targets)
        if self._ordinary_norm is None:
            outputs = rows[0] if rows[1] is None else rows[1]
            self._ordinary_norm = largest_ordinary_norm(outputs)
        rates = (self._dead_rate, self._ordinary_norm)
        measured |= evaluate(sae, *rows, *rates, note_rates=self._note_rates)
        measured |= self._downstream.evaluate(sae)
        if sae.config.arch == "slots" and self._data.heldout_labels:
            measured |= evaluate_slots(sae, self._data.heldout, self._data.heldout_labels)
        if averaged is not None:
            of_average = evaluate(averaged(), *rows, *rates)
            measured |= {f"averaged_{name}": value for name, value in of_average.items()}
        return measured

    def sample(self, sae: SparseAutoencoder) -> SampledLatents | None:
        """Return what a few of the rows show of a model's latents; None where there are no rows."""
        data = self._data
        if data.heldout is None:
            return None
        rows = data.heldout, data.heldout_targets, data.heldout_shards
        return sample_latents(sae, *rows, limit=_SAMPLED_ROWS, top=CONTEXTS)

    def _note_rates(self, rates: Tensor) -> None:
        self.rates = rates
