"""The memory plan adds up, and refuses with numbers."""

from dataclasses import replace

import pytest

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.memory_plan import available_memory, plan_memory


def test_plan_counts_parameters_and_optimiser_states() -> None:
    plan = plan_memory(SAEConfig(d_in=100, d_sae=1000), TrainConfig(), native=True, pool_bytes=7)
    parameters = 4 * (2 * 100 * 1000 + 1000 + 100)
    assert plan.parts["parameters"] == parameters
    assert plan.parts["optimiser states"] == 2 * parameters
    assert plan.parts["packed encoder (16 bit)"] == 2 * 100 * 1000
    assert plan.parts["activations in memory"] == 7
    assert "memory plan" in str(plan)


def test_reference_needs_no_packed_encoder() -> None:
    sae = SAEConfig(d_in=8, d_sae=64)
    plan = plan_memory(sae, TrainConfig(), native=False, pool_bytes=0)
    assert not any("packed" in part for part in plan.parts)


def test_a_plan_that_cannot_fit_is_refused_with_numbers() -> None:
    plan = plan_memory(SAEConfig(d_in=4096, d_sae=2**20), TrainConfig(), native=True, pool_bytes=0)
    numbers = r"needs 10\d\.\d+ GiB in memory and 8\.000 GiB is available"
    with pytest.raises(ValueError, match=numbers):
        replace(plan, host_available=8 * 2**30).check()


def test_a_plan_of_unknown_memory_passes() -> None:
    plan = plan_memory(SAEConfig(d_in=4096, d_sae=2**20), TrainConfig(), native=True, pool_bytes=0)
    unknown = replace(plan, host_available=None)
    unknown.check()
    assert "unknown amount" in str(unknown)


def test_available_memory_is_read_from_the_kernel() -> None:
    available = available_memory()
    assert available is None or available > 2**20
