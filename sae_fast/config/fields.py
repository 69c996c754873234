"""What every configuration dataclass shares: checked types, aliases, and strict JSON files.

A file holds sections, {"format_version": 1, "sae": {...}, "train": {...}}, or
the fields alone at its top level.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sae_fast.config.effects import Effect, IdleSettingError, check_effects
from sae_fast.json_files import JSONError, bounded, read_json, shown

FORMAT_VERSION = 1
_NAMED_KEYS = 5  # unknown ones in a message
_LONGEST_KEY = 60  # for which similar ones are looked up

Config = TypeVar("Config", bound="ConfigFile")


class ConfigFile:
    """Base of the frozen configuration dataclasses: validation, dictionaries and files."""

    section: ClassVar[str] = ""
    aliases: ClassVar[dict[str, str]] = {}
    effects: ClassVar[Mapping[str, Effect]] = {}  # see effects.py

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; nested configurations as nested dictionaries."""
        return dataclasses.asdict(typing.cast(Any, self))

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Make the configuration from JSON values; raises ValueError naming every unknown key."""
        reject_unknown_keys(values, [*field_names(cls), *cls.aliases])
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON, which `load` reads back equal."""
        content = {self.section: self.to_dict()} if self.section else self.to_dict()
        text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_saved(cls: type[Config], values: dict[str, Any]) -> Config:
        """Make the configuration of a run or model from what was saved with it.

        Settings that have no effect are left out: versions before they were refused wrote them.
        """
        values = dict(values)
        while True:
            try:
                return cls.from_dict(values)
            except IdleSettingError as error:
                del values[error.name]

    @classmethod
    def load(cls: type[Config], path: str | Path, *, saved: bool = False) -> Config:
        """Read a JSON file; raises ValueError naming the file and what in it is wrong.

        `saved` says that it was saved with a model or run, see `from_saved`.
        """
        try:
            values = read_settings(path)
            if cls.section and cls.section in values:
                reject_unknown_keys(values, SECTIONS)
                values = _section(values, cls.section)
            return cls.from_saved(values) if saved else cls.from_dict(values)
        except JSONError:
            raise
        except ValueError as error:
            raise ValueError(f"{path}: {bounded(str(error))}") from None

    @classmethod
    def _split_sections(
        cls, values: dict[str, Any], **sections: type[ConfigFile]
    ) -> dict[str, dict[str, Any]]:
        """The values of each section, from nested or flat values."""
        if any(name in values for name in sections):
            reject_unknown_keys(values, list(sections))
            return {name: _section(values, name) if name in values else {} for name in sections}
        return by_section(values, sections)

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {expected}, got {shown(getattr(self, name))}")

    def _check_effects(self) -> None:
        """Raise IdleSettingError for a given setting that has no effect beside the others."""
        check_effects(self, self.effects)

    def _check_types(self) -> None:
        """Check fields against their annotations; 1 becomes 1.0 and a list a tuple, where asked."""
        for name, annotation in field_types(type(self)).items():
            value = getattr(self, name)
            converted = convert(value, annotation)
            if converted is MISMATCH:
                is_whole = type(convert(1, annotation)) is int
                is_large = is_whole and isinstance(value, int) and abs(value) > LARGEST
                expected = f"at most {LARGEST}" if is_large else describe(annotation)
                raise ValueError(f"{name} must be {expected}, got {shown(value)}")
            object.__setattr__(self, name, converted)


SECTIONS = ("sae", "train")
_SECTION_CONFIGS: dict[str, type[ConfigFile]] = {}  # by section, as `with_aliases` finds them


def with_aliases(**aliases: str) -> Callable[[type[Config]], type[Config]]:
    """Let fields be given, and read, by another name as well: `alias="field"`."""

    def decorate(cls: type[Config]) -> type[Config]:
        original_init = cls.__init__

        @functools.wraps(original_init)
        def init(self: Config, *args: Any, **values: Any) -> None:
            _reject_unknown_settings(cls, values)
            for alias, name in aliases.items():
                if alias in values:
                    if name in values:
                        raise ValueError(f"{alias} is another name of {name}: give one of the two")
                    values[name] = values.pop(alias)
            original_init(self, *args, **values)

        cls.__init__ = init  # type: ignore[assignment]
        for alias, name in aliases.items():
            setattr(cls, alias, property(operator.attrgetter(name)))
        cls.aliases = dict(aliases)
        _SECTION_CONFIGS[cls.section] = cls
        return cls

    return decorate


