"""Small activations with structure to find: sparse sums of a planted dictionary."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae_fast.activations import write_shard
from sae_fast.training import run_directory

D_IN = 16


def planted(rows: int, seed: int) -> torch.Tensor:
    """Rows [rows, 16], each the sum of three of 48 directions, off centre."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(48, D_IN, generator=generator), dim=1)
    generator.manual_seed(seed)
    chosen = torch.randint(48, (rows, 3), generator=generator)
    strength = 0.5 + torch.rand(rows, 3, 1, generator=generator)
    noise = 0.01 * torch.randn(rows, D_IN, generator=generator)
    return (directions[chosen] * strength).sum(1) + noise + 0.3


@pytest.fixture(scope="session")
def activations() -> torch.Tensor:
    """Rows [3000, 16] to train on."""
    return planted(3000, seed=1)


@pytest.fixture(scope="session")
def heldout() -> torch.Tensor:
    """Rows [400, 16] to evaluate on."""
    return planted(400, seed=2)


@pytest.fixture(scope="session")
def shard_dir(
    tmp_path_factory: pytest.TempPathFactory, activations: torch.Tensor, heldout: torch.Tensor
) -> Path:
    """The same rows as two shards and a held-out one."""
    directory = tmp_path_factory.mktemp("shards")
    write_shard(directory / "train_00.h5", activations[:1800])
    write_shard(directory / "train_01.h5", activations[1800:])
    write_shard(directory / "heldout_00.h5", heldout)
    return directory


@pytest.fixture(autouse=True)
def _cheap_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here; test_plot.py draws."""
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sizes here are far too small to share out: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
