"""Arrays by name, in slices, which every format is read as: no file is in memory whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae_fast.activations.errors import ShardError, listed, one_line, shortened, takes_too_much
from sae_fast.memory import require_memory

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE_FILE = ""  # name of the arrays of a file that has no names

# Bytes that a file may claim beyond those it has, as a tensor does that repeats a row by strides.
SMALL_BYTES = 64 << 20
# Bytes that one compressed byte may stand for; activations are far from it, zeros reach 1,000.
LARGEST_COMPRESSION = 100
SHOWN_ARRAYS, SHOWN_CHARACTERS = 12, 100  # in a list of what a file holds, for errors


@dataclass(frozen=True)
class SourceArray:
    """An array in a file.

    Attributes:
        shape: of the whole array.
        dtype: as torch has it; None: one that torch does not have, such as text.
        read: reads entries start..stop of its first axis, into memory of their own; a scalar is
            entry 0..1.
        stored: bytes of the file that hold it, where compressed as many as these may stand for.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[int, int], Tensor]
    stored: int

    @property
    def claimed(self) -> int:
        """Bytes of an array of this shape and type."""
        return math.prod(self.shape) * (1 if self.dtype is None else self.dtype.itemsize)

    @property
    def is_backed(self) -> bool:
        """Whether the file holds as many bytes as the shape claims, or next to none are claimed."""
        return min(self.shape, default=0) >= 0 and self.claimed <= max(SMALL_BYTES, self.stored)


Arrays = Mapping[str, list[SourceArray]]  # by name; several where a name holds a list of arrays


class LazyArrays(Arrays):
    """The arrays of a file whose names are known, each looked at when it is first asked for.

    A file of many arrays is opened for each of them, so that looking at all of them every time
    would take a time that grows with the square of their number.

    Args:
        names: of the arrays, in order.
        look: opens the array of a name; what it raises is an error of the file.
    """

    def __init__(self, names: Iterable[str], look: Callable[[str], SourceArray]) -> None:
        self._found: dict[str, list[SourceArray] | None] = dict.fromkeys(names)
        self._look = look

    def __getitem__(self, name: str) -> list[SourceArray]:
        arrays = self._found[name]
        if arrays is None:
            arrays = self._found[name] = [self._look(name)]
        return arrays

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


Opener = Callable[[Path], AbstractContextManager[Arrays]]


@contextmanager
def opened(path: Path, opener: Opener) -> Iterator[Arrays]:
    """Open the arrays of a file; turn any error of its reader into a ShardError naming it."""
    require_memory()
    try:
        with opener(path) as arrays:
            yield arrays
    except (ShardError, KeyboardInterrupt):
        raise
    except MemoryError as error:
        raise takes_too_much(path) from error
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such file") from error
    except Exception as error:  # each library has its own for a damaged file
        text = one_line(error)[:200]
        raise ShardError(f"{path}: cannot be read, damaged or cut short: {text}") from error


def described(name: str, arrays: list[SourceArray]) -> str:
    """Return a name with the shape and type of its array, for errors."""
    if not arrays:
        return f"{short(name)} (no array)"
    first = arrays[0]
    kind = "no numbers" if first.dtype is None else str(first.dtype).removeprefix("torch.")
    several = f"{len(arrays)} arrays, the first " if len(arrays) > 1 else ""
    shape = short(str(list(first.shape)))
    return f"{short(name) + ' ' if name else ''}({several}{shape} {kind})"


def contents_of(arrays: Arrays) -> str:
    """Describe what a file holds, the first of many arrays, for errors."""
    names = [described(name, parts) for name, parts in arrays.items()]
    return listed(names, SHOWN_ARRAYS, longest=3 * SHOWN_CHARACTERS) or "no array at all"


def short(text: str) -> str:
    """Return a name or number from a file on one line, cut where it would fill the screen."""
    return shortened(" ".join(text.split()), SHOWN_CHARACTERS)
