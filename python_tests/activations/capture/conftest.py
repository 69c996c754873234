"""Small captures with a cache of their own."""

import contextlib

import pytest
import torch
from captured import capture, make_inputs


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))


@contextlib.contextmanager
def one_thread():
    """Use one thread, because tensors this small are slower with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Make a small Llama and texts."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def whole(inputs, tmp_path_factory):
    """Return the directory of a capture that was not interrupted."""
    out = tmp_path_factory.mktemp("captured") / "whole"
    with one_thread():
        assert capture(inputs, out) == 0
    return out
