"""The command line of every command, made from the fields of its configurations.

One grammar serves all commands. A word that begins with -- names a setting, with hyphens or
underscores; the words after it, as many as the setting takes, are its values. `--flag=value` is
the same. A switch stands alone, or before true or false, and has a negative form, --no-flag. The
last of two values of a setting counts. `read` returns the values that were given and no defaults,
so that a command lays them over presets and files as dictionaries.

Why neither argparse nor tyro reads the lines: most of a parser is its messages, and each message
here names the flag, the values it takes, the value it got and the nearest name. argparse reads
`--k 3 4` as k = 3 beside an unknown argument 4, reports unknown flags last, and knows neither
ranges nor the names of settings in other trainers. What it does well, turning words into typed
values, is `convert` in setting.py, which JSON files need as well. tyro prints a box of many lines,
which a second parser had to turn into one. With one parser of its own the package has one place for
types, one dependency less, and help that imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import shutil
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sae_fast.config.fields import ConfigFile, field_texts, field_types
from sae_fast.config.setting import MISMATCH, Rules, convert, describe, rules_of

_SWITCH_WORDS = {"true": True, "false": False}
_HELP = ("-h", "--help", "--help-all")
_VERSION = "--version"
_WIDEST, _NARROWEST = 100, 50  # columns of help
_COLUMN = 29  # where the texts of the short help begin
_NAMES: dict[Any, str] = {str: "a name", Path: "a path"}

Parsed = TypeVar("Parsed", bound=ConfigFile)
Given = dict[str, dict[str, Any]]  # values by section and name


@dataclass(frozen=True)
class Flag:
    """A setting as a flag, or as a word with a fixed place on the command line.

    Attributes:
        section: the key of its configuration in the command line's `sections`.
        name: the field.
        kind: the type of the field.
        default: the value where none is given, for help.
        is_own_default: whether this command has another default than the configuration.
        rules: the rules of the setting.
        aliases: other names of the field.
        config: the configuration.
    """

    section: str
    name: str
    kind: Any
    default: Any
    is_own_default: bool
    rules: Rules
    aliases: tuple[str, ...]
    config: type[ConfigFile]

    @property
    def text(self) -> str:
        """The help: the text under the field."""
        return field_texts(typing.cast(Any, self.config)).get(self.name, "")

    @property
    def value_kind(self) -> Any:
        """The type of the field without None."""
        arms = _arms(self.kind)
        return next(arm for arm in arms if arm is not type(None))

    @property
    def choices(self) -> tuple[str, ...]:
        """The values to choose from; none where the type has others."""
        kind = self.value_kind
        return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()

    @property
    def spellings(self) -> list[str]:
        """The flag as it is written, by each of its names; none of a setting by place."""
        if self.rules.positional:
            return []
        negative = [f"no_{self.name}"] if self.is_switch and self.default else []
        names = sorted((self.name, *self.aliases), key=lambda name: name != self.rules.spelt)
        return [_spelt(name) for name in (*names, *negative)]

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.value_kind is bool

    @property
    def takes(self) -> int | None:
        """The number of values; None: any number."""
        kind = self.value_kind
        if typing.get_origin(kind) is not tuple:
            return 0 if self.is_switch else 1
        parts = typing.get_args(kind)
        return None if parts[-1] is Ellipsis else len(parts)

    def read(self, flag: str, values: Sequence[str]) -> Any:
        """Return the value that words stand for; raise ValueError, which names them as `flag`."""
        kind = self.value_kind
        if kind is not self.kind and list(values) == ["None"]:
            return None
        if not values and self.rules.bare:
            return int(self.rules.bare) if kind is int else self.rules.bare
        if typing.get_origin(kind) is tuple:
            return self._read_several(flag, values, typing.get_args(kind))
        if len(values) != 1:
            got = f"got {' '.join(values)!r}" if values else "got none"
            raise ValueError(f"{flag} must be {describe(kind)}, one value, {got}")
        return _read_one(flag, values[0], kind)

    def _read_several(self, flag: str, values: Sequence[str], kinds: tuple[Any, ...]) -> Any:
        if not values and self.default == ():
            return ()
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(values)
        read = [
            _read_one(flag, value, kind, ": values are separated by spaces" * ("," in value))
            for value, kind in zip(values, kinds, strict=False)
        ]
        if not values:
            raise ValueError(f"{flag} needs values, got none")
        if len(values) != len(kinds):
            raise ValueError(f"{flag} must be {len(kinds)} values, got {' '.join(values)!r}")
        return tuple(read)


@dataclass(frozen=True)
class CommandLine:
    """The command line of one command.

    Args:
        usage: how the command is called, one way a line.
        about: what the command does, for help.
        sections: its configurations by a name for each. A field of several of them is a flag of the
            first one.
        defaults: defaults that help shows in place of the defaults of the fields.
        refused: by name of a field that is no flag of this command, the words that say so.
        hidden: names of fields that help leaves out.
        note: the last lines of the help.
    """

    usage: str
    about: str
    sections: Mapping[str, type[ConfigFile]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hidden: Collection[str] = ()
    note: str = ""

    def read(self, arguments: Sequence[str]) -> Given:
        """Return the values that a command line gives, by section and field; print help if asked.

        Raises:
            ValueError: in one line that names the flag at fault and what helps.
            SystemExit: with code 0, after help or the version.
        """
        if _VERSION in arguments:
            print(version())
            raise SystemExit(0)
        if asked := [word for word in arguments if word in _HELP]:
            print(self.help(everything="--help-all" in asked))
            raise SystemExit(0)
        names, places = self._names(), self._places()
        given: Given = {section: {} for section in self.sections}
        positional: list[str] = []
        for word, values in _grouped(arguments):
            if not word.startswith("--"):
                if not places:
                    raise ValueError(f"unexpected {word!r}: a flag begins with --")
                positional += [word, *values]
                continue
            flag, value, unused = self._read_flag(word, values, names, bool(places))
            given[flag.section][flag.name] = value
            positional += unused
        for place in places:
            count = len(positional) if place.takes is None else 1
            words, positional = positional[:count], positional[count:]
            if words:
                given[place.section][place.name] = place.read(place.rules.metavar, words)
        if positional:
            raise ValueError(f"unexpected {positional[0]!r}: a flag begins with --")
        return given

    def _read_flag(
        self, word: str, values: list[str], names: Mapping[str, Flag], has_places: bool
    ) -> tuple[Flag, Any, list[str]]:
        """Return a flag, its value, and the words after it that are not its values."""
        key = _key(word)
        positive = key.removeprefix("no_") if key not in names else key
        flag = names.get(positive)
        if flag is None or (positive != key and not flag.is_switch):
            raise ValueError(self._unknown(word, key, names))
        if flag.name in self.refused:
            raise ValueError(f"{word} {self.refused[flag.name]}")
        if key in flag.aliases and key != flag.rules.spelt:
            word = _spelt(flag.name)
        if flag.is_switch:
            is_on = positive == key
            if values and values[0].lower() in _SWITCH_WORDS:
                is_on = is_on == _SWITCH_WORDS[values.pop(0).lower()]
            if values and not has_places:
                raise ValueError(f"{word} takes no value, got {values[0]!r}")
            return flag, is_on, values
        count = len(values) if flag.takes is None or not has_places else flag.takes
        return flag, flag.read(word, values[:count]), values[count:]

    def _unknown(self, word: str, key: str, names: Mapping[str, Flag]) -> str:
        """Return what to say of a flag that does not exist, with the nearest one that does."""
        for flag in names.values():
            if key in flag.rules.instead:
                return f"unknown flag {word}: {flag.rules.instead[key]}"
        known = [*names, *(f"no_{name}" for name, flag in names.items() if flag.is_switch)]
        here = [name for name, flag in names.items() if key in flag.rules.elsewhere]
        near = here[:1] or difflib.get_close_matches(key, known, n=1)
        return f"unknown flag {word}{_hint(map(_spelt, near))}"

    def flags(self) -> list[Flag]:
        """Return the settings of all configurations in order, those refused and by place too."""
        flags: dict[str, Flag] = {}
        for section, config in self.sections.items():
            kinds, defaults = field_types(config), config.defaults()
            for name, rules in rules_of(config).items():
                aliases = tuple(key for key, field in config.aliases.items() if field == name)
                if name in flags or any(name in flag.aliases for flag in flags.values()):
                    continue
                flags[name] = Flag(
                    section,
                    name,
                    kinds[name],
                    self.defaults.get(name, defaults[name]),
                    name in self.defaults,
                    rules,
                    aliases,
                    config,
                )
        return list(flags.values())

    def _places(self) -> list[Flag]:
        return [flag for flag in self.flags() if flag.rules.positional]

    def _names(self) -> dict[str, Flag]:
        """Return the flags by each of their names."""
        flags = [flag for flag in self.flags() if not flag.rules.positional]
        return {name: flag for flag in flags for name in (flag.name, *flag.aliases)}

    def help(self, *, everything: bool) -> str:
        """Return the help: all flags with their texts, or one line for each of the most used."""
        width = min(max(shutil.get_terminal_size((_WIDEST, 24)).columns, _NARROWEST), _WIDEST)
        usage = textwrap.indent(self.usage, "       ").strip()
        lines = [f"usage: {usage}"]
        for paragraph in self.about.split("\n\n"):
            lines += ["", *textwrap.wrap(paragraph, width)]
        hidden = {*self.refused, *self.hidden}
        flags = [flag for flag in self.flags() if flag.name not in hidden]
        brief = [flag for flag in flags if flag.rules.brief or flag.rules.positional]
        if everything or not any(flag.rules.brief for flag in flags):
            for number, flag in enumerate(flags):
                if flag.rules.heading or number == 0:
                    lines += ["", flag.rules.heading or "Flags"]
                lines += _full(flag, width)
            return "\n".join([*lines, *self._note(width)])
        for section, group in itertools.groupby(brief, lambda flag: flag.section):
            lines += ["", self.sections[section].title]
            lines += itertools.chain.from_iterable(_short(flag, width) for flag in group)
        more = len(flags) - len(brief)
        last = f"--help-all shows {more} more flags, and all in full; --version the version"
        return "\n".join([*lines, *self._note(width), "", last])

    def _note(self, width: int) -> list[str]:
        return ["", *textwrap.wrap(self.note, width)] if self.note else []


def version() -> str:
    """Return the name and the version of the package, as `--version` prints them."""
    import sae_fast

    return f"sae_fast {sae_fast.__version__}"


def of_one(config: type[ConfigFile], usage: str) -> CommandLine:
    """Return the command line of a command with one configuration, whose docstring is the help."""
    return CommandLine(usage, inspect.getdoc(config) or "", {"": config})


def parse(config: type[Parsed], arguments: Sequence[str], usage: str) -> Parsed:
    """Return the configuration that the command line of a command with one configuration gives.

    Raises:
        ValueError: in one line that names the flag at fault and what helps.
        SystemExit: with code 0, after help.
    """
    return config(**of_one(config, usage).read(arguments)[""])


def _grouped(arguments: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with the words after it; words before all flags begin with the first."""
    groups: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append((word, []))
    yield from groups


