"""Failure of a command: one line on stderr that says what is wrong, and the exit code."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sae_fast.json_files import bounded
from sae_fast.output_streams import memory_was_short

EXIT_BAD_INPUT = 2
# Messages of Python, torch and C++ when the system refuses threads or memory.
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


def check_out(directory: Path, flag: str = "--out") -> None:
    """Raise ValueError where the directory that a flag names cannot be made or written to."""
    for place in (directory, *directory.parents):
        if place.is_dir():
            try:
                with tempfile.TemporaryFile(dir=place):
                    return
            except OSError as error:
                raise ValueError(
                    f"{flag} {directory}: {place} cannot be written to: {error.strerror}"
                ) from None
        if place.exists():
            raise ValueError(f"{flag} {directory}: {place} is a file, and must be a directory")


def refusal(error: Exception) -> str:
    """Return the line with which a command ends; raise a fault of the program itself again.

    A fault of the input is a ValueError or an OSError, whose text says what is wrong.
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
    """Return the text of an error on one line; of a very long one its begin and its end."""
    return f"error: {bounded(' '.join(str(error).split()), LONGEST_ERROR)}"
