"""Biographies of a few people, with a language model that has learned them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_biographies import TINY

from sae_fast.biographies import main


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory that the command wrote."""
    threads = torch.get_num_threads()
    directory = tmp_path_factory.mktemp("biographies") / "made"
    assert main([*TINY, "--steps", "300", "--out", str(directory)]) == 0
    torch.set_num_threads(threads)
    return directory
