"""Small activations to train on, in memory and as shards, and settings for quick tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from planted import planted

from sae_fast.activations import write_shard
from sae_fast.training import run_directory


@pytest.fixture(scope="session")
def activations() -> torch.Tensor:
    """Return rows [3000, 16] to train on."""
    return planted(3000, seed=1)


@pytest.fixture(scope="session")
def heldout() -> torch.Tensor:
    """Return rows [400, 16] to evaluate on."""
    return planted(400, seed=2)


@pytest.fixture(scope="session")
def shard_dir(
    tmp_path_factory: pytest.TempPathFactory, activations: torch.Tensor, heldout: torch.Tensor
) -> Path:
    """Write the rows as two shards and a held-out one."""
    directory = tmp_path_factory.mktemp("shards")
    write_shard(directory / "train_00.h5", activations[:1800])
    write_shard(directory / "train_01.h5", activations[1800:])
    write_shard(directory / "heldout_00.h5", heldout)
    return directory


@pytest.fixture(autouse=True)
def _cheap_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave plots out, which take longer than training; report/test_plot.py tests them."""
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, because tensors this small are slower with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