def _read_one(flag: str, text: str, kind: Any, more: str = "") -> Any:
    if not text and kind in _NAMES:  # of a shell's variable without a value, not of a wish
        raise ValueError(f"{flag} must be {_NAMES[kind]}, not an empty string, got ''")
    value: Any = text
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            value = None
    converted = convert(value, kind)
    if converted is not MISMATCH:
        return converted
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    near = difflib.get_close_matches(text.lower(), choices, n=1)
    hint = _hint(map(repr, near))
    raise ValueError(f"{flag} must be {describe(kind)}, got {text!r}{hint}{more}")


def _arms(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _key(flag: str) -> str:
    """Return the name that a flag has as a field: --no-fused is no_fused."""
    return flag.removeprefix("--").replace("-", "_")


def _spelt(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _hint(near: Iterable[str]) -> str:
    first = next(iter(near), None)
    return "" if first is None else f" (did you mean {first}?)"


def _heading(flag: Flag) -> str:
    """Return a flag with its other names and a word for its value, as help shows it."""
    value = flag.rules.metavar or _metavar(flag.value_kind)
    if flag.takes is None:
        value = f"{value} …"
    names = ", ".join(flag.spellings)
    return names if flag.is_switch else f"{names} {value}".strip()


def _metavar(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(arguments)}}}"
    if typing.get_origin(kind) is tuple:
        parts = arguments[:1] if arguments[-1] is Ellipsis else arguments
        return " ".join(map(_metavar, parts))
    return {int: "INT", float: "FLOAT", bool: "", Path: "PATH"}.get(kind, "TEXT")


