"""Puts this folder on the path, so that every test can import the helpers in it.

Tests with the fixture `device` run on the CPU and, if torch and sae_fast support it, on CUDA. No
test contacts a hub: its client reads the variable when it is first imported, here or in a process
that a test starts.
"""

import contextlib
import os
import signal
import warnings
from collections import Counter

import pytest
import torch

import sae_fast

os.environ["HF_HUB_OFFLINE"] = "1"


def why_no_cuda():
    """Return the reason why tests on CUDA cannot run, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device: torch finds none"
    info = sae_fast.build_info()
    if info["backend"] != "reference" and not info["cuda"]:
        return f"needs the CUDA backend: {info['why_no_cuda']}"
    return None


@pytest.fixture(autouse=True)
def seeded_torch():
    """Seed torch, whose numbers would otherwise depend on the tests before in the process."""
    torch.manual_seed(0)


@pytest.fixture
def heeded_hangup():
    """Let SIGHUP reach the test if the tests run under nohup, where trainings ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Return each device in turn; tests skip the devices that this machine lacks."""
    if request.param == "cuda" and (missing := why_no_cuda()):
        pytest.skip(missing)
    return torch.device(request.param)


@pytest.fixture
def cuda_device():
    """Return the CUDA device, for tests of streams, graphs and several devices."""
    if missing := why_no_cuda():
        pytest.skip(missing)
    return torch.device("cuda")


@contextlib.contextmanager
def error_where_the_host_waits():
    """Make torch raise an error where the host waits for the device.

    torch warns at the first call in a process, after it has set the mode.
    """

    def set_mode(mode):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode(mode)

    try:
        set_mode("error")
        yield
    finally:
        set_mode("default")


@pytest.fixture
def no_waiting():
    """Return the context manager in which the host must not wait for the device."""
    return error_where_the_host_waits


def pytest_collection_modifyitems(config, items):
    """Drop what cannot run here, and let several processes begin with the longest files."""
    if why_no_cuda():
        keep_one_cuda_case_of_each_file(config, items)
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def keep_one_cuda_case_of_each_file(config, items):
    """Keep one skipped case of every file that has cases on CUDA, and drop the others."""
    kept, dropped, seen = [], [], set()
    for item in items:
        needs_cuda = item.get_closest_marker("cuda") is not None
        (dropped if needs_cuda and item.path in seen else kept).append(item)
        if needs_cuda:
            seen.add(item.path)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
