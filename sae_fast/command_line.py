"""How the commands read their flags: dataclasses by tyro, and a wrong one is a single line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

EXIT_BAD_INPUT = 2

Parsed = TypeVar("Parsed")


def parse(
    kind: type[Parsed],
    default: Parsed,
    arguments: Sequence[str],
    program: str,
    *,
    partial: bool = False,
) -> Parsed:
    """Has tyro fill in a dataclass; its boxed complaint becomes the one line of a ValueError.

    Partial parsing leaves unknown flags, and --help, to the parsing that comes after it.
    """
    complaint = io.StringIO()
    flat = (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(complaint):
            if partial:
                parsed, _ = tyro.cli(
                    kind,
                    default=default,
                    args=arguments,
                    config=flat,
                    prog=program,
                    add_help=False,
                    return_unknown_args=True,
                )
                return parsed
            return tyro.cli(kind, default=default, args=arguments, config=flat, prog=program)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_first_sentence(complaint.getvalue())) from None


def one_line(error: Exception) -> str:
    """What is told of an error, on one line."""
    return f"error: {' '.join(str(error).split())}"


def _first_sentence(box: str) -> str:
    """What tyro's box says between its title and its first rule."""
    lines = [line.strip("│ ") for line in box.splitlines() if "╭" not in line and "╰" not in line]
    rules = [number for number, line in enumerate(lines) if line.startswith("──")]
    text = " ".join(lines[: rules[0]] if rules else lines)
    return re.sub(r"^Error parsing \w+: ", "", text)
