"""How the commands read their flags: dataclasses by tyro, and a wrong one is a single line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tyro

from sae_fast.flags import first_mistake
from sae_fast.json_files import bounded
from sae_fast.output_streams import memory_was_short

EXIT_BAD_INPUT = 2
# How Python, torch and C++ say that the system gives no more.
_NO_THREAD = "can't start new thread"
_NO_MEMORY = (
    *("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory"),
    "failed to map segment",  # of a library that is loaded when it is first used
)
# Python's own words where C code fails and does not say why, as it does without memory.
_NO_REASON = ("without exception set", "without setting an exception")
_LONGEST_REASON = 200
# Memory that is given back before a line about the want of it is made; more than an allocator
# keeps, so that the system gets it.
_reserve = [bytearray(1 << 20)]
LONGEST_ERROR = 1500  # characters

Parsed = TypeVar("Parsed")


def parse(
    kind: type[Parsed],
    default: Parsed,
    arguments: Sequence[str],
    program: str,
    *,
    partial: bool = False,
    kinds: Mapping[str, Any] | None = None,
) -> Parsed:
    """Has tyro fill in a dataclass; what is wrong becomes the one line of a ValueError.

    Partial parsing leaves unknown flags, and --help, to the parsing that comes after it. With
    `kinds`, every flag's type, the mistake is looked for by itself, in a line without positionals.
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
        mistake = None if kinds is None else first_mistake(arguments, kinds)
        raise ValueError(mistake or _first_sentence(complaint.getvalue())) from None


def refusal(error: Exception) -> str:
    """Return the line with which a command ends; raise a fault of the program itself again.

    Whatever is wrong with what was given is a ValueError or an OSError, with a line that says so.
    """
    _reserve.clear()
    if isinstance(error, ValueError | OSError):
        return one_line(error)
    text = str(error)
    if _is_for_want_of_memory(error):
        reason = f" ({' '.join(text.split())[:_LONGEST_REASON]})" if text else ""
        return f"error: the memory that this process may have is used up{reason}"
    if isinstance(error, RuntimeError) and _NO_THREAD in text:
        return f"error: the system starts no more threads for this process ({text})"
    raise error


def _is_for_want_of_memory(error: Exception) -> bool:
    text = str(error)
    if isinstance(error, SystemError):
        import resource  # which Windows lacks

        kinds = resource.RLIMIT_AS, resource.RLIMIT_DATA
        is_limited = any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds)
        return is_limited and any(words in text for words in _NO_REASON)
    if isinstance(error, RuntimeError | ImportError):
        return memory_was_short() or any(words in text for words in _NO_MEMORY)
    return isinstance(error, MemoryError)


def one_line(error: Exception) -> str:
    """Return what is told of an error, on one line; of a very long one the begin and the end."""
    return f"error: {bounded(' '.join(str(error).split()), LONGEST_ERROR)}"


def _first_sentence(box: str) -> str:
    """What tyro's box says between its title and the rule after it.

    Where the terminal's encoding lacks the lines of a box, there is a rule below the title too.
    """
    lines = [line.strip("│ ") for line in box.splitlines() if "╭" not in line and "╰" not in line]
    parts = re.split(r"(?:^|\n)(?:──+|---+)(?:\n|$)", "\n".join(lines))
    text = parts[0] if "╭" in box or len(parts) == 1 else parts[1]
    return re.sub(r"^Error parsing \w+: ", "", " ".join(text.split()))
