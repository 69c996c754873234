"""Errors of the commands: one line for the user, a traceback for faults of the program."""

import resource
import tracemalloc

import pytest
import torch

from sae_fast.command_errors import refusal
from sae_fast.json_files import read_regular


def allocation_error():
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("k must be\n at least 1"), "error: k must be at least 1"),
        (OSError(28, "No space left"), "error: [Errno 28] No space left"),
        (MemoryError(), "error: the memory that this process may have is used up"),
        (
            ImportError("x.so: failed to map segment from shared object"),
            "error: the memory that this process may have is used up "
            "(x.so: failed to map segment from shared object)",
        ),
        (
            RuntimeError("can't start new thread"),
            "error: the system starts no more threads for this process (can't start new thread)",
        ),
    ],
)
def test_what_is_short_or_wrong_is_one_line(error, line):
    assert refusal(error) == line


NO_REASON = SystemError("<function f> returned NULL without setting an exception")


def test_a_failure_without_a_reason_is_a_lack_of_memory_where_that_is_limited(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 30, resource.RLIM_INFINITY))
    line = refusal(NO_REASON)
    assert line.startswith("error: the memory that this process may have is used up (<function f>")


def test_memory_that_torch_does_not_get_is_one_line():
    line = refusal(allocation_error())
    assert line.startswith("error: the memory that this process may have is used up (")
    assert "\n" not in line


@pytest.mark.parametrize(
    "error", [RuntimeError("a kernel failed"), TypeError("x"), KeyError(1), NO_REASON]
)
def test_a_fault_of_the_program_is_raised_again(error):
    with pytest.raises(type(error)) as caught:
        refusal(error)
    assert caught.value is error


def test_a_small_file_takes_little_memory_to_read(tmp_path):
    path = tmp_path / "small.json"
    path.write_text("{}")
    tracemalloc.start()
    assert read_regular(path) == b"{}"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
