"""The tensors of a foreign file, whose shapes are checked before any of them is read.

Files are untrusted. Pickles are loaded with weights_only and mapped, so that a tensor that claims
more than the file holds, compressed records and Python objects are refused, see
sae_fast.activations.imports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sae_fast.activations.imports.arrays import Arrays, SourceArray, contents_of, opened, short
from sae_fast.activations.imports.formats import OPENERS
from sae_fast.interop.errors import DictionaryError
from sae_fast.tensor_files import FLOATS, is_finite

SUFFIXES = (".safetensors", ".pt", ".pth", ".npz")
_MAPPED = (".safetensors", ".pt", ".pth")
_BLOCK_BYTES = 32 << 20  # read at once


class TensorFile:
    """The tensors of a file by name.

    Args:
        path: of the file, for messages.
        arrays: what it holds.
        below: the name of a dictionary in the file, with "/", in which the tensors are.
    """

    def __init__(self, path: Path, arrays: Arrays, below: str = "") -> None:
        self.path = path
        self._arrays, self._below = arrays, below

    def __contains__(self, name: object) -> bool:
        return f"{self._below}{name}" in self._arrays

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        below = self._below
        return {name[len(below) :] for name in self._arrays if name.startswith(below)}

    def shape(self, *names: str) -> tuple[int, ...]:
        """Return the shape of the tensor that has one of the names; raise DictionaryError."""
        return self._array(names).shape

    def read(
        self,
        *names: str,
        shape: Sequence[int] | None = None,
        transposed: bool = False,
    ) -> Tensor:
        """Read a tensor of floating-point numbers as float32.

        Args:
            names: the names that it may have, of which one must be there.
            shape: that the result must have; None: any.
            transposed: whether the file has rows and columns exchanged.

        Raises DictionaryError, naming the file and the tensor, before anything of its size is read.
        """
        array, name = self._checked(names, shape, transposed), self._below + self._name(names)
        result = torch.empty(array.shape[::-1] if transposed else array.shape)
        target = result.t() if transposed else result.reshape(array.shape or 1)
        step = max(1, _BLOCK_BYTES * len(target) // max(array.claimed, 1))
        for start in range(0, len(target), step):
            stop = min(start + step, len(target))
            with self._reopened() as arrays:
                target[start:stop] = arrays[name][0].read(start, stop)
        if not is_finite(result):
            raise DictionaryError(f"{self.path}: {name} holds NaN or Inf")
        return result

    def integer(self, name: str) -> int:
        """Read a whole number, or True as 1, stored as a tensor; raise DictionaryError."""
        array = self._array((name,))
        if array.shape not in ((), (1,)) or array.dtype not in _INTEGERS:
            raise DictionaryError(f"{self.path}: {name} must be one whole number")
        return int(array.read(0, 1).reshape(-1)[0])

    def integers(self, name: str, most: int) -> list[int]:
        """Read a list of at most `most` whole numbers; raise DictionaryError."""
        array = self._array((name,))
        if len(array.shape) != 1 or array.dtype not in _INTEGERS or array.shape[0] > most:
            raise DictionaryError(
                f"{self.path}: {name} must be a list of at most {most} whole numbers"
            )
        return [int(number) for number in array.read(0, array.shape[0])]

    @contextmanager
    def _reopened(self) -> Iterator[Arrays]:
        """Open the file again, if it is mapped: pages that were read count as memory until then."""
        if self.path.suffix not in _MAPPED:
            yield self._arrays
            return
        with opened(self.path, OPENERS[self.path.suffix]) as arrays:
            yield arrays

    def _checked(
        self, names: tuple[str, ...], shape: Sequence[int] | None, transposed: bool
    ) -> SourceArray:
        """Return an array of floating-point numbers; raise DictionaryError where it does not fit.

        See `read`.
        """
        array, name = self._array(names), self._name(names)
        if transposed and len(array.shape) != 2:
            raise DictionaryError(f"{self.path}: {name} must be a matrix, got {list(array.shape)}")
        expected = None if shape is None else tuple(shape)
        if transposed and expected is not None:
            expected = expected[::-1]
        if expected is not None and array.shape != expected:
            raise DictionaryError(
                f"{self.path}: {name} must have shape {list(expected)}, got {list(array.shape)}"
            )
        if array.dtype not in FLOATS:
            found = str(array.dtype).removeprefix("torch.")
            raise DictionaryError(
                f"{self.path}: {name} must be of floating-point numbers, got {found}"
            )
        return array

    def _name(self, names: tuple[str, ...]) -> str:
        for name in names:
            if name in self:
                return name
        raise DictionaryError(
            f"{self.path}: has no tensor {short(' or '.join(names))}, "
            f"it has {contents_of(self._arrays)}"
        )

    def _array(self, names: tuple[str, ...]) -> SourceArray:
        name = self._name(names)
        arrays = self._arrays[self._below + name]
        if len(arrays) != 1:
            raise DictionaryError(f"{self.path}: {name} must be a tensor, it is a list")
        if not arrays[0].is_backed:
            raise DictionaryError(
                f"{self.path}: {name} claims {arrays[0].claimed:,} bytes, more than the file holds"
            )
        return arrays[0]


_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@contextmanager
def open_tensors(path: Path, below: str = "") -> Iterator[TensorFile]:
    """Open a .safetensors, .pt, .pth or .npz file, see `TensorFile`.

    Raises DictionaryError, naming it, for a damaged or hostile one.
    """
    if path.suffix not in SUFFIXES:
        raise DictionaryError(f"{path}: must be one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DictionaryError(f"{path}: no such file")
    with opened(path, OPENERS[path.suffix]) as arrays:
        yield TensorFile(path, arrays, below)
