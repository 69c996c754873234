"""Learning-rate schedule and length of a run."""

import pytest

from sae_fast.config import TrainConfig
from sae_fast.training.schedule import count_steps, make_schedule, make_sparsity_schedule


def test_schedule_rises_holds_and_falls() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=10, decay_fraction=0.2)
    schedule = make_schedule(config, d_sae=64, total_steps=100)
    rates = [schedule(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10:80] == [1.0] * 70
    assert rates[79:] == sorted(rates[79:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 21)
    assert min(rates) > 0


def test_warm_up_defaults_to_a_twentieth_of_the_run() -> None:
    schedule = make_schedule(TrainConfig(learning_rate=1.0), d_sae=64, total_steps=200)
    assert schedule(9) < 1.0 == schedule(10)


def test_default_peak_scales_with_the_dictionary() -> None:
    assert make_schedule(TrainConfig(), 2**14, 10).peak == pytest.approx(2e-4)
    assert make_schedule(TrainConfig(), 2**12, 10).peak == pytest.approx(4e-4)


def test_sparsity_weight_rises_to_one_and_stays() -> None:
    schedule = make_sparsity_schedule(TrainConfig(sparsity_warmup_steps=4), total_steps=100)
    assert [schedule(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    by_default = make_sparsity_schedule(TrainConfig(), total_steps=100)
    assert by_default(4) < 1.0 == by_default(5)
    assert make_sparsity_schedule(TrainConfig(sparsity_warmup_steps=0), 100)(0) == 1.0


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
