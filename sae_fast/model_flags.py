"""The command line of a training straight from a model: MODEL DATASET, then flags.

Some flags mean what they mean to users of trainers of this kind, such as --batch-size, which counts
sequences here. All others are those of a training on shards.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import Annotated, Any

import tyro

from sae_fast.command_line import parse
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.setting import Rules, rules_of
from sae_fast.flags import grouped, plain_switches
from sae_fast.training.from_model import (
    DEFAULT_K,
    SAE_DEFAULTS,
    TRAIN_DEFAULTS,
    FromModelConfig,
)

logger = logging.getLogger(__name__)
_RULES = rules_of(TrainConfig)

# Flags whose name is another here than in the configuration of a training.
_SYNONYMS = {
    "dead_feature_threshold": "dead_after_tokens",
    "num_latents": "d_sae",
    **FromModelConfig.aliases,
}

ADAM_DECAYS = "optimizer adam with a weight decay is adamw, decoupled from the gradient"

_Flags = list[tuple[str, list[str]]]  # as written, and the values of each


@dataclass(frozen=True)
class FromModelLine:
    """What a command line asks for.

    Attributes:
        model: a folder or a name on the hub.
        dataset: likewise, or files.
        settings: of the model and its text.
        given: names of the settings that the line gives.
        rest: the flags of the training.
    """

    model: str
    dataset: str
    settings: FromModelConfig
    given: frozenset[str]
    rest: list[str]


def from_model_line(
    arguments: Sequence[str], program: str, sources: type[Any]
) -> FromModelLine | None:
    """The command line of a training from a model; None: it begins with a flag.

    Args:
        arguments: of the command line.
        program: its name, for help.
        sources: the dataclass of flags that name files with settings, for help.

    Raises:
        ValueError: in one line for what is wrong with it.
    """
    if not arguments or arguments[0].startswith("-"):
        return None
    if len(arguments) < 2 or arguments[1].startswith("-"):
        raise ValueError(
            f"a model and a dataset are needed, MODEL DATASET, got {arguments[0]!r} alone "
            "(shards are named with --shard-dir)"
        )
    model, dataset, *flags = arguments
    if "--help" in flags or "-h" in flags:
        all_flags = _all_flags(sources)
        parse(all_flags, all_flags(), ["--help"], program)
    kinds = flag_kinds()
    own: _Flags = []
    rest: _Flags = []
    for flag, values in grouped(plain_switches(flags, kinds)):
        if not flag.startswith("--"):
            raise ValueError(f"unexpected {flag!r}: MODEL and DATASET, then flags")
        if (synonym := _SYNONYMS.get(_field(flag))) is not None:
            flag = f"--{synonym}"
        (own if _field(flag) in kinds else rest).append((flag, values))
    _check_mode(rest)
    settings = parse(FromModelConfig, FromModelConfig(), _spelt(own), program, kinds=kinds)
    given = frozenset(_field(flag) for flag, _ in own)
    return FromModelLine(model, dataset, settings, given, _spelt(_as_known_here(rest)))


def _check_mode(flags: _Flags) -> None:
    """Refuse flags of a training on shards, which would be ignored here."""
    for flag, _ in flags:
        name = _field(flag)
        rules = _RULES.get(name, Rules())
        if rules.shards_only:
            raise ValueError(f"{flag} is for training on shards: {rules.shards_only}")
        if rules.decided_by:
            raise ValueError(f"{flag} is for training on shards, here give --{rules.decided_by}")


def _as_known_here(flags: _Flags) -> _Flags:
    """The flags as trainers of this kind take them together.

    num_latents overrides expansion_factor, and adam takes a weight decay, as adamw does it.
    """
    values = {_field(flag): words for flag, words in flags}
    if "d_sae" in values:
        flags = [(flag, words) for flag, words in flags if _field(flag) != "expansion_factor"]
    decay = (values.get("weight_decay") or ["0"])[0]
    if values.get("optimizer") == ["adam"] and decay.strip("0.") != "":
        logger.info("weight_decay: %s", ADAM_DECAYS)
        is_adam = ("optimizer", ["adam"])
        return [
            (flag, ["adamw"] if (_field(flag), words) == is_adam else words)
            for flag, words in flags
        ]
    return flags


def _field(flag: str) -> str:
    """The field that a flag sets."""
    return flag.removeprefix("--").replace("-", "_").removeprefix("no_")


def _spelt(flags: _Flags) -> list[str]:
    """The flags as a command line."""
    return [word for flag, values in flags for word in (flag, *values)]


def flag_kinds() -> dict[str, Any]:
    """The type of every flag's value, by its name."""
    hints = typing.get_type_hints(FromModelConfig)
    return {item.name: hints[item.name] for item in fields(FromModelConfig)} | {"help": bool}


def _all_flags(sources: type[Any]) -> type[Any]:
    """A dataclass of all flags of this mode with their defaults in it, for its help."""
    defaults = {"k": DEFAULT_K, **SAE_DEFAULTS, **TRAIN_DEFAULTS}
    names = {name: f"--{alias.replace('_', '-')}" for alias, name in _ALIASES.items()}
    shown: dict[str, tuple[str, Any, Any]] = {}
    for config in (FromModelConfig, sources, SAEConfig, TrainConfig):
        texts, kinds = _help_texts(config), typing.get_type_hints(config)
        for item in fields(config):
            if item.name in shown or item.name in _NOT_SHOWN:
                continue
            aliases = [names[item.name]] if item.name in names else None
            argument = tyro.conf.arg(help=texts[item.name], aliases=aliases)
            default = defaults.get(item.name, item.default)
            shown[item.name] = item.name, Annotated[kinds[item.name], argument], default
    all_flags = make_dataclass("AllFlags", shown.values(), frozen=True)
    all_flags.__doc__ = FromModelConfig.__doc__
    return all_flags


# What needs shards, and the sections whose fields are shown one by one.
_NOT_SHOWN = {
    *(name for name, rules in _RULES.items() if rules.shards_only),
    *("seed", "checkpoint_every", "wandb_log_every"),
    *("transcoder", "probe_loss_coeff", "probe_labels", "probe_task", "probe_classes"),
    *("sae", "train"),
}
# Other names that help shows; all of them are understood.
_ALIASES = {
    "num_latents": "d_sae",
    "dead_feature_threshold": "dead_after_tokens",
    "lr": "learning_rate",
}


def _help_texts(config: type[Any]) -> dict[str, str]:
    """The text under each field of a dataclass, by name."""
    return dict(itertools.chain.from_iterable(map(_texts_in, reversed(config.__mro__))))


def _texts_in(kind: type[Any]) -> Iterator[tuple[str, str]]:
    if not is_dataclass(kind):
        return
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    for line, below in itertools.pairwise(definition.body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant):
                yield line.target.id, " ".join(str(text.value).split())
