"""Learning-rate schedule and length of a run."""

import math
from typing import Any

import pytest

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.schedule import (
    count_steps,
    make_k_schedule,
    make_schedule,
    make_sparsity_schedule,
)


def test_schedule_rises_holds_and_falls() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=10, decay_fraction=0.2)
    schedule = make_schedule(config, SAEConfig(d_sae=64), total_steps=100)
    rates = [schedule(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10:80] == [1.0] * 70
    assert rates[79:] == sorted(rates[79:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 21)
    assert min(rates) > 0


def test_warm_up_defaults_to_a_twentieth_of_the_run() -> None:
    schedule = make_schedule(TrainConfig(learning_rate=1.0), SAEConfig(d_sae=64), total_steps=200)
    assert schedule(9) < 1.0 == schedule(10)


def test_default_peak_scales_with_the_dictionary() -> None:
    for d_sae, rate in ((2**14, 2e-4), (2**12, 4e-4)):
        schedule = make_schedule(TrainConfig(), SAEConfig(d_sae=d_sae), 50_000)
        assert schedule.peak == pytest.approx(rate)
        assert schedule.decay_steps == 10_000


def test_sparsity_weight_rises_to_one_and_stays() -> None:
    schedule = make_sparsity_schedule(TrainConfig(sparsity_warmup_steps=4), total_steps=100)
    assert [schedule(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    by_default = make_sparsity_schedule(TrainConfig(), total_steps=100)
    assert by_default(4) < 1.0 == by_default(5)
    assert make_sparsity_schedule(TrainConfig(sparsity_warmup_steps=0), 100)(0) == 1.0


def _annealed(k: int = 32, total_steps: int = 1000, **settings: int) -> list[int]:
    sae = SAEConfig(d_in=100, d_sae=800, k=k)
    schedule = make_k_schedule(TrainConfig(**settings), sae, total_steps)
    assert schedule is not None
    return [schedule(step) for step in range(total_steps)]


def test_k_falls_from_its_start_and_stays_once_it_is_that_of_the_model() -> None:
    found = _annealed(k_anneal_start=320, k_anneal_steps=200)
    assert found[0] == 320
    assert found == sorted(found, reverse=True)
    assert found[199] > 32
    assert set(found[200:]) == {32}


@pytest.mark.parametrize(("k", "start"), [(32, 320), (1, 7), (5, 6), (3, 800)])
def test_k_is_the_next_of_few_values_above_the_line(k: int, start: int) -> None:
    found = _annealed(k=k, k_anneal_start=start, k_anneal_steps=500)[:500]
    line = [start + (k - start) * step / 500 for step in range(500)]
    assert all(exact <= value for exact, value in zip(line, found, strict=True))
    assert all(value <= 2**0.25 * exact + 1 for exact, value in zip(line, found, strict=True))
    assert len(set(found)) <= 4 * math.log2(start / k) + 2


def test_k_falls_within_a_twentieth_of_the_run_by_default() -> None:
    found = _annealed(k_anneal_start=64)
    assert found[49] > 32 == found[50]


def test_k_of_no_steps_is_that_of_the_model_at_once() -> None:
    assert set(_annealed(k_anneal_start=64, k_anneal_steps=0)) == {32}


def test_without_a_start_k_does_not_change() -> None:
    assert make_k_schedule(TrainConfig(), SAEConfig(d_in=8), 100) is None


@pytest.mark.parametrize(
    ("start", "fields", "complaint"),
    [
        (32, {}, "above k = 32 and at most d_sae = 64, got 32"),
        (65, {}, "above k = 32 and at most d_sae = 64, got 65"),
        (64, {"activation": "groupmax"}, "left out with activation groupmax, got 64"),
    ],
)
def test_k_that_cannot_fall_is_refused(start: int, fields: dict[str, Any], complaint: str) -> None:
    sae = SAEConfig(d_in=8, **fields)
    with pytest.raises(ValueError, match=f"k_anneal_start must be {complaint}"):
        make_k_schedule(TrainConfig(k_anneal_start=start), sae, 100)


def test_the_first_limit_reached_ends_the_run() -> None:
    def steps(**limits: int | None) -> int:
        return count_steps(TrainConfig(batch_size=100, grad_acc_steps=2, **limits), 1000)

    assert steps() == 5
    assert steps(max_epochs=3) == 15
    assert steps(max_epochs=3, max_steps=4) == 4
    assert steps(max_steps=40) == 40
    assert steps(max_tokens=7_999) == 39
    assert steps(max_tokens=7_999, max_epochs=2) == 10


@pytest.mark.parametrize(
    ("limits", "named"),
    [({"max_tokens": 150}, "max_tokens = 150"), ({}, "max_epochs = 1 of 100 rows")],
)
def test_a_run_without_a_full_step_is_refused(limits: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} leaves no full step of 200 tokens"):
        count_steps(TrainConfig(batch_size=100, grad_acc_steps=2, **limits), 100)
