"""Learning rate, its fall and Adam's betas as the length of a run asks for them.

What the settings leave open follows from the number of steps. A short run ends before it has come
far, and so takes steps that are as long as the dictionary can bear; the moments that Adam has of
its first steps, with gradients many times as large, must be forgotten within the run. Where a limit
decides which latents are active, and not a comparison, half of the rate of models with k is right:
above it latents fall silent. Gradients of few tokens are noisy: a model with k has a lower rate in
small batches, by the square root of their size, as for Adam in arXiv:2205.10287. A high rate leaves
latents dead and an error of its own, so it falls for most of the run. The rule was fitted to
trainings, see docs/guide/optimisers.md; other models, and other optimisers, have the rates of a
long run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sae_fast.config import SAEConfig, TrainConfig

LONG = 50_000  # steps; the rule is for runs below
LARGEST_RATE = 0.01
SHARES = {"relu": 0.5, "jumprelu": 0.5, "gated": 0.5}  # of the rate of models with k
LARGE_BATCH = 1024  # tokens of a step; models with k have a lower rate below
BETAS = (0.9, 0.999)
_SHORT_BETA1 = 0.8
_SHORTEST_MEMORY = 20  # steps of the second moment
_MEMORIES = 5  # of the second moment in a run
_SHORT_DECAY = 0.4
_HIGH_RATE = 0.005  # above which the rate of a model with k falls for longer
_HIGH_DECAY = 0.7


class FittedRates(NamedTuple):
    """The rates of a run.

    Attributes:
        peak: the largest learning rate.
        decay_fraction: the share of the run, at its end, in which the learning rate falls.
        betas: Adam's decay rates of the first and second moment.
    """

    peak: float
    decay_fraction: float
    betas: tuple[float, float]


def fitted_rates(config: TrainConfig, sae: SAEConfig, total_steps: int) -> FittedRates:
    """Return the given rates of a run, and for those left open what fits its steps.

    That is their number, and of models with k the tokens of a step, of all processes and all
    accumulated batches.
    """
    peak = config.peak_learning_rate(sae.d_sae)
    decay, betas = config.kept_decay_fraction, BETAS
    share = 1.0 if sae.takes("k") else SHARES.get(sae.arch)
    if total_steps < LONG and share is not None and config.optimizer in ("adam", "adamw"):
        if config.learning_rate is None:
            high = min(LARGEST_RATE, share * peak * math.sqrt(LONG / total_steps))
            if sae.takes("k"):
                high *= math.sqrt(min(config.tokens_per_step, LARGE_BATCH) / LARGE_BATCH)
            peak = max(peak, high)
        if config.decay_fraction is None:
            is_high = sae.takes("k") and peak > _HIGH_RATE
            decay = _HIGH_DECAY if is_high else _SHORT_DECAY
        memory = total_steps / _MEMORIES
        betas = (_SHORT_BETA1, min(1 - 1 / max(memory, _SHORTEST_MEMORY), BETAS[1]))
    return FittedRates(peak, decay, config.betas or betas)
