"""What is wrong with a command line, in one line that names the flag and what it takes.

tyro says it in a box over many lines; this tells of the mistakes that users make most: a flag that
there is not, a value of another kind, a value too few or too many. What it does not see, tyro does.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from sae_fast.config.setting import MISMATCH, convert, describe

_NUMBERS = {int: int, float: float}
# Flags of other trainers, and what has their place here.
_ELSEWHERE = {
    "model": "--preset NAME takes the settings for a well-known model; to train on the activations "
    "of one, MODEL DATASET come first, without a flag",
}
# By another trainer's name of a setting, the field that has its place here.
_NAMED_OTHERWISE = {
    **dict.fromkeys(("architecture", "sae_type"), "arch"),
    **dict.fromkeys(("steps", "n_steps", "num_steps", "training_steps"), "max_steps"),
    **dict.fromkeys(("dict_size", "d_hidden", "n_latents", "n_features", "latents"), "d_sae"),
    **dict.fromkeys(
        ("l1_coefficient", "l1_coeff", "l1", "sparsity_coefficient"), "l1_penalty_coeff"
    ),
    **dict.fromkeys(("output_dir", "out", "save_path", "checkpoint_path"), "checkpoint_dir"),
    **dict.fromkeys(("data_dir", "data", "activations", "shards"), "shard_dir"),
    **dict.fromkeys(("topk", "top_k", "activation_k"), "k"),
    **dict.fromkeys(("wandb", "log_to_wandb", "use_wandb"), "wandb_project"),
    **dict.fromkeys(("lr_scheduler", "lr_decay_steps", "scheduler"), "decay_fraction"),
    "lr_warm_up_steps": "warmup_steps",
    "epochs": "max_epochs",
    "resume": "resume_from",
}
_SWITCH_WORDS = {"true": True, "false": False}


def first_mistake(arguments: Sequence[str], kinds: Mapping[str, Any]) -> str | None:
    """The first mistake of a command line; None: none was found.

    Args:
        arguments: the command line, as given.
        kinds: by name of the field that a flag sets, the type of its value.
    """
    names = {name: name for name in kinds} | {
        f"no_{name}": name for name, kind in kinds.items() if kind is bool
    }
    for flag, values in grouped(arguments):
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            return f"unexpected {flag!r}: a flag begins with --"
        if name not in names:
            if name in _ELSEWHERE:
                return f"unknown flag {flag}: {_ELSEWHERE[name]}"
            here = _NAMED_OTHERWISE.get(name)
            near = difflib.get_close_matches(name, names, n=1)
            if here is not None and here in names:
                near = [here]
            return f"unknown flag {flag}{_hint(near, '--')}"
        mistake = _mistake_in(values, kinds[names[name]])
        if mistake is not None:
            return f"{flag} {mistake}"
    return None


def plain_switches(arguments: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """The same command line with `--flag true` as `--flag`, and `--flag false` as `--no-flag`."""
    result: list[str] = []
    skip = False
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if skip:
            skip = False
            continue
        flag, equals, value = argument.partition("=")
        value = value if equals else following
        name = flag.removeprefix("--").replace("-", "_")
        is_switch = flag.startswith("--") and kinds.get(name) is bool
        if not is_switch or value.lower() not in _SWITCH_WORDS:
            result.append(argument)
            continue
        result.append(flag if _SWITCH_WORDS[value.lower()] else f"--no-{flag[2:]}")
        skip = not equals
    return result


def grouped(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the values behind it; a value before all flags stands for itself."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            found.append((flag, [value] if equals else []))
        elif not found:
            found.append((argument, []))
        else:
            found[-1][1].append(argument)
    return found


def _mistake_in(values: list[str], kind: Any) -> str | None:
    """What is wrong with the values of a flag."""
    arms = typing.get_args(kind) if _is_union(kind) else (kind,)
    kinds = [arm for arm in arms if arm is not type(None)]
    if len(kinds) != 1 or (len(kinds) < len(arms) and values == ["None"]):
        return None
    (kind,) = kinds
    if typing.get_origin(kind) is tuple:
        return _mistake_in_list(values, typing.get_args(kind))
    if kind is bool:
        return f"takes no value, got {values[0]!r}" if values else None
    if len(values) != 1:
        got = f"got {' '.join(values)!r}" if values else "got none"
        return f"must be {describe(kind)}, one value, {got}"
    return _mistake_in_value(values[0], kind)


def _mistake_in_list(values: list[str], kinds: tuple[Any, ...]) -> str | None:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    for value, kind in zip(values, kinds, strict=False):
        if (mistake := _mistake_in_value(value, kind)) is not None:
            split = ": values are separated by spaces" if "," in value else ""
            return f"{mistake}{split}"
    if not values:
        return "needs values, got none"
    if len(values) != len(kinds):
        return f"must be {len(kinds)} values, got {' '.join(values)!r}"
    return None


def _mistake_in_value(text: str, kind: Any) -> str | None:
    value: Any = text
    if kind in _NUMBERS:
        try:
            value = _NUMBERS[kind](text)
        except ValueError:
            value = None
    elif typing.get_origin(kind) is not typing.Literal:
        return None
    if convert(value, kind) is not MISMATCH:
        return None
    near = difflib.get_close_matches(text.lower(), typing.get_args(kind), n=1)
    return f"must be {describe(kind)}, got {text!r}{_hint(near)}"


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _hint(near: list[str], prefix: str = "") -> str:
    spelt = [f"{prefix}{name.replace('_', '-')}" if prefix else repr(name) for name in near]
    return f" (did you mean {spelt[0]}?)" if spelt else ""
