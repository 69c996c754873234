"""The configuration of a registered architecture: `SAEConfig` with the settings that it adds."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from sae_fast.config.fields import configuration, field_names
from sae_fast.config.model_text import FromModelConfig
from sae_fast.config.sae import SAEConfig
from sae_fast.config.setting import (
    MISMATCH,
    Rules,
    checked,
    convert,
    describe,
    rules_of,
    setting,
)
from sae_fast.config.train import TrainConfig
from sae_fast.json_files import shown

_NAME = re.compile("[a-z][a-z0-9_]*")
# Flags of the command line beside the settings of model and training.
COMMAND_FLAGS = ("preset", "plugin", "config", "sweep", "live", "live_tokenizer")


def own_config(
    name: str, class_name: str, settings: type, shared: Sequence[str], registered_by: str
) -> type[SAEConfig]:
    """Make the configuration of an architecture.

    Args:
        name: the architecture, as `arch` names it.
        class_name: the name of its class.
        settings: a class with the settings that it adds, each with a type and `setting(default)`.
        shared: settings of SAEConfig that belong to other architectures and to this one too.
        registered_by: the module to import, for errors.

    Raises ValueError naming a setting that is unknown, without a default, or has a name in use.
    """
    for key in shared:
        if key not in rules_of(SAEConfig):
            raise ValueError(f"arch {name}: shared names {key!r}, which is no setting of SAEConfig")
    own, kinds = _checked_settings(name, settings)
    arch = next(item for item in dataclasses.fields(SAEConfig) if item.name == "arch")
    members: dict[str, Any] = {
        "__module__": settings.__module__,
        "__doc__": f"The model of arch {name}, see `SAEConfig`.",
        "__annotations__": {"arch": Literal[name], **kinds},
        "arch": dataclasses.field(default=name, metadata=arch.metadata),
        **own,
        "shared": tuple(shared),
        "registered_by": registered_by,
        "declared_in": (SAEConfig, *((settings,) if own else ())),
        "__reduce__": lambda self: (SAEConfig.from_dict, ({"arch": name, **self.given},)),
    }
    made = type(f"{class_name}Config", (SAEConfig,), members)
    made = dataclasses.dataclass(frozen=True, kw_only=True)(made)
    return configuration(**SAEConfig.aliases)(cast(type[SAEConfig], made))


def _checked_settings(name: str, settings: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that a class and its bases declare as fields, and their types."""
    kinds, values = _declared(name, settings)
    taken = {*COMMAND_FLAGS}
    for config in (SAEConfig, TrainConfig, FromModelConfig):
        taken |= {*field_names(config), *config.aliases}
    own: dict[str, Any] = {}
    for key, kind in kinds.items():
        if key in taken or hasattr(SAEConfig, key) or key.startswith("no_"):
            raise ValueError(f"arch {name}: setting {key} has the name of another setting")
        if not _NAME.fullmatch(key):
            raise ValueError(
                f"arch {name}: setting {key!r} must be a word of small letters, digits and _, as "
                "it is a flag too"
            )
        if not _is_kind(kind):
            raise ValueError(
                f"arch {name}: setting {key} must be a bool, int, float, str, Path, Literal, a "
                f"tuple of these, or None besides, got {kind}"
            )
        if key not in values:
            raise ValueError(f"arch {name}: setting {key} needs a default: {key} = setting(…)")
        declared = values[key]
        item = declared if isinstance(declared, dataclasses.Field) else setting(declared)
        rules = item.metadata.get("rules", Rules())
        if item.default is dataclasses.MISSING or convert(item.default, kind) is MISMATCH:
            default = "none" if item.default is dataclasses.MISSING else shown(item.default)
            raise ValueError(
                f"arch {name}: the default of setting {key} must be {describe(kind)}, got {default}"
            )
        checked(f"arch {name}: the default of setting {key}", item.default, kind, rules)
        if not own and not rules.heading:
            rules = dataclasses.replace(rules, heading=f"Architecture {name}")
        own[key] = dataclasses.field(default=item.default, metadata={"rules": rules})
    return own, kinds


def _declared(name: str, settings: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return types and values that a class declares, after the ones of its bases."""
    kinds: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for place in reversed(settings.__mro__[:-1]):
        try:
            own = inspect.get_annotations(place, eval_str=True)
        except NameError as error:
            raise ValueError(f"arch {name}: a type of its settings is unknown: {error}") from None
        fields = vars(place).get("__dataclass_fields__", {})  # where it is a dataclass itself
        kinds |= own
        values |= {**vars(place), **{key: fields[key] for key in own if key in fields}}
    for key, value in values.items():
        if isinstance(value, dataclasses.Field) and key not in kinds:
            raise ValueError(f"arch {name}: setting {key} needs a type: {key}: float = setting(…)")
    return kinds, values


def _is_kind(kind: Any) -> bool:
    """Return whether a type is one that values of settings can have."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return all(isinstance(word, str) for word in arguments)
    if typing.get_origin(kind) in (typing.Union, types.UnionType, tuple):
        return all(part is Ellipsis or _is_kind(part) for part in arguments)
    return kind in (bool, int, float, str, Path, type(None))
