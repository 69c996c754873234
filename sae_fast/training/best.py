"""The rule by which a checkpoint of a run is its best one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sae_fast.config import SAEConfig
from sae_fast.training.schedule import Schedules

_HELDOUT_LOSSES = {"ce": "heldout_ce", "kl": "heldout_kl"}
Best = dict[str, float]


class BestRule:
    """Pick the evaluation with the lowest value of the figure that the run minimises.

    Args:
        sae: the model.
        schedules: of the run. While the weight of the sparsity terms rises, or k falls, codes are
            denser than in the model that is trained for, so that no evaluation counts then.
        has_heldout: whether there are held-out rows; without them the figure is the training loss.

    Attributes:
        figure: its name in a row of metrics.
        first_step: evaluations before this step do not count.
    """

    def __init__(self, sae: SAEConfig, schedules: Schedules, *, has_heldout: bool) -> None:
        self.figure = _HELDOUT_LOSSES.get(sae.loss_fn, "heldout_fvu") if has_heldout else "loss"
        settled = 0 if schedules.k is None else schedules.k.fall_steps
        if not sae.takes("k") or sae.l1_penalty_coeff:
            settled = max(settled, schedules.sparsity.start + schedules.sparsity.warmup_steps)
        self.first_step = min(settled, schedules.total_steps)

    def improved(self, best: Best | None, step: int, row: Mapping[str, float]) -> Best | None:
        """Return the figure and step of this evaluation, or None where `best` is not worse."""
        value = row.get(self.figure)
        if value is None or not math.isfinite(value) or step < self.first_step:
            return None
        if best is not None and value >= best.get(self.figure, math.inf):
            return None
        return {self.figure: value, "step": step}