def _reject_unknown_settings(cls: type[ConfigFile], settings: Iterable[str]) -> None:
    """Raise TypeError for a setting that a configuration lacks, naming the one that has it."""
    for name in settings:
        if name in (own := [*field_names(cls), *cls.aliases]):
            continue
        for other in _SECTION_CONFIGS.values():
            if name in [*field_names(other), *other.aliases]:
                raise TypeError(
                    f"{name} is a setting of {other.__name__}, not of {cls.__name__}: "
                    "RunConfig takes the settings of both"
                )
        raise TypeError(f"{cls.__name__} has no setting {_with_hint(name, own)}")


def by_section(
    values: Mapping[str, Any], sections: Mapping[str, type[ConfigFile]]
) -> dict[str, dict[str, Any]]:
    """Sort flat values by section; raises ValueError naming every key that no section has."""
    names = {name: [*field_names(config), *config.aliases] for name, config in sections.items()}
    reject_unknown_keys(values, [key for keys in names.values() for key in keys])
    return {
        name: {key: value for key, value in values.items() if key in keys}
        for name, keys in names.items()
    }


def reject_unknown_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError naming every key that is not known, with the nearest known one."""
    known = list(known)
    unknown = [key for key in keys if key not in known]
    if not unknown:
        return
    named = ", ".join(_with_hint(key, known) for key in unknown[:_NAMED_KEYS])
    more = f" and {len(unknown) - _NAMED_KEYS} more" if len(unknown) > _NAMED_KEYS else ""
    raise ValueError(f"unknown key{'s' if len(unknown) > 1 else ''} {named}{more}")


def _with_hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1) if len(name) < _LONGEST_KEY else []
    return f"{name!r} (did you mean {near[0]!r}?)" if near else shown(name)


def field_names(cls: type[ConfigFile]) -> list[str]:
    """Names of the fields, in order."""
    return [item.name for item in dataclasses.fields(typing.cast(Any, cls))]


def field_types(cls: type[ConfigFile]) -> dict[str, Any]:
    """Types of the fields by name, in order."""
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(typing.cast(Any, cls))}


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a JSON file, flat or in sections; raise ValueError if it holds none.

    What a file says of itself, its version and a model's origin, is left out.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"must hold a JSON object, got {type(values).__name__}")
    version = values.pop("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(f"format_version must be {FORMAT_VERSION}, got {shown(version)}")
    values.pop("origin", None)
    return values


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values[name]
    if not isinstance(section, dict):
        raise ValueError(f"section {name!r} must be a JSON object, got {shown(section)}")
    return section


MISMATCH = object()
LARGEST = 2**63 - 1  # whole number of a setting, which torch and HDF5 can take


def convert(value: Any, annotation: Any) -> Any:
    """`value` as the annotated type, or `MISMATCH`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        options = (convert(value, option) for option in arguments)
        return next((option for option in options if option is not MISMATCH), MISMATCH)
    if origin is typing.Literal:
        return value if isinstance(value, str) and value in arguments else MISMATCH
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return MISMATCH
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            return MISMATCH
        parts = tuple(convert(*pair) for pair in zip(value, arguments, strict=True))
        return MISMATCH if any(part is MISMATCH for part in parts) else parts
    if annotation is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return MISMATCH
        try:
            number = float(value)
        except OverflowError:  # an integer of hundreds of digits
            return MISMATCH
        return number if math.isfinite(number) else MISMATCH
    if annotation is int and (isinstance(value, bool) or not isinstance(value, int)):
        return MISMATCH
    if annotation is int:
        return value if abs(value) <= LARGEST else MISMATCH
    return value if isinstance(value, annotation) else MISMATCH


def describe(annotation: Any) -> str:
    """An annotated type, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of values, each {describe(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} values, each {describe(arguments[0])}"
    names = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "a string",
        type(None): "null",
    }
    return names.get(annotation, f"a {annotation.__name__}")
