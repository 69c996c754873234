"""Helpers for the tests of conversions: the command, its refusals, and the rows of the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from sae_fast.activations.imports import ConversionOptions, convert, prepare
from sae_fast.activations.imports.formats import find_files
from sae_fast.activations.imports.saved_activations import choose_key, inspect
from sae_fast.convert_shards import main


@dataclass
class Stored:
    """The rows of all training shards of a directory, with their columns."""

    rows: np.ndarray
    columns: dict[str, list[int]]
    attributes: dict[str, object]


def stored(directory: Path, kind: str = "train") -> Stored:
    """Read a directory's shards with h5py alone."""
    rows, columns, attributes = [], {}, {}
    for path in sorted(directory.glob(f"{kind}_*.h5")):
        with h5py.File(path) as file:
            rows.append(file["activations"][:])
            attributes = dict(file.attrs)
            for name in set(file) - {"activations"}:
                columns.setdefault(name, []).extend(file[name][:].tolist())
    return Stored(np.concatenate(rows), columns, attributes)


def command(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the single line of a refusal, with exit code 2."""
    capsys.readouterr()
    assert command(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def convert_all(source: Path, out: Path, **options: object):
    """Convert like the command; return the result."""
    paths = find_files(source)
    found = inspect(paths, choose_key(paths, None))
    return convert(prepare(found, out, ConversionOptions(**options)))


def random_rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
