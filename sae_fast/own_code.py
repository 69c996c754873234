"""Calls of the user's own code, such as an architecture or a callback: its errors in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from sae_fast.json_files import bounded

_PACKAGE = str(Path(__file__).parent)
_STANDARD_LIBRARY = str(Path(os.__file__).parent)
_LIBRARIES = ("site-packages", "dist-packages")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class OwnCodeError(ValueError):
    """Code of the user's own that has failed, or has returned something else than it must."""


def call(
    what: str,
    function: Callable[Arguments, Result],
    *arguments: Arguments.args,
    **named: Arguments.kwargs,
) -> Result:
    """Call a function of the user's own, named `what` in errors; raise OwnCodeError if it fails."""
    try:
        return function(*arguments, **named)
    except OwnCodeError:
        raise
    except Exception as error:
        raise OwnCodeError(failed(what, error)) from error


def failed(what: str, error: BaseException) -> str:
    """Return in one line that something failed: with the error, and its line in the user's code."""
    reason = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{what} failed with {bounded(f'{kind}: {reason}') if reason else kind}{place_of(error)}"


def place_of(error: BaseException) -> str:
    """Return file and line of the innermost call outside of libraries, or an empty text."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not _is_of_a_library(file):
            found = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found


def _is_of_a_library(file: str) -> bool:
    inside = file.startswith((_PACKAGE, _STANDARD_LIBRARY, "<"))
    return inside or any(name in file for name in _LIBRARIES)
