"""A full memory is distinguished from other failures."""

import pytest
import torch

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.failure import is_out_of_memory, out_of_memory
from sae_fast.training.memory_plan import plan_memory

CPU = torch.device("cpu")


def _chained(cause: Exception) -> RuntimeError:
    """Return the error of a capture that was raised instead of an error inside it."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        _chained(torch.OutOfMemoryError("CUDA out of memory.")),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
        MemoryError(),
    ],
    ids=["torch", "capture", "driver", "host", "NumPy"],
)
def test_a_full_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error, CPU)


def test_the_reason_told_is_that_of_the_allocator() -> None:
    plan = plan_memory(SAEConfig(d_in=8, d_sae=64), TrainConfig(), native=True, pool_bytes=0)
    error = _chained(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    told = str(out_of_memory(7, error, plan, None))
    assert told.startswith("step 7: out of memory (CUDA out of memory); ")


@pytest.mark.parametrize("error", [RuntimeError("decode: W_dec must be"), _chained(ValueError())])
def test_another_failure_is_left_alone(error: Exception) -> None:
    assert not is_out_of_memory(error, CPU)


@pytest.mark.parametrize(("refusals", "expected"), [(0, False), (1, True)])
def test_a_failed_call_of_an_op_is_memory_where_memory_was_refused(
    monkeypatch: pytest.MonkeyPatch, refusals: int, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": refusals})
    error = RuntimeError("aoti_torch_empty_strided(...) API call failed at ops.h, line 3")
    assert is_out_of_memory(error, torch.device("cuda")) is expected
