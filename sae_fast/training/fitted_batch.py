"""The batch size of a run that leaves it open, as the length of the run asks for it.

A run that its tokens end makes more steps with smaller batches. A short one reconstructs better
with these, in about as many seconds; see docs/guide/optimisers.md for what was measured.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from sae_fast.config import TrainConfig
from sae_fast.config.train import LARGEST_BATCH

# By batch size the fewest steps that a run makes with it; with fewer the next smaller one is taken.
_FEWEST_STEPS = {4096: 1000, 2048: 1000, 1024: 250, 512: 250}
SMALLEST_BATCH = 256

logger = logging.getLogger(__name__)


def with_fitted_batch(config: TrainConfig, rows_per_epoch: int | None) -> TrainConfig:
    """Return the configuration of a run with a batch size.

    It does not depend on the model, so that all trainings of a sweep have the same.

    Args:
        config: of the run; a batch size that it has stays.
        rows_per_epoch: rows in a pass over the data; None: that is unknown.
    """
    if config.batch_size is not None:
        return config
    return replace(config, batch_size=_fitted_batch(config, rows_per_epoch))


def _fitted_batch(config: TrainConfig, rows_per_epoch: int | None) -> int:
    limits = [] if config.max_tokens is None else [config.max_tokens]
    if rows_per_epoch is not None and (config.max_epochs is not None or not limits):
        limits.append(rows_per_epoch * (config.max_epochs or 1))
    if config.max_steps is not None or config.batches_per_step > 1 or not limits:
        return LARGEST_BATCH  # the settings ask for a number of steps, or for large ones
    fitting = (size for size, steps in _FEWEST_STEPS.items() if min(limits) >= steps * size)
    return next(fitting, SMALLEST_BATCH)
