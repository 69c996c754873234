"""The origin of activations: the model, hook point, text and settings that they are of.

A shard says it by its attributes, a dictionary in the section `origin` of its configuration. Both
are files that may come from elsewhere, and all of it is optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sae_fast.activations.targets import TARGETS
from sae_fast.json_files import JSONError, parse_json, shown

# Attributes that say what was captured: rows of two models or hooks must not be mixed.
ORIGIN = ("model", "hook", "layer")
TOLD = (*ORIGIN, "revision", "tokenizer", "dataset", "special_tokens")
SETTINGS = "settings"
VOCABULARY = "vocabulary"  # of the tokenizer, see capture/tokens.py, in the settings
# A description in place of the name, in activations of MiniLM: hook and layer that a capture gives.
_DESCRIBED = {
    "hidden_states[3] (residual stream after layer 3, post-LayerNorm)": ("residual.2", "2")
}
_NOT_STORED = "auto"  # the type of activations that went straight into a training
_DEEPEST = 3  # origin, targets, settings


def origin_of_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin that the attributes of a shard state.

    Texts by the names of `TOLD`, and under "settings" what decides how text became activations,
    where a capture has recorded it.
    """
    told: dict[str, Any] = {
        name: str(attributes[name]) for name in TOLD if attributes.get(name) not in (None, "")
    }
    if isinstance(recipe := attributes.get("capture"), str) and (settings := _settings_of(recipe)):
        told[SETTINGS] = dict(settings)
    return named(told)


def named(origin: dict[str, Any]) -> dict[str, Any]:
    """Return an origin with the name of the hook point where it has a known description of it."""
    known = _DESCRIBED.get(str(origin.get("hook")))
    return origin if known is None else {**origin, "hook": known[0], "layer": known[1]}


@lru_cache(maxsize=64)  # all shards of a capture have the same
def _settings_of(recipe: str) -> dict[str, str | int]:
    """Return the settings in the recipe of a capture, as JSON; of another text none."""
    try:
        content = parse_json(recipe)
    except JSONError:
        return {}
    model, dataset, settings = (_section(content, name) for name in ("model", "dataset", SETTINGS))
    chat, stored = _section(dataset, "chat"), settings.get("dtype")
    roles = chat.get("roles")
    found = {
        "weights": model.get("weights"),
        VOCABULARY: model.get(VOCABULARY),
        "dataset_config": dataset.get("config"),
        "split": dataset.get("split"),
        "text_column": dataset.get("text_column"),
        "target_column": dataset.get("target_column"),
        "chat_template": chat.get("template"),
        "roles": ", ".join(map(str, roles)) if isinstance(roles, list) else None,
        "ctx_len": settings.get("ctx_len"),
        "pack": settings.get("pack"),
        "model_dtype": settings.get("model_dtype"),
        "dtype": None if stored == _NOT_STORED else stored,
    }
    return {
        name: value for name, value in found.items() if isinstance(value, str | int) and value != ""
    }


def _section(content: object, name: str) -> dict[str, Any]:
    """Return an object inside an object; empty where either is none."""
    part = content.get(name) if isinstance(content, dict) else None
    return part if isinstance(part, dict) else {}


def vocabulary_difference(origin: Mapping[str, Any], given: str) -> str | None:
    """Return in words that a vocabulary is not the one of an origin; None: it may be the same.

    Args:
        origin: of activations or of a dictionary.
        given: a vocabulary, see `vocabulary_of`.
    """
    known = _section(origin, SETTINGS).get(VOCABULARY)
    if not known or given in str(known):  # of a mix it lists all
        return None
    return f"a vocabulary of {known}, and the tokenizer given has {given}"


def joined(origins: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one origin of several; a name for which they differ lists all values as a text."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for origin in origins for name in origin):
        values = [origin[name] for origin in origins if name in origin]
        if isinstance(values[0], dict):
            found[name] = joined(values)
        elif all(value == values[0] for value in values):
            found[name] = values[0]
        else:
            found[name] = ", ".join(dict.fromkeys(map(str, values)))
    return found


def checked_origin(content: object, where: str) -> dict[str, Any]:
    """Return an origin as it was read from a file.

    Raises ValueError, which begins with `where`, unless it is a JSON object of texts and whole
    numbers, and of objects of these.
    """
    return named(_checked(content, where, 1))


def _checked(content: object, where: str, depth: int) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a JSON object, got {shown(content)}")
    for name, value in content.items():
        if isinstance(value, dict) and depth < _DEEPEST:
            _checked(value, f"{where}.{name}", depth + 1)
        elif not isinstance(value, str | int):
            raise ValueError(f"{where}.{name} must be a string, got {shown(value)}")
    return content


def short_name(model: str) -> str:
    """Return the last part of a model's name or folder, by which models are told apart.

    GPT-2 has its name in TransformerLens, which dictionaries of SAELens state, made the usual one.
    """
    name = Path(model).name
    return "gpt2" if name == "gpt2-small" else name


def origin_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the difference of two origins in words; None where both may be of one place."""
    for name in ORIGIN:
        if name in before and name in now and str(before[name]) != str(now[name]):
            return f"{name} {before[name]!r}, not {now[name]!r}"
    ours, theirs = before.get(TARGETS), now.get(TARGETS)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        difference = origin_difference(ours, theirs)
        return None if difference is None else f"targets of {difference}"
    return None
