"""Small shards whose rows can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_fast.activations import write_shard

D_IN = 4


def numbered_rows(first: int, count: int, d_in: int = D_IN) -> Tensor:
    """Return rows with their own number in column 0, exact in every stored type up to 256."""
    rows = torch.zeros(count, d_in)
    rows[:, 0] = torch.arange(first, first + count)
    rows[:, 1] = 1
    return rows


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Write train_00.h5, train_01.h5, … with consecutive row numbers; return their directory."""

    def make(
        *sizes: int, chunk_rows: int = 8, name: str = "shards", dtype: str = "float32"
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        first = 0
        for number, size in enumerate(sizes):
            rows = numbered_rows(first, size)
            path = directory / f"train_{number:02d}.h5"
            write_shard(path, rows, dtype=dtype, chunk_rows=chunk_rows)
            first += size
        return directory

    return make


@pytest.fixture
def sample_dir() -> Path:
    """Return the directory of the real activations in the repository."""
    return Path(__file__).parents[2] / "examples" / "activations"
