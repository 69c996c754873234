"""Check a resume state as a whole before any of it is used.

The sums of a checkpoint tell damage. A state that is signed but was edited, or written by a faulty
tool, is caught here: names, types and ranges of its values, its tensors against this run's, and
its counters against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.config import RunConfig
from sae_fast.json_files import is_integer, is_number, require, shown
from sae_fast.tensor_files import is_finite
from sae_fast.training.checkpoint import CheckpointError

FORMAT_VERSION = 1  # of what a checkpoint holds beside the model
_OPTIONAL = ("average.", "rng.cuda.")
_WORDS = 624  # in the state of a Mersenne twister

_LARGEST = torch.finfo(torch.float32).max

_COUNT = "a whole number of at least 0"
_AMOUNT = "a number of at least 0"


def check_state(path: Path, state: dict[str, Any]) -> None:
    """Raise CheckpointError unless the values of the trainer.json at `path` fit each other.

    A state of another format version is left to `start.saved_config`, which says so.
    """
    if state.get("format_version") != FORMAT_VERSION:
        return
    try:
        check_values(state["step"], state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_values(step: int, state: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the field, unless the values of a trainer.json fit each other."""
    for name in ("tokens", "seconds", "stalled_seconds", "config", "loss_scaler", "source"):
        if name not in state:
            raise ValueError(f"has no {name}")
    require(is_integer(state["tokens"]), "tokens", _COUNT, state["tokens"])
    fits = state["tokens"] >= step and (state["tokens"] == 0) == (step == 0)
    require(fits, "tokens", f"a number that fits {step} steps", state["tokens"])
    for name in ("seconds", "stalled_seconds"):
        require(is_number(state[name], 0), name, _AMOUNT, state[name])
    _check_config(state["config"])
    _check_scaler(step, state["loss_scaler"])
    require(isinstance(state["source"], dict), "source", "a JSON object", state["source"])
    heldout = state.get("heldout")  # what older versions did not write
    require(heldout is None or isinstance(heldout, dict), "heldout", "a JSON object", heldout)
    _check_scheduler(step, state.get("scheduler_state"))
    _check_best(step, state.get("best"))
    wandb_id = state.get("wandb_id")
    is_id = wandb_id is None or (isinstance(wandb_id, str) and 0 < len(wandb_id) < 200)
    require(is_id, "wandb_id", "a string or null", wandb_id)
    check_random_values(state.get("random"))


def check_tensors(
    step: int, skipped: int, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Raise ValueError, naming the tensor, unless a trainer.safetensors fits this run.

    Args:
        step: the steps made.
        skipped: how many of them left the weights as they were.
        tensors: what was read.
        expected: the tensors of this run by their names; "average." ones may be left out together.
    """
    for name, like in expected.items():
        if name not in tensors:
            if name.startswith(_OPTIONAL):
                continue
            raise ValueError(f"has no tensor {name}")
        _check_tensor(name, tensors[name], like)
    averages = [name for name in expected if name.startswith("average.")]
    if 0 < sum(name in tensors for name in averages) < len(averages):
        missing = next(name for name in averages if name not in tensors)
        raise ValueError(f"has no tensor {missing}")
    for name in tensors.keys() - expected.keys():
        if not name.startswith(_OPTIONAL):
            raise ValueError(f"unknown tensor {name[:60]}")
    made = int(tensors["optimizer.step"])
    if made != step - skipped:
        raise ValueError(
            f"optimizer.step must be the {step - skipped} updates of {step} steps, got {made}"
        )
    for name in tensors:
        if name.startswith("rng."):
            _check_generator(name, tensors[name])


def check_random_values(values: Any) -> None:
    """Raise ValueError unless these are states of Python's and NumPy's generators."""
    require(isinstance(values, dict), "random", "a JSON object", values)
    python, numpy = values.get("python"), values.get("numpy")
    is_python = (
        isinstance(python, list)
        and len(python) == 3
        and python[0] == 3
        and _are_words(python[1], _WORDS + 1)
        and is_integer(python[1][-1], 0, _WORDS)
        and (python[2] is None or is_number(python[2]))
    )
    require(is_python, "random.python", "a state of Python's generator", python)
    is_numpy = (
        isinstance(numpy, list)
        and len(numpy) == 5
        and numpy[0] == "MT19937"
        and _are_words(numpy[1], _WORDS)
        and is_integer(numpy[2], 0, _WORDS)
        and is_integer(numpy[3], 0, 1)
        and is_number(numpy[4])
    )
    require(is_numpy, "random.numpy", "a state of NumPy's generator", numpy)


def _are_words(values: Any, count: int) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(is_integer(value, 0, 2**32 - 1) for value in values)


def _check_config(config: Any) -> None:
    both = isinstance(config, dict) and {"sae", "train"} <= config.keys()
    require(both, "config", "settings of a model and its training", config)
    try:
        RunConfig.from_saved(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config: {error}") from None


def _check_scaler(step: int, scaler: Any) -> None:
    require(isinstance(scaler, dict), "loss_scaler", "a JSON object", scaler)
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "enabled": (lambda value: isinstance(value, bool), "true or false"),
        "scale": (lambda value: is_number(value) and 0 < value <= _LARGEST, "in float32, above 0"),
        "steps_since_overflow": (lambda value: is_integer(value, 0, step), f"at most {step}"),
        "skipped_steps": (lambda value: is_integer(value, 0, step), f"at most {step}"),
    }
    for name, (fits, expected) in checks.items():
        require(fits(scaler.get(name)), f"loss_scaler.{name}", expected, scaler.get(name))


def _check_scheduler(step: int, scheduler: Any) -> None:
    """Raise ValueError unless the schedule fits the step; older versions did not write it."""
    if scheduler is None:
        return
    place = "scheduler_state"
    require(isinstance(scheduler, dict), place, "a JSON object", scheduler)
    made = scheduler.get("step")
    require(made == step and is_integer(made), f"{place}.step", f"the {step} steps made", made)
    for name in ("last_learning_rate", "peak_learning_rate"):
        require(is_number(scheduler.get(name), 0), f"{place}.{name}", _AMOUNT, scheduler.get(name))
    for name in ("warmup_steps", "decay_steps", "total_steps"):
        require(is_integer(scheduler.get(name)), f"{place}.{name}", _COUNT, scheduler.get(name))


def _check_best(step: int, best: Any) -> None:
    if best is None:
        return
    require(isinstance(best, dict), "best", "a JSON object or null", best)
    require(is_integer(best.get("step"), 0, step), "best.step", f"at most {step}", best.get("step"))
    for name, value in best.items():
        require(is_number(value), f"best.{name[:40]}", "a number", value)


def _check_tensor(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must be of {like.dtype}, got {tensor.dtype}")
    if not is_finite(tensor):
        raise ValueError(f"{name} holds NaN or Inf")
    is_positive = name.endswith(("_scale", "exp_avg_sq", "lr_squares", "optimizer.step"))
    if is_positive and tensor.dtype != torch.uint8 and tensor.numel():
        least = tensor.min()
        if bool(least < 0):
            raise ValueError(f"{name} must not be negative, got {least.item():g}")


def _check_generator(name: str, state: Tensor) -> None:
    if not name.startswith("rng.cpu"):
        if state.dtype != torch.uint8 or state.dim() != 1:
            raise ValueError(f"{name} must be the state of a generator")
        return
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} is no state of a generator ({shown(str(error))})") from None
