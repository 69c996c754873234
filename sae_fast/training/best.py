"""The rule by which a checkpoint of a run is its best one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.schedule import Schedules

OBJECTIVE = "objective"
_HELDOUT_LOSSES = {"ce": "heldout_ce", "kl": "heldout_kl"}
# Figures of eval_metrics, and whether higher is better.
_OF_EVAL_METRICS = {"heldout_ce": False, "heldout_ce_increase": False, "heldout_ce_score": True}
Best = dict[str, float]


class BestRule:
    """Pick the evaluation with the best value of one figure: what the run minimises, or `best_by`.

    Of models that are not equally sparse the one with the lowest FVU is merely the densest. They
    are ranked by `objective`: FVU plus the sparsity terms at full weight, as shares of the error of
    the mean, or with target_l0 FVU + (L0 / target_l0 − 1)². To the error of batch_topk and
    matryoshka (L0 / k − 1)² is added: before the last checkpoint, whose L0 is calibrated, the
    threshold of inference lets more or fewer than k latents pass.

    Args:
        sae: the model.
        train: its training.
        schedules: of the run. While the learning rate or the weight of the sparsity terms rises, or
            k falls, the model is not yet the one that is trained for, and no evaluation counts.
        has_heldout: whether there are held-out rows; without them the figures are of training.
        wanted_l0: of the architecture, see `Architecture.wanted_l0`.
        own_terms: names of the terms of the loss that the architecture and the caller add.

    Attributes:
        figure: its name in a row of metrics.
        first_step: evaluations before this step do not count.

    Raises:
        ValueError: where `best_by` names no figure that evaluations of the run have.
    """

    def __init__(
        self,
        sae: SAEConfig,
        train: TrainConfig,
        schedules: Schedules,
        *,
        has_heldout: bool,
        wanted_l0: float | None,
        own_terms: Iterable[str] = (),
    ) -> None:
        self._sae = sae
        # In training a code of batch_topk has k latents.
        self._wanted_l0 = wanted_l0 if has_heldout or sae.target_l0 is not None else None
        self._error = _HELDOUT_LOSSES.get(sae.loss_fn, "heldout_fvu")
        if not has_heldout:
            self._error = "recon_loss" if sae.is_end_to_end else "fvu"
        self._l0 = "heldout_l0" if has_heldout else "l0"
        is_penalised = bool(sae.l1_penalty_coeff or sae.sparsity_penalty_coeff)
        # Without held-out rows the loss has the penalty in it, unless a target moves its weight.
        self._has_objective = (is_penalised and has_heldout) or self._wanted_l0 is not None
        if self._has_objective:
            self.figure = OBJECTIVE
        else:
            self.figure = self._error if has_heldout else "loss"
        self._is_higher_better = False
        if train.best_by is not None:
            self.figure = train.best_by
            sides = self._sides(train, has_heldout=has_heldout, own_terms=own_terms)
            if train.best_by not in sides:
                needs = ", which needs --eval-metrics" if train.best_by in _OF_EVAL_METRICS else ""
                raise ValueError(
                    "best_by must be a figure of this run's evaluations of which it is known "
                    f"which values are better, {', '.join(sides)}, got {train.best_by!r}{needs}"
                )
            self._is_higher_better = sides[train.best_by]
        settled = schedules.rate.warmup_steps
        if schedules.k is not None:
            settled = max(settled, schedules.k.fall_steps)
        if not sae.takes("k") or is_penalised:
            settled = max(settled, schedules.sparsity.start + schedules.sparsity.warmup_steps)
        self.first_step = min(settled, schedules.total_steps)

    def objective(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        """Return the objective under its name; nothing where the run has none, or not yet.

        Args:
            step: of the evaluation.
            row: the figures of the evaluation and of the last step.
        """
        if not self._has_objective or step < self.first_step:
            return {}
        sae, total = self._sae, row[self._error]
        if sae.target_l0 is None:
            penalty = row.get("l1_loss", 0.0) + row.get("sparsity_loss", 0.0)
            total = sae.reconstruction_coeff * total + penalty / sae.error_of_the_mean
        if self._wanted_l0 is not None:
            total += (row[self._l0] / self._wanted_l0 - 1) ** 2
        return {OBJECTIVE: total}

    def improved(self, best: Best | None, step: int, row: Mapping[str, float]) -> Best | None:
        """Return figure, L0 and step of this evaluation, or None where `best` is not worse."""
        value = row.get(self.figure)
        if value is None or not math.isfinite(value) or step < self.first_step:
            return None
        if best is not None and self.figure in best:
            before = best[self.figure]
            if value <= before if self._is_higher_better else value >= before:
                return None
        l0 = {self._l0: row[self._l0]} if self._l0 in row else {}
        return {**l0, self.figure: value, "step": step}

    def _sides(
        self, train: TrainConfig, *, has_heldout: bool, own_terms: Iterable[str]
    ) -> dict[str, bool]:
        """Return by name the figures that can rank evaluations, and whether higher is better.

        An L0, a rate or a speed has no better side.
        """
        sae = self._sae
        weighted = [name for name, weight in sae.term_coefficients.items() if weight > 0]
        lower = ["loss", *weighted, *own_terms, "fvu", "silent_fraction"]
        higher = ["explained_variance"]
        if self._has_objective:
            lower.append(OBJECTIVE)
        if sae.has_probe:
            higher.append("probe_accuracy" if sae.probe_task == "classification" else "probe_r2")
        if has_heldout:
            lower += ["heldout_fvu", "heldout_dead_fraction"]
            higher += ["heldout_explained_variance", "heldout_explained_variance_overall"]
            if sae.is_end_to_end:
                lower.append(self._error)
            if sae.arch == "slots":
                higher += ["heldout_slot_accuracy", "heldout_value_accuracy"]
        sides = dict.fromkeys(lower, False) | dict.fromkeys(higher, True)
        if train.eval_metrics:
            return sides | _OF_EVAL_METRICS
        return sides
