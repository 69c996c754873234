"""One setting of a configuration: how it is declared, its rules, and what its values may be.

`k: int | None = setting(None, at_least=1, arch=("topk",))` states the range and the architectures
of a setting where it is declared. The checks, the command line, resumed runs and sweeps read the
rules from there; no list of settings by name exists beside the declarations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sae_fast.json_files import shown

MOST_THREADS = 4096  # beyond what a machine can start, the OpenMP runtime ends the process
LARGEST = 2**63 - 1  # whole number of a setting, which torch and HDF5 can take
MISMATCH = object()  # returned by `convert`


class Effect(NamedTuple):
    """The condition under which a setting has an effect.

    Attributes:
        needs: the need in words that follow "needs".
        holds: returns whether it is met by a configuration, which may still have open sizes, or by
            a `Run`.
    """

    needs: str
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of a setting.

    Attributes:
        above, at_least, at_most, below: bounds of the value; of a tuple, of each value in it.
        nonempty: an empty string is refused.
        must: the range in words that follow "must be"; default: made from the bounds.
        arch: the architectures that have the setting; default: all.
        slots_modes: the modes of arch slots that train the term that it is the weight of.
        needs: what the other settings must be for it to have an effect.
        run_needs: what the data and the run must be for it to have an effect, see `Run`.
        within_run: it is a number of steps, and a run must have as many.
        on_resume: "free": a resumed run may have another value and stays equal to the bit; "kept":
            a resumed run that leaves it open keeps the value it began with. Without either
            a setting of the model must stay, and one of the training may change, which is logged.
        of_start: a training that starts from another model must have the value of that model.
        at_start: a training that starts from another model and leaves it open takes its value.
        sweep: the trainings of a sweep may differ in this setting of their training.
        shards_only: why the setting has no place in a training straight from a model.
        decided_by: the setting of FromModelConfig that decides it in such a training.
        of_files: it is about files of rows; rows in memory do not have it.
        of_transcoder: only the training of a transcoder has it.
        recipe: a capture that is continued must have the same value. "rows": the activations of the
            model, or their order, depend on it; "shards": only the shards do that are written.
        command_only: it names a model or the place of a run on the command line, and
            `train_from_model` does not take it.
        heading: the heading of the help under which this setting and those after it stand.
        brief: one line for the short help; settings without it are in the full help only.
        metavar: stands for the value in help; default: made from the type.
        spelt: the other name of the setting that help shows first; default: the field's name.
        positional: the value is given by its place on the command line, without a flag.
        bare: the value of the flag where none follows it.
        elsewhere: names of the setting in other trainers, for which an error proposes this one.
        instead: by a flag of other trainers, the words that an error says of it.
    """

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    nonempty: bool = False
    must: str = ""
    arch: tuple[str, ...] = ()
    slots_modes: tuple[str, ...] = ()
    needs: Effect | None = None
    run_needs: Effect | None = None
    within_run: bool = False
    on_resume: Literal["free", "kept"] | None = None
    of_start: bool = False
    at_start: bool = False
    sweep: bool = False
    shards_only: str = ""
    decided_by: str = ""
    of_files: bool = False
    of_transcoder: bool = False
    recipe: Literal["rows", "shards"] | None = None
    command_only: bool = False
    heading: str = ""
    brief: str = ""
    metavar: str = ""
    spelt: str = ""
    positional: bool = False
    bare: str = ""
    elsewhere: tuple[str, ...] = ()
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def admits(self, value: Any) -> bool:
        """Return whether a value lies in the range; None, true and false always do."""
        if value is None or isinstance(value, bool):
            return True
        if isinstance(value, tuple):
            return all(map(self.admits, value))
        if not isinstance(value, int | float):
            return value != "" or not self.nonempty
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    @property
    def range(self) -> str:
        """The range in words that follow "must be"."""
        if self.must:
            return self.must
        if self.nonempty:
            return "a name, not an empty string"
        if self.above is not None:
            above = f"above {self.above:g} and at most"
            return (
                f"greater than {self.above:g}"
                if self.at_most is None
                else (f"{above} {self.at_most:g}")
            )
        if self.below is not None:
            return f"from {self.at_least:g} to below {self.below:g}"
        if self.at_most is not None:
            return f"between {self.at_least:g} and {self.at_most:g}"
        return f"at least {self.at_least:g}"


_NO_RULES = Rules()


def setting(default: Any, **rules: Any) -> Any:
    """Declare a field of a configuration with its default and its rules, the fields of `Rules`."""
    return dataclasses.field(default=default, metadata={"rules": Rules(**rules)})


def same_as(config: type[Any], name: str, **rules: Any) -> Any:
    """Declare a field that another configuration declares, with its default, rules and help.

    Args:
        config: the class that declares the field.
        name: the field, of the same name and type in both.
        rules: the rules that differ, fields of `Rules`.
    """
    declared = config.__dataclass_fields__[name]
    changed = dataclasses.replace(declared.metadata["rules"], **rules)
    metadata = {"rules": changed, "declared_by": config}
    return dataclasses.field(default=declared.default, metadata=metadata)


def rules_of(config: Any) -> Mapping[str, Rules]:
    """Return the rules of every setting of a configuration, or of its class, by name, in order."""
    return _rules_of_class(config if isinstance(config, type) else type(config))


@functools.cache  # checks ask for them some hundred times per configuration
def _rules_of_class(config: type[Any]) -> Mapping[str, Rules]:
    fields = dataclasses.fields(config)
    return types.MappingProxyType({f.name: f.metadata.get("rules", _NO_RULES) for f in fields})


def require(name: str, condition: bool, expected: str, value: object) -> None:
    """Raise ValueError naming setting, expectation and value, unless a condition holds."""
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")


def checked(name: str, value: Any, annotation: Any, rules: Rules) -> Any:
    """Return the value of a setting as its type; raise ValueError for another type or range."""
    converted = convert(value, annotation)
    if converted is MISMATCH:
        is_whole = type(convert(1, annotation)) is int
        is_large = is_whole and isinstance(value, int) and abs(value) > LARGEST
        expected = f"at most {LARGEST}" if is_large else describe(annotation)
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    if not rules.admits(converted):
        require(name, False, rules.range, converted)
    return converted


def convert(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type, or `MISMATCH`; 1 becomes 1.0 and a list a tuple.

    An empty text is no path: a command whose variable is empty would write where it was started.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        options = (convert(value, option) for option in arguments)
        return next((option for option in options if option is not MISMATCH), MISMATCH)
    if origin is Literal:
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
    if annotation is Path and isinstance(value, str):
        return Path(value) if value else MISMATCH  # Path("") is the current directory
    return value if isinstance(value, annotation) else MISMATCH


def describe(annotation: Any) -> str:
    """Return an annotated type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
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
        Path: "a path",
    }
    return names.get(annotation, f"a {annotation.__name__}")
