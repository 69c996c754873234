"""Supervised slots, after AlignSAE, arXiv:2512.02004: latents that are bound to labelled relations.

The last R latents are relation slots, all others free ones, as in `relu`. With z_n the slots of a
token before ReLU, labelled with relation r and answer a:

    alignment  Σ_i (z_ni − target 1[i = r])², a mean over labelled tokens
    value      the cross-entropy of a, predicted from the activation f of r's slot by r's own head,
               W_value_out[r] ReLU(W_value_in[r] f / target + b_value_in[r]) + b_value_out[r]

Alignment acts before ReLU, where a slot that is off can be told to come on; alignment_after_relu
has it as it is written. Independence among free slots and orthogonality between both kinds are
terms that every architecture can have, see guidance.py. The L1 penalty is on the free slots.

The default weights are in units of the data, so that they act at every width. With E the
reconstruction error of the mean (d_in, with loss_fn fvu 1) and s = sqrt(d_in) the typical norm:

    L1         0.1 E / s, of the sum over the free slots
    alignment  E / target², with target s / 2, half an activation: a swap moves what is decoded
    value      0.1 E

The paper's, for an error that is a mean over numbers, are 1e-3 of the mean over slots, 1 with
target 1 and 0.5. slots_l1_mean and alignment_after_relu have the first two as defaults.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae_fast import ops
from sae_fast.autoencoder import losses
from sae_fast.autoencoder.architecture import ArchitectureLoss, Batch, Engine, Weights
from sae_fast.autoencoder.thresholded import ReLU
from sae_fast.config import SAEConfig
from sae_fast.ops.full_precision import addmm

NO_LABEL = -1
# A head's hidden units are hinges at points spread over twice the target, steep enough to tell
# apart answers that are close together; nothing is learnt slower than a hinge's place.
_HINGE_SLOPE = 4.0
_SLOT_RANGE = 2.0


class Binding(NamedTuple):
    """Counts of labelled tokens, and of those that slots and heads get right; 0-d each."""

    slots_right: Tensor
    n_relations: Tensor  # tokens labelled with a relation
    answers_right: Tensor
    n_answers: Tensor  # tokens labelled with both

    def accuracies(self, has_answers: bool) -> dict[str, Tensor]:
        """Return the shares that are right, NaN of nothing."""
        found = {"slot_accuracy": losses.ratio(self.slots_right, self.n_relations)}
        if has_answers:
            found["value_accuracy"] = losses.ratio(self.answers_right, self.n_answers)
        return found


class Slots(ReLU):
    """The loss of a model with relation slots.

    Raises ValueError where the number of relations, or of answers with value heads, is left open.
    """

    term_names = ("l1_loss", "alignment_loss", "value_loss")

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        needed = ("n_relations", *(("n_answers",) if config.has_value_heads else ()))
        for name in needed:
            if getattr(config, name) is None:
                raise ValueError(
                    f"{name} must be given, directly or by the labels, to make a model, got null"
                )
        assert config.n_relations is not None
        self.n_relations = config.n_relations

    @property
    def metric_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Accuracies over the labelled tokens of the batch, NaN where there are none."""
        values = ("value_accuracy",) if self.config.has_value_heads else ()
        return (*super().metric_names, "slot_accuracy", *values)

    def parameters(self) -> dict[str, Tensor]:
        """Return the value heads: hinges spread over the slots' range, all answers equal."""
        if not self.config.has_value_heads:
            return {}
        assert self.config.value_hidden is not None
        assert self.config.n_answers is not None
        hidden, answers = self.config.value_hidden, self.config.n_answers
        slopes = torch.full((hidden,), _HINGE_SLOPE, dtype=torch.float32)
        slopes[1::2].neg_()
        # Named, because transformers leaves linspace out of what a device context covers.
        hinges = torch.linspace(0, _SLOT_RANGE, hidden, dtype=slopes.dtype, device=slopes.device)
        return {
            "W_value_in": slopes.repeat(self.n_relations, 1),
            "b_value_in": (-slopes * hinges).repeat(self.n_relations, 1),
            "W_value_out": slopes.new_zeros(self.n_relations, hidden, answers),
            "b_value_out": slopes.new_zeros(self.n_relations, answers),
        }

    def trained(self) -> tuple[str, ...] | None:
        """Return the names of the value heads, where they are trained alone."""
        return tuple(self.parameters()) if self.config.slots_mode == "separate_value" else None

    def loss(self, weights: Weights, batch: Batch, engine: Engine) -> ArchitectureLoss:
        """Return the terms of reconstruction, free slots' L1, alignment and value prediction."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained() is None):
            code = self.list_above(weights, batch, engine)
            modelled, recon_loss = self.reconstruct(weights, code, batch, engine)
        if self.trained() is not None:
            recon_loss = torch.zeros_like(recon_loss)  # measured, as fvu, and not trained for
        terms = dict.fromkeys(self.term_names, recon_loss.new_zeros(()))
        metrics = dict.fromkeys(self.metric_names, recon_loss.new_full((), torch.nan))
        metrics |= self.metrics(weights)
        if not batch.settings.reconstruction_only:
            bound, binding = self._bound_terms(weights, batch, engine)
            terms |= bound
            if self.config.l1_penalty_coeff:
                terms["l1_loss"] = self.l1_loss(weights, code, batch, engine)
            metrics |= binding.accuracies(self.config.has_value_heads)
        return ArchitectureLoss(code, *modelled, recon_loss, terms, metrics)

    def _bound_terms(
        self, weights: Weights, batch: Batch, engine: Engine
    ) -> tuple[dict[str, Tensor], Binding]:
        """Return the terms that need labels, and how well the labels are met."""
        config, terms = self.config, {}
        relations, answers = self._checked_labels(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained() is None):
            scores = engine.encode_last(weights, batch.x, self.n_relations)
        if config.alignment_coeff:
            slots = scores.relu() if config.alignment_after_relu else scores
            distance = alignment_loss(slots, relations, config.slot_target or 1.0)
            terms["alignment_loss"] = config.alignment_coeff * distance
        surprise, binding = self._judge(weights, scores, relations, answers)
        if surprise is not None:
            terms["value_loss"] = (config.value_loss_coeff or 0.0) * surprise
        return terms, binding

    def _judge(
        self,
        weights: Weights,
        scores: Tensor,  # [N, R]
        relations: Tensor,  # [N]
        answers: Tensor | None,  # [N]
    ) -> tuple[Tensor | None, Binding]:
        """Return the cross-entropy of the answers, a mean over these, and how many are right."""
        labelled = relations != NO_LABEL
        right = ((scores.argmax(1) == relations) & labelled).sum()
        none = torch.zeros_like(right)
        if answers is None:
            return None, Binding(right, labelled.sum(), none, none)
        kept = labelled & (answers != NO_LABEL)
        logits = self.answer_logits(weights, scores[kept].relu(), relations[kept])
        surprise = functional.cross_entropy(logits, answers[kept], reduction="none")
        answered = (logits.argmax(1) == answers[kept]).sum()
        mean = losses.deterministic_sum(surprise) / max(len(logits), 1)
        return mean, Binding(right, labelled.sum(), answered, kept.sum())

    def measure(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        relations: Tensor,  # [N] int64
        answers: Tensor | None,  # [N] int64
    ) -> Binding:
        """Count the labelled tokens whose largest slot is the right one, and the right answers."""
        scores = Engine().encode_last(weights, x, self.n_relations)
        if not self.config.has_value_heads:
            answers = None
        return self._judge(weights, scores, relations, answers)[1]

    def answer_logits(
        self,
        weights: Weights,
        slots: Tensor,  # [N, R], activations of the relation slots
        relations: Tensor,  # [N] int64, whose head is asked
    ) -> Tensor:
        """Return the logits [N, A] of the answers."""
        own, target = weights.own, self.config.slot_target or 1.0
        chosen = slots.gather(1, relations[:, None]) / target  # [N, 1]
        order, parts = [], []
        for relation in range(self.n_relations):
            rows = (relations == relation).nonzero()[:, 0]
            inner = chosen[rows] * own["W_value_in"][relation] + own["b_value_in"][relation]
            head = own["W_value_out"][relation], own["b_value_out"][relation]
            parts.append(addmm(head[1], inner.relu(), head[0]))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def rescale_(self, weights: Weights, factor: Tensor) -> None:
        """Keep the answers of slots whose activations were multiplied by `factor`, 0-d or [F]."""
        super().rescale_(weights, factor)
        if self.config.has_value_heads:
            of_slots = factor.expand(len(weights.b_enc))[-self.n_relations :]
            weights.own["W_value_in"].div_(of_slots[:, None])

    def penalty(self, weights: Weights, code: ops.Code) -> Tensor:
        """Return the penalty of relu over the free slots, with slots_l1_mean as a mean of them."""
        norms = self.row_norms(weights)
        if norms is None:
            norms = torch.ones_like(weights.b_enc)
        is_free = torch.arange(len(norms), device=norms.device) < len(norms) - self.n_relations
        if self.config.slots_l1_mean:
            norms = norms / self.config.group_split
        return losses.lp_loss(code, self.config.sparsity_norm_p, norms * is_free)

    def _checked_labels(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return relations and answers [N] of a batch; raise ValueError where they do not fit."""
        columns, config = batch.columns, self.config
        relations = columns.get(config.relation_labels or "")
        answers = columns.get(config.answer_labels or "")
        wanted = [("relations", relations, self.n_relations)]
        if self.config.has_value_heads:
            wanted.append(("answers", answers, self.config.n_answers or 0))
        for name, labels, count in wanted:
            if labels is None:
                raise ValueError(f"{name} must be given with arch slots")
            if labels.shape != (len(batch.x),):
                shape = tuple(labels.shape)
                raise ValueError(f"{name} must have shape ({len(batch.x)},), got {shape}")
            if len(labels) > 0 and not NO_LABEL <= int(labels.min()) <= int(labels.max()) < count:
                low, high = int(labels.min()), int(labels.max())
                raise ValueError(
                    f"{name} must be 0 to {count - 1}, or -1 where a token has none, "
                    f"got {low if low < NO_LABEL else high}"
                )
        assert relations is not None
        return relations, answers if self.config.has_value_heads else None


def alignment_loss(
    scores: Tensor,  # [N, R], the relation slots before ReLU
    relations: Tensor,  # [N] int64, -1: no relation
    target: float = 1.0,
) -> Tensor:
    """Return Σ_i (z_ni − target 1[i = relation])², averaged over labelled tokens; 0 without any."""
    labelled = relations != NO_LABEL
    one_hot = functional.one_hot(relations.clamp_min(0), scores.shape[1]).to(scores.dtype)
    squared = (scores - target * one_hot).square().sum(1)
    return losses.deterministic_sum(torch.where(labelled, squared, 0.0)) / labelled.sum().clamp_min(
        1
    )
