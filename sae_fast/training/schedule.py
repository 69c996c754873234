"""Learning rate, sparsity weight and k of each step, and how many steps a run has."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.fitted_rates import fitted_rates

logger = logging.getLogger(__name__)

# On a GPU every k is a graph of its own, so that there must not be many.
_VALUES_PER_HALVING = 4


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak, a plateau, linear decay over the last share of the run."""

    peak: float
    warmup_steps: int
    total_steps: int
    decay_steps: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0; it is above 0 in all steps."""
        rise = (step + 1) / (self.warmup_steps + 1)
        fall = (self.total_steps - step) / (self.decay_steps + 1)
        return self.peak * min(1.0, rise, max(0.0, fall))

    def describe(self) -> str:
        """Return one sentence that says how the rate rises and falls."""
        return (
            f"learning rate: up to {self.peak:.3g}, rising for {self.warmup_steps:,} and falling "
            f"in the last {self.decay_steps:,} of {self.total_steps:,} steps"
        )

    def state(self, step: int) -> dict[str, float]:
        """Return what a checkpoint records of the schedule after `step` steps."""
        return {
            "step": step,
            "last_learning_rate": self(step - 1) if step else 0.0,
            "peak_learning_rate": self.peak,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
            "total_steps": self.total_steps,
        }

    def told_after(self, state: Mapping[str, Any]) -> str | None:
        """Say how the rate continues after a `state` of a run of another length; else None."""
        step = state["step"]
        before, now = state["last_learning_rate"], self(step)
        if state["total_steps"] == self.total_steps or not 0 < step < self.total_steps:
            return None
        decay = self.total_steps - self.decay_steps
        end = f", falls from step {max(decay, step):,} on" if self.decay_steps else ""
        return (
            f"the run has {self.total_steps:,} steps now, not {state['total_steps']:,}: the "
            f"learning rate continues from {before:.3g} at step {step:,} to {now:.3g} at the next"
            f"{end} and ends with {self(self.total_steps - 1):.3g}"
        )


def make_schedule(config: TrainConfig, sae: SAEConfig, total_steps: int) -> Schedule:
    """Make the schedule of a run of `total_steps` optimiser steps, whatever a step accumulates."""
    rates = fitted_rates(config, sae, total_steps)
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(0.05 * total_steps)
    decay = round(rates.decay_fraction * total_steps)
    return Schedule(rates.peak, warmup, total_steps, decay)


@dataclass(frozen=True)
class SparsitySchedule:
    """Linear warm-up to 1 of the factor of the terms that make codes sparse.

    It begins when reconstruction is no longer the only term.
    """

    warmup_steps: int
    start: int = 0

    def __call__(self, step: int) -> float:
        """Return the weight of step `step`, counted from 0."""
        return min(1.0, max(0, step - self.start + 1) / (self.warmup_steps + 1))


def make_sparsity_schedule(
    config: TrainConfig, total_steps: int, reconstruction_steps: int = 0
) -> SparsitySchedule:
    """Make the schedule of a run of `total_steps` optimiser steps."""
    warmup = config.sparsity_warmup_steps
    default = round(0.05 * total_steps)
    return SparsitySchedule(default if warmup is None else warmup, reconstruction_steps)


@dataclass(frozen=True)
class KSchedule:
    """Linear fall of k from `start` to `final`, never below the line, in geometric stairs."""

    start: int
    final: int
    fall_steps: int

    def __call__(self, step: int) -> int:
        """Return the k of step `step`, counted from 0."""
        if step >= self.fall_steps:
            return self.final
        exact = self.start + (self.final - self.start) * step / self.fall_steps
        stair = math.ceil(_VALUES_PER_HALVING * math.log2(exact / self.final))
        return min(math.ceil(self.final * 2 ** (stair / _VALUES_PER_HALVING)), self.start)


def make_k_schedule(config: TrainConfig, sae: SAEConfig, total_steps: int) -> KSchedule | None:
    """Make the schedule of a run of `total_steps` optimiser steps; None where k is constant.

    Raises:
        ValueError: when the model's k cannot fall from there.
    """
    start, steps = config.k_anneal_start, config.k_anneal_steps
    if start is None:
        return None
    if sae.k is None:
        raise ValueError(f"k_anneal_start must be left out with arch {sae.arch}, got {start}")
    if sae.activation == "groupmax":
        raise ValueError(
            f"k_anneal_start must be left out with activation groupmax, got {start}: "
            "its latents belong to one of k groups"
        )
    if not sae.k < start <= sae.d_sae:
        raise ValueError(
            f"k_anneal_start must be above k = {sae.k} and at most d_sae = {sae.d_sae}, got {start}"
        )
    return KSchedule(start, sae.k, round(0.05 * total_steps) if steps is None else steps)


def count_steps(config: TrainConfig, rows_per_epoch: int) -> int:
    """Return how many optimiser steps `config` allows: the first limit reached ends the run.

    Raises:
        ValueError: when they allow none, naming the limit.
    """
    return _first_limit(config, rows_per_epoch)[1]


def _first_limit(config: TrainConfig, rows_per_epoch: int) -> tuple[str, int]:
    """Return the setting that ends a run, and the optimiser steps that it allows."""
    tokens_per_step = config.tokens_per_step
    limits = {}
    if config.max_steps is not None:
        limits["max_steps"] = config.max_steps
    if config.max_tokens is not None:
        limits["max_tokens"] = config.max_tokens // tokens_per_step
    if config.max_epochs is not None:
        limits["max_epochs"] = rows_per_epoch * config.max_epochs // tokens_per_step
    if not limits:
        limits["max_epochs"] = rows_per_epoch // tokens_per_step
    name = min(limits, key=lambda limit: limits[limit])
    if limits[name] < 1:
        data = f" of {rows_per_epoch:,} rows" if name == "max_epochs" else ""
        value = getattr(config, name) or 1
        raise ValueError(
            f"{name} = {value:,}{data} leaves no full step of {tokens_per_step:,} tokens "
            f"(batch_size {config.kept_batch_size:,} x grad_acc_steps {config.grad_acc_steps}"
            f"{'' if config.mesh is None else f' x mesh {config.mesh}'})"
        )
    return name, limits[name]


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run, which give the settings of each step.

    Attributes:
        total_steps: of the run.
        limit: the setting that ends the run.
        rate: the learning rate.
        sparsity: the weight of the terms that make codes sparse.
        k: None where it stays what it is.
        reconstruction_steps: at the start, whose loss is the reconstruction alone.
    """

    total_steps: int
    limit: str
    rate: Schedule
    sparsity: SparsitySchedule
    k: KSchedule | None
    reconstruction_steps: int

    def check_made(self, steps: int, config: TrainConfig) -> None:
        """Raise ValueError where a run has made more steps than `config` allows now."""
        if steps > self.total_steps:
            value = getattr(config, self.limit) or 1
            allowed = "" if self.limit == "max_steps" else f", which allows {self.total_steps:,}"
            raise ValueError(
                f"the run has made {steps:,} steps, {self.limit} is {value:,}{allowed}"
            )

    def at(self, step: int) -> StepSettings:
        """Return the settings of step `step`, counted from 0."""
        k = None if self.k is None else self.k(step)
        alone = step < self.reconstruction_steps
        return StepSettings(self.rate(step), self.sparsity(step), k, reconstruction_only=alone)


def make_schedules(config: TrainConfig, sae: SAEConfig, rows_per_epoch: int) -> Schedules:
    """Make the schedules of a run over data of `rows_per_epoch` rows.

    Raises:
        ValueError: when the settings allow no step, or no fall of k.
    """
    limit, total_steps = _first_limit(config, rows_per_epoch)
    tokens_per_step = config.tokens_per_step
    rows_alone = min(rows_per_epoch * config.reconstruction_epochs, 2.0**62)
    alone = int(rows_alone) // tokens_per_step
    if alone >= total_steps:
        logger.warning(
            "reconstruction_epochs = %g are %d steps, and the run has %d: no other term is trained",
            *(config.reconstruction_epochs, alone, total_steps),
        )
    return Schedules(
        total_steps,
        limit,
        make_schedule(config, sae, total_steps),
        make_sparsity_schedule(config, total_steps, alone),
        make_k_schedule(config, sae, total_steps),
        alone,
    )
