"""Strict reading of JSON, for every file that a run, another tool or an editor may have written.

Python's own reader takes NaN, a key given twice and numbers of any length, and ends in a
RecursionError on deep nesting. Here each of these is a `JSONError` in one line that names the file
and, where there is one, the field.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 28
MAX_DEPTH = 64
_LEAST_INTEGER, _LARGEST_INTEGER = -(2**63), 2**64 - 1
_MAX_DIGITS = 20  # of 2**64 - 1
_SHOWN_TEXT = 60
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = _SHOWN_TEXT


class JSONError(ValueError):
    """A file or text that is not the JSON it should be, in one line."""


def read_json(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """Return the content of a JSON file; raise OSError or `JSONError`, naming the file."""
    try:
        return parse_json(read_regular(Path(path), max_bytes))
    except JSONError as error:
        raise JSONError(f"{path}: {error}") from None


def parse_json(text: bytes | str) -> Any:
    """Return the content of a JSON text; raise `JSONError` unless it is plain, finite JSON.

    Refused are NaN and infinities, integers of more than 64 bits, a key given twice, nesting deeper
    than `MAX_DEPTH`, and strings that are not Unicode. A byte order mark is skipped.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        content = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_Refused,
        )
    except JSONError:
        raise
    except ValueError as error:
        raise JSONError(f"not a JSON file ({error})") from None
    except RecursionError:
        raise JSONError(_TOO_DEEP) from None
    _check(content)
    return content


def read_regular(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a file; raise OSError, or JSONError for what might never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise JSONError("is no regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # room for max_bytes may be more than there is
        content = file.read(min(size, max_bytes) + 1)
    if len(content) > max_bytes:
        raise JSONError(f"is larger than {max_bytes:,} bytes")
    return content


def shown(value: object) -> str:
    """Return the repr of a value, shortened where it is long, for a message of one line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST_INTEGER:
        return f"a number of {value.bit_length():,} bits"  # its digits may not even be had
    return _short.repr(value)


def bounded(text: str, longest: int = 900) -> str:
    """Return a message, shortened to its begin and its end where it is longer than that."""
    return text if len(text) <= longest else f"{text[: longest - 300]} ... {text[-250:]}"


def require(condition: bool, field: str, expected: str, value: object) -> None:
    """Raise `JSONError` saying what a field must be, unless the condition holds."""
    if not condition:
        raise JSONError(f"{field} must be {expected}, got {shown(value)}")


def is_integer(value: object, least: int = 0, largest: int = 2**63 - 1) -> bool:
    """Return whether a value is an integer, not a boolean, from `least` to `largest`."""
    return type(value) is int and least <= value <= largest


def is_number(value: object, least: float = -math.inf) -> bool:
    """Return whether a value is a finite number, not a boolean, of at least `least`."""
    return type(value) in (int, float) and math.isfinite(value) and value >= least  # type: ignore[arg-type, operator]


class _Refused:
    """Takes the place of a number that JSON has no word for, until its field is known."""

    def __init__(self, text: str) -> None:
        self.text = text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise JSONError(f"key {shown(key)} is given twice")
        content[key] = value
    return content


def _integer(text: str) -> int | _Refused:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        return _Refused(text)
    value = int(text)
    return value if _LEAST_INTEGER <= value <= _LARGEST_INTEGER else _Refused(text)


def _number(text: str) -> float | _Refused:
    value = float(text)
    return value if math.isfinite(value) else _Refused(text)


def _check(content: Any) -> None:
    """Look at every value; without recursion, which deep nesting would exhaust."""
    left: list[tuple[Any, tuple[Any, ...]]] = [(content, ())]
    while left:
        value, place = left.pop()
        if len(place) > MAX_DEPTH:
            raise JSONError(_TOO_DEEP)
        if isinstance(value, dict):
            left += [(inner, (*place, key)) for key, inner in value.items()]
            for key in value:
                _check_text(key, place)
        elif isinstance(value, list):
            left += [
                (inner, (*place, number))
                for number, inner in enumerate(value)
                if isinstance(inner, str | list | dict | _Refused)
            ]
        elif isinstance(value, str):
            _check_text(value, place)
        elif isinstance(value, _Refused):
            text = value.text if len(value.text) <= _SHOWN_TEXT else f"{value.text[:20]}..."
            raise JSONError(f"{_field(place)}: {text} is no finite number of 64 bits")


def _check_text(text: str, place: tuple[Any, ...]) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise JSONError(f"{_field(place)}: {shown(text)} is not Unicode") from None


def _field(place: tuple[Any, ...]) -> str:
    names = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    short = names.lstrip(".")
    return (short if len(short) <= _SHOWN_TEXT else f"{short[:_SHOWN_TEXT]}...") or "the content"
