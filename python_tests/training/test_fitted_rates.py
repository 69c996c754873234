"""Rates that a run has where the settings leave them open."""

import math
from typing import Any

import pytest

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.fitted_rates import fitted_rates

TOPK = SAEConfig(d_sae=3072)
LONG_RATE = 2e-4 / math.sqrt(3072 / 2**14)


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize(
    ("steps", "rate", "beta2", "decay"),
    [
        (97, 0.01, 0.95, 0.7),
        (400, math.sqrt(125) * LONG_RATE, 0.9875, 0.7),
        (500, 10 * LONG_RATE, 0.99, 0.4),
        (5_000, math.sqrt(10) * LONG_RATE, 0.999, 0.4),
        (49_999, LONG_RATE, 0.999, 0.4),
    ],
)
def test_a_short_run_has_a_high_rate_and_a_short_memory(
    arch: Any, steps: int, rate: float, beta2: float, decay: float
) -> None:
    rates = fitted_rates(TrainConfig(), SAEConfig(arch=arch, d_sae=3072), steps)
    assert rates.peak == pytest.approx(rate, rel=1e-4)
    assert rates.betas == pytest.approx((0.8, beta2))
    assert rates.decay_fraction == decay


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("steps", [97, 300])  # at the largest rate, and below
def test_models_with_k_have_a_lower_rate_in_small_batches(arch: Any, steps: int) -> None:
    sae = SAEConfig(arch=arch, d_sae=3072)
    large = fitted_rates(TrainConfig(), sae, steps)
    assert fitted_rates(TrainConfig(batch_size=1024), sae, steps) == large
    for batch, share in ((512, 0.707107), (256, 0.5), (128, 0.353553)):
        small = fitted_rates(TrainConfig(batch_size=batch), sae, steps)
        assert small.peak == pytest.approx(share * large.peak, rel=1e-5)
        assert small.betas == large.betas
        assert small.decay_fraction == (0.7 if small.peak > 0.005 else 0.4)


def test_a_batch_is_all_that_a_step_trains_on() -> None:
    whole = fitted_rates(TrainConfig(batch_size=512), TOPK, 97)
    for parts in (
        TrainConfig(batch_size=128, grad_acc_steps=4),
        TrainConfig(batch_size=256, mesh="data=2"),
        TrainConfig(batch_size=64, grad_acc_steps=2, mesh="data=4"),
        TrainConfig(batch_size=512, mesh="latents=2"),
    ):
        assert fitted_rates(parts, TOPK, 97) == whole


@pytest.mark.parametrize("arch", ["relu", "jumprelu", "gated"])
def test_models_with_limits_have_one_rate_in_all_batches(arch: Any) -> None:
    sae = SAEConfig(arch=arch, d_sae=3072)
    small = fitted_rates(TrainConfig(batch_size=32), sae, 300)
    assert small == fitted_rates(TrainConfig(), sae, 300)


def test_a_small_batch_keeps_at_least_the_rate_of_a_long_run() -> None:
    rates = fitted_rates(TrainConfig(batch_size=16), TOPK, 40_000)
    assert rates.peak == TrainConfig().peak_learning_rate(3072)


@pytest.mark.parametrize("arch", ["relu", "jumprelu", "gated"])
@pytest.mark.parametrize(("steps", "rate"), [(20, 0.01), (500, 5 * LONG_RATE), (49_999, LONG_RATE)])
def test_models_with_limits_have_half_of_the_high_rate(arch: Any, steps: int, rate: float) -> None:
    limited = fitted_rates(TrainConfig(), SAEConfig(arch=arch, d_sae=3072), steps)
    assert limited.peak == pytest.approx(rate, rel=1e-4)
    assert limited.betas == fitted_rates(TrainConfig(), TOPK, steps).betas
    assert limited.decay_fraction == 0.4


def test_a_long_run_and_other_models_and_optimizers_have_the_rates_of_a_long_run() -> None:
    expected = (pytest.approx(LONG_RATE), 0.2, (0.9, 0.999))
    assert fitted_rates(TrainConfig(), TOPK, 50_000) == expected
    assert fitted_rates(TrainConfig(), SAEConfig(arch="relu", d_sae=3072), 50_000) == expected
    assert fitted_rates(TrainConfig(), SAEConfig(arch="slots", d_sae=3072), 97) == expected
    signum = fitted_rates(TrainConfig(optimizer="signum"), TOPK, 97)
    assert signum == (pytest.approx(LONG_RATE / 2), 0.2, (0.9, 0.999))


def test_what_is_given_stays() -> None:
    given = TrainConfig(lr=1e-3, betas=(0.5, 0.7), decay_fraction=0.1)
    assert fitted_rates(given, TOPK, 97) == (1e-3, 0.1, (0.5, 0.7))
    assert fitted_rates(TrainConfig(lr=1e-3), TOPK, 97) == (1e-3, 0.4, (0.8, 0.95))
    assert fitted_rates(TrainConfig(lr=0.02), TOPK, 97) == (0.02, 0.7, (0.8, 0.95))


def test_a_small_dictionary_keeps_its_rate() -> None:
    """Its rate in a long run is above the largest one that length alone gives."""
    tiny = SAEConfig(d_sae=4)
    assert fitted_rates(TrainConfig(), tiny, 10).peak == pytest.approx(2e-4 / math.sqrt(4 / 2**14))
