"""The base of the configurations: given and filled-in settings, other names, strict JSON files.

A file holds sections, {"format_version": 1, "sae": {...}, "train": {...}}, or
the fields alone at its top level.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import operator
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from sae_fast.config.effects import IdleSettingError
from sae_fast.config.setting import checked, describe, rules_of
from sae_fast.json_files import JSONError, bounded, read_json, shown

FORMAT_VERSION = 1
_NAMED_KEYS = 5  # unknown ones in a message
_LONGEST_KEY = 60  # for which similar ones are looked up

Config = TypeVar("Config", bound="ConfigFile")


class ConfigFile:
    """Base of the frozen configuration dataclasses: dictionaries and files.

    Attributes:
        title: the heading over its settings in the short help.
        section: the key of the configuration in files that hold several.
        aliases: by another name of a setting, the name of its field.
        declared_in: the classes whose source declares the settings and their texts; default: the
            configuration and those that it is derived from.
        given: the settings that the configuration was made with, by name of the field. The fields
            hold these, and defaults or what follows from the others (`completed`) for the rest.
    """

    title: ClassVar[str] = "Flags"
    section: ClassVar[str] = ""
    aliases: ClassVar[dict[str, str]] = {}
    declared_in: ClassVar[tuple[type, ...]] = ()
    given: Mapping[str, Any]

    @classmethod
    def completed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings with those filled in that were left open and follow from others."""
        return settings

    @classmethod
    def converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return given values with other forms of a value turned into the form of its type."""
        return values

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left open that follows from the data."""
        return True

    def with_room(self, size: int) -> dict[str, Any]:
        """Return the settings that stand for open sizes where these are to be about `size`."""
        return {}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default of every setting by name."""
        return {item.name: item.default for item in dataclasses.fields(typing.cast(Any, cls))}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values; nested configurations as nested dictionaries."""
        return dataclasses.asdict(typing.cast(Any, self))

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Make the configuration from JSON values; raise ValueError naming every unknown key."""
        reject_unknown_keys(values, [*field_names(cls), *cls.aliases])
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON, which `load` reads back equal."""
        content = {self.section: self.to_dict()} if self.section else self.to_dict()
        text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_saved(cls: type[Config], values: dict[str, Any]) -> Config:
        """Make the configuration of a run or model from the values saved with it.

        Settings that have no effect are left out: older versions accepted and wrote them.
        """
        values = dict(values)
        while True:
            try:
                return cls.from_dict(values)
            except IdleSettingError as error:
                del values[error.name]

    @classmethod
    def load(cls: type[Config], path: str | Path, *, saved: bool = False) -> Config:
        """Read a JSON file; raise ValueError naming the file and the value in it that is wrong.

        Args:
            path: the file.
            saved: whether it was saved with a model or run, see `from_saved`.
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
        """Return the values of each section, from nested or flat values."""
        if any(name in values for name in sections):
            reject_unknown_keys(values, list(sections))
            return {name: _section(values, name) if name in values else {} for name in sections}
        return by_section(values, sections)


SECTIONS = ("sae", "train")
_SECTION_CONFIGS: dict[str, type[ConfigFile]] = {}  # by section, as `configuration` finds them


def configuration(**aliases: str) -> Callable[[type[Config]], type[Config]]:
    """Let a frozen dataclass of settings check what it is given, and fill in what it leaves open.

    Names, types and ranges are checked before the fields are set, each of them once; relations
    between settings are checked in the dataclass's `__post_init__`.

    Args:
        aliases: other names by which fields are given and read: `alias="field"`.
    """

    def decorate(cls: type[Config]) -> type[Config]:
        set_fields = cls.__init__

        @functools.wraps(set_fields)
        def init(self: Config, *args: Any, **values: Any) -> None:
            given = _checked_values(cls, args, values)
            object.__setattr__(self, "given", given)
            set_fields(self, **cls.completed({**cls.defaults(), **given}))

        cls.__init__ = init  # type: ignore[assignment]
        for alias, name in aliases.items():
            setattr(cls, alias, property(operator.attrgetter(name)))
        cls.aliases = dict(aliases)
        if cls.section:
            _SECTION_CONFIGS.setdefault(cls.section, cls)
            summary = inspect.cleandoc(cls.__doc__ or "")
            cls.__doc__ = _Documentation(summary)  # type: ignore[assignment]
        return cls

    return decorate


def _checked_values(
    cls: type[ConfigFile], args: tuple[Any, ...], values: dict[str, Any]
) -> dict[str, Any]:
    """Return the values given to a configuration by names of fields, each with its type."""
    _reject_unknown_settings(cls, values)
    places = [item.name for item in dataclasses.fields(typing.cast(Any, cls)) if not item.kw_only]
    if len(args) > len(places):
        raise TypeError(f"{cls.__name__} takes {len(places)} settings by place, got {len(args)}")
    given = dict(zip(places, args, strict=False))
    for key, value in values.items():
        name = cls.aliases.get(key, key)
        if name in given or (name != key and name in values):
            raise ValueError(f"{key} is another name of {name}: give one of the two")
        given[name] = value
    given = cls.converted(given)
    kinds, rules = field_types(cls), rules_of(cls)
    return {
        name: checked(name, given[name], kind, rules[name])
        for name, kind in kinds.items()
        if name in given
    }


def _reject_unknown_settings(cls: type[ConfigFile], settings: Iterable[str]) -> None:
    """Raise TypeError for a setting that a configuration lacks, naming the one that has it."""
    own = [*field_names(cls), *cls.aliases]
    for name in settings:
        if name in own:
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
    """Sort flat values by section; raise ValueError naming every key that no section has."""
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
    """Return the names of the fields, in order."""
    return [item.name for item in dataclasses.fields(typing.cast(Any, cls))]


_types: dict[type[ConfigFile], dict[str, Any]] = {}  # known, because finding them takes long


def field_types(cls: type[ConfigFile]) -> dict[str, Any]:
    """Return the types of the fields by name, in order."""
    if cls not in _types:
        hints = typing.get_type_hints(cls)
        _types[cls] = {name: hints[name] for name in field_names(cls)}
    return _types[cls]


def set_choices(cls: type[ConfigFile], name: str, choices: Iterable[str]) -> None:
    """Let a field of a configuration, which is one of several words, be one of these words."""
    field_types(cls)[name] = typing.cast(Any, Literal)[tuple(choices)]


@functools.cache
def field_texts(config: type[Any]) -> dict[str, str]:
    """Return the text under each field of a configuration, its help, by name.

    A field declared by `same_as` without a text has the text of the other configuration.
    """
    bases = [cls for cls in reversed(config.__mro__[1:]) if dataclasses.is_dataclass(cls)]
    first, *others = config.declared_in or (*bases, config)
    texts = _texts_in(first)
    for place in others:
        with contextlib.suppress(OSError, TypeError):  # it has no source, as in a notebook
            texts |= _texts_in(place)
    for item in dataclasses.fields(config):
        if item.name not in texts and "declared_by" in item.metadata:
            texts[item.name] = field_texts(item.metadata["declared_by"])[item.name]
    return texts


def _texts_in(config: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for line, below in itertools.pairwise(definition.body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant):
                texts[line.target.id] = " ".join(str(text.value).split())
    return texts


class _Documentation:
    """The docstring of a configuration's class, followed by the text of every setting.

    It is put together when it is asked for: the texts are read from the source.
    """

    def __init__(self, summary: str) -> None:
        self.summary = summary

    def __get__(self, instance: object, owner: type[ConfigFile]) -> str:
        try:
            texts, kinds = field_texts(typing.cast(Any, owner)), field_types(owner)
        except OSError:  # there is no source
            return self.summary
        lines = [self.summary, "", "Settings:"]
        for name, kind in kinds.items():
            default = owner.defaults()[name]
            head = f"{name}: {describe(kind)}; default {shown(default)}"
            lines += ["", *_wrapped(head, 4), *_wrapped(texts[name], 8)]
        return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    lines = textwrap.wrap(text, 92 - indent, break_on_hyphens=False)
    return [" " * indent + line for line in lines]


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a JSON file, flat or in sections; raise ValueError if it holds none.

    The version of the file, and origin and units of a model in it, are left out.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"must hold a JSON object, got {type(values).__name__}")
    version = values.pop("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(f"format_version must be {FORMAT_VERSION}, got {shown(version)}")
    for name in ("origin", "units"):
        values.pop(name, None)
    return values


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values[name]
    if not isinstance(section, dict):
        raise ValueError(f"section {name!r} must be a JSON object, got {shown(section)}")
    return section
