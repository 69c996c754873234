"""What a checkpoint holds beside the model, and how a trainer takes it over again.

trainer.safetensors: optimiser states, torch's generators, weights beside the model's. trainer.json:
configuration, counters, loss scale, position in the data, the other generators, the run's Weights &
Biases id.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import sae_fast
from sae_fast.config import RunConfig, SAEConfig
from sae_fast.json_files import require
from sae_fast.training.checkpoint import Checkpoint, CheckpointError
from sae_fast.training.random_state import random_tensors, random_values, restore_random
from sae_fast.training.resume_state import check_tensors, check_values

if TYPE_CHECKING:
    from sae_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_OPTIMIZER = "optimizer."
# Settings that may change between a run and its resumption without changing a single bit.
_HARMLESS = (
    *(
        "shard_dir",
        *("mix", "keep_in_memory", "pin", "device_cache"),
        "heldout",
        "target_shard_dir",
        "target_heldout",
        "checkpoint_dir",
        "resume_from",
        "num_threads",
        "log_every",
        "wandb_log_every",
    ),
    *("eval_every", "checkpoint_every", "keep_checkpoints", "wandb_project", "no_wandb"),
    *("cuda_graph", "dead_percentage_threshold"),
)


def take_snapshot(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON values that resuming needs."""
    state = {
        "format_version": FORMAT_VERSION,
        "versions": {"sae_fast": sae_fast.__version__, "torch": torch.__version__},
        "config": trainer.config.to_dict(),
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        "stalled_seconds": trainer.stalled_seconds,
        "scheduler_state": trainer.schedules.rate.state(trainer.step),
        "best": trainer.best,
        "loss_scaler": trainer.scaler.state(),
        "source": trainer.batches.state_dict(),
        "heldout": trainer.data.heldout_identity,
        "random": random_values(),
        "wandb_id": trainer.wandb_id,
    }
    return _own_tensors(trainer), state


def restore_snapshot(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Puts optimiser, counters, data position and generators back to where they were.

    Raises:
        CheckpointError: when the data or the settings do not let the run go on, or the state does
            not fit the model; nothing of it has been taken over then.
    """
    state, tensors = checkpoint.state, checkpoint.tensors
    skipped = state["loss_scaler"]["skipped_steps"]
    optimizer = {
        name.removeprefix(_OPTIMIZER): value
        for name, value in tensors.items()
        if name.startswith(_OPTIMIZER)
    }
    try:
        trainer.optimizer.check_rule(optimizer)
        check_tensors(checkpoint.step, skipped, tensors, _own_tensors(trainer))
        trainer.batches.load_state_dict(state["source"])
        trainer.data.check_heldout(state.get("heldout"))
        served = trainer.batches.rows_served()
        require(served in (None, state["tokens"]), "source", f"{state['tokens']} tokens on", served)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
    trainer.optimizer.load_state_dict(optimizer)
    if trainer.average is not None:
        trainer.average.load_state_dict(tensors)
    if trainer.schedule_free is not None:
        trainer.schedule_free.load_state_dict(tensors)
    trainer.scaler.load(state["loss_scaler"])
    trainer.step = checkpoint.step
    trainer.tokens = int(state["tokens"])
    trainer.seconds = float(state["seconds"])
    trainer.stalled_seconds = float(state["stalled_seconds"])
    trainer.best = state.get("best")
    trainer.wandb_id = state.get("wandb_id")
    restore_random(tensors, state["random"])
    harmless = set(_HARMLESS)
    # Dense codes, and a skip connection: torch's products follow the threads.
    if trainer.sae.architecture.waits or trainer.sae_config.skip_connection:
        harmless.remove("num_threads")
    before = state.get("scheduler_state")  # not in checkpoints of older versions
    if before is not None and (told := trainer.schedules.rate.told_after(before)) is not None:
        logger.info("%s", told)
    _tell_changes(state["config"]["train"], trainer.config.to_dict()["train"], harmless)


def check_snapshot(path: Path, state: dict[str, Any]) -> None:
    """Raise CheckpointError unless the values of a trainer.json fit each other.

    One of another format is left to `saved_config`, which says so.
    """
    if state.get("format_version") != FORMAT_VERSION:
        return
    try:
        check_values(state["step"], state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _own_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The tensors that a snapshot of this trainer has."""
    optimizer = trainer.optimizer.state_dict()
    tensors = {_OPTIMIZER + name: value for name, value in optimizer.items()}
    if trainer.average is not None:
        tensors |= trainer.average.state_dict()
    if trainer.schedule_free is not None:
        tensors |= trainer.schedule_free.state_dict()
    return {**tensors, **random_tensors()}


def saved_config(checkpoint: Checkpoint) -> RunConfig:
    """The configuration of the run that wrote a checkpoint."""
    version = checkpoint.state.get("format_version")
    if version != FORMAT_VERSION:
        known = f"this version reads {FORMAT_VERSION}"
        raise CheckpointError(f"{checkpoint.path}: format version {version}, {known}")
    return RunConfig.from_saved(checkpoint.state["config"])


def sized_config(
    config: SAEConfig, d_in: int, checkpoint: Checkpoint | None, d_out: int = 0
) -> SAEConfig:
    """The configuration for these widths of activations and targets, those of the checkpoint.

    Raises:
        CheckpointError: naming the first field in which the checkpoint's model is another.
    """
    if checkpoint is None:
        return config.with_d_in(d_in, d_out)
    before = saved_config(checkpoint).sae
    if before.d_in != d_in:
        raise CheckpointError(
            f"{checkpoint.path} is of a model with d_in = {before.d_in}, "
            f"these activations are {d_in} wide"
        )
    # Forms that are left open go on as they were, also where their default has changed since.
    forms = {
        name: getattr(before, name)
        for name in ("decorrelation", "correlation_pairs")
        if getattr(config, name) is None
    }
    config = replace(config, **forms).with_d_in(d_in, d_out)
    for name, value in config.to_dict().items():
        known = getattr(before, name)
        if name != "expansion_factor" and known != value:  # that one only says d_sae again
            raise CheckpointError(
                f"{checkpoint.path} is of a model with {name} = {known}, this run's has {value}"
            )
    return config


def _tell_changes(before: dict[str, Any], now: dict[str, Any], harmless: set[str]) -> None:
    changes = [
        f"{name} {before.get(name)} -> {value}"
        for name, value in now.items()
        if name not in harmless and _plain(before.get(name)) != _plain(value)
    ]
    if changes:
        logger.warning("resumed with other settings than before: %s", ", ".join(changes))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