def _default(flag: Flag, on_shards: str | None = None) -> str:
    """Return the default for help; empty where there is none or the text says it.

    Args:
        flag: the setting; the command may have a default of its own.
        on_shards: the default of a training on shards in words, where the field has none.
    """
    value = flag.default
    if value is None or value is False or value in ((), "", Path()):
        return ""
    if value is True:
        return " (default: on)"
    words = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if not flag.is_own_default:
        return f" (default: {words})"
    elsewhere = flag.config.defaults()[flag.name] if on_shards is None else on_shards
    also = "" if elsewhere is None else f"; on shards: {elsewhere}"
    return f" (default here: {words}{also})"


def _full(flag: Flag, width: int) -> list[str]:
    text = f"{flag.text}{_default(flag)}"
    indent = " " * 6
    return [
        f"  {_heading(flag)}",
        *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent),
    ]


def _short(flag: Flag, width: int) -> list[str]:
    value = flag.rules.metavar or ("" if flag.choices else _metavar(flag.value_kind))
    spelt = _spelt(flag.rules.spelt or flag.name)
    name = value if flag.rules.positional else f"{spelt} {value}".strip()
    brief, on_shards = flag.rules.brief or flag.text, ""
    if flag.is_own_default:
        brief, _, on_shards = brief.partition("; default: ")
    text = f"{brief}: {', '.join(flag.choices)}" if flag.choices else brief
    if "default:" not in text:
        text += _default(flag, on_shards or None)
    indent = " " * _COLUMN
    wrapped = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    head = f"  {name}"
    if len(head) >= _COLUMN:
        return [head, *wrapped]
    return [head.ljust(_COLUMN) + wrapped[0][_COLUMN:], *wrapped[1:]]
