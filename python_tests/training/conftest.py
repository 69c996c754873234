"""Small activations to train on, in memory and as shards, and what keeps these tests quick."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from planted import planted

from sae_fast.activations import write_shard
from sae_fast.training import run_directory


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
    """Drawing takes longer than training here; report/test_plot.py draws."""
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sizes here are far too small to share out: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
