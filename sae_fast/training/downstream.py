"""The model that continues from a reconstruction, whose loss is the autoencoder's: loss_fn ce, kl.

The reconstruction takes the place of the activations at the hook point, the model continues from
there, and its loss is the autoencoder's (arXiv:2405.12241). The model itself is not trained.

    ce  the cross-entropy of the text: of the next token, or with a masked model of masked tokens
    kl  KL(p ‖ q), p the model's own prediction, q the one with the reconstruction; mean over tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sae_fast.activations import Rows
from sae_fast.activations.capture import HookPoint
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.language_model import MASK, SplicedLosses, SplicedModel


class DownstreamModel:
    """The loss of a model with a reconstruction at one of its hook points.

    Args:
        network: a model with its head.
        hook: where.
        loss_fn: ce or kl.
        causal: whether ce is of the next token, or of `labels`.
    """

    def __init__(self, network: Any, hook: HookPoint, loss_fn: str, *, causal: bool) -> None:
        self._model = SplicedModel(network, hook, causal=causal)
        self._loss_fn = loss_fn

    def loss(
        self,
        x_hat: Tensor,  # [n, D], in the units of the activations
        columns: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the loss, 0-d, with a gradient to x̂."""
        logits = self._model.logits(columns, x_hat)
        if self._loss_fn == "ce":
            return self._cross_entropy(logits, columns)
        with torch.no_grad():
            wanted = self._model.logits(columns, None)
        kept = columns[MASK]
        return functional.kl_div(
            logits[kept].log_softmax(-1),
            wanted[kept].log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )

    @torch.no_grad()
    def evaluate(self, sae: SparseAutoencoder, batches: Sequence[Rows]) -> dict[str, float]:
        """Return the mean loss over batches with the reconstruction, and of ce also without it."""
        spliced = original = 0.0
        for rows in batches:
            spliced += float(self.loss(sae(rows.x), rows.columns))
            if self._loss_fn == "ce":
                logits = self._model.logits(rows.columns, None)
                original += float(self._cross_entropy(logits, rows.columns))
        losses = {f"heldout_{self._loss_fn}": spliced / len(batches)}
        if self._loss_fn == "ce":
            losses["heldout_ce_model"] = original / len(batches)
        return losses

    def _cross_entropy(self, logits: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        total, predicted = self._model.summed_cross_entropy(logits, columns)
        # Of a batch in which nothing is masked the mean would be 0 / 0.
        return total / predicted.clamp_min(1)


@dataclass(frozen=True)
class Downstream:
    """The model that continues from the reconstruction, for loss_fn ce and kl, and eval_metrics.

    Attributes:
        model: from the hook point on; None: the loss is computed on the activations.
        heldout: batches that its loss is measured on.
        losses: what eval_metrics measures; None: it is not asked for.
    """

    model: DownstreamModel | None = None
    heldout: Sequence[Rows] = ()
    losses: SplicedLosses | None = None

    def evaluate(self, sae: SparseAutoencoder) -> dict[str, float]:
        """Return the model's loss with the reconstructions of the held-out batches, if any."""
        if self.model is None or not self.heldout:
            return {}
        return self.model.evaluate(sae, self.heldout)

    def eval_metrics(self, sae: SparseAutoencoder) -> dict[str, float]:
        """Return what eval_metrics measures, by the names of metrics; nothing unless asked for."""
        if self.losses is None:
            return {}
        return {f"heldout_{name}": value for name, value in self.losses.evaluate(sae).items()}


def checked_downstream(downstream: Downstream | None, sae: SAEConfig) -> Downstream:
    """Return `downstream`, or a no-op if None; raise ValueError if loss_fn needs one."""
    if sae.is_end_to_end and downstream is None:
        raise ValueError(
            f"loss_fn {sae.loss_fn} needs the model itself, not its activations alone: "
            "python -m sae_fast.train MODEL DATASET"
        )
    return Downstream() if downstream is None else downstream
