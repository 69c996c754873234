"""NumPy arrays, memory maps among them, as tensors on the same memory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Given = Tensor | npt.NDArray[Any]  # tensors, NumPy arrays and memory maps


def as_given_tensor(what: str, given: object) -> Tensor:
    """Return a tensor as it is, and an array as a tensor on its memory, which is not copied.

    Arrays with negative strides, or in the byte order of another machine, are copied.

    Args:
        what: the name of `given` in errors.
        given: a tensor or an array.

    Raises:
        ValueError: in one line, for anything else and for an array of another kind of elements.
    """
    if isinstance(given, Tensor):
        return given
    if not isinstance(given, np.ndarray):
        kind = type(given).__name__
        raise ValueError(
            f"{what} must be a tensor or a NumPy array (see torch.as_tensor), got {kind}"
        )
    if not given.dtype.isnative:
        given = given.astype(given.dtype.newbyteorder("="))
    if any(stride < 0 for stride in given.strides):
        given = np.ascontiguousarray(given)
    with warnings.catch_warnings():
        # An array that is read only, such as a memory map; nothing here writes to what is given.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        try:
            return torch.from_numpy(given)
        except TypeError:
            raise ValueError(f"{what}: no tensor holds elements of type {given.dtype}") from None
