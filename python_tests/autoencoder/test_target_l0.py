import logging
import math

import pytest
import torch

from sae_fast.autoencoder import target_l0
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer


def steer(own, l0, target=10.0, is_on=True):
    target_l0.steer_(own, torch.tensor(float(l0)), target, 0.005, torch.tensor(is_on))
    return float(own["sparsity_scale"])


def test_coefficient_rises_while_too_many_latents_are_active_and_falls_while_too_few():
    own = target_l0.start()
    rising = [steer(own, 15) for _ in range(5)]
    assert 1 < rising[0] < rising[1] < rising[4]
    own = target_l0.start()
    falling = [steer(own, 5) for _ in range(5)]
    assert 1 > falling[0] > falling[1] > falling[4]


def test_coefficient_stays_where_the_target_is_met():
    own = target_l0.start()
    for _ in range(100):
        steer(own, 15)
    at_target = steer(own, 10)
    assert at_target > 1
    assert steer(own, 10) == at_target


def test_integral_alone_is_a_factor_of_e_in_two_hundred_steps_of_a_factor_of_e():
    own = target_l0.start()
    for _ in range(200):
        steer(own, 1000)
    assert steer(own, 10) == pytest.approx(math.e, rel=1e-3)


def test_no_latent_at_all_counts_as_a_factor_of_e_too_few():
    own = target_l0.start()
    assert steer(own, 0) == pytest.approx(math.exp(-0.3 - 0.005))


def test_nothing_moves_while_the_penalty_warms_up():
    own = target_l0.start()
    steer(own, 20)
    before = {name: tensor.clone() for name, tensor in own.items()}
    steer(own, 20, is_on=False)
    assert all(torch.equal(own[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("l0", "bound", "word"), [(1000, 1000.0, "largest"), (0, 1e-3, "smallest")]
)
def test_saturation_is_told_at_either_bound_and_only_there(l0, bound, word):
    own = target_l0.start()
    assert target_l0.saturation(steer(own, l0), 5.0, 10.0) is None
    for _ in range(2000):
        scale = steer(own, l0)
    assert scale == pytest.approx(bound, rel=1e-4)
    said = target_l0.saturation(scale, 5.0, 10.0)
    assert f"target_l0 = 10 is out of reach: the sparsity coefficient is at the {word}" in said
    assert target_l0.saturation(steer(own, 9 if l0 else 11), 5.0, 10.0) is None


def test_trainer_warns_once_when_the_target_is_out_of_reach(caplog):
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    sae = SAEConfig(arch="relu", d_sae=16, target_l0=15.9)
    run = TrainConfig(batch_size=30, max_steps=12, lr=1e-5, log_every=2, eval_every=0)
    trainer = Trainer(sae, run, x, show_progress=False)
    trainer.sae.sparsity_integral.fill_(-6.9)
    with caplog.at_level(logging.WARNING, logger="sae_fast"):
        trainer.train()
    said = [record.message for record in caplog.records if "out of reach" in record.message]
    assert len(said) == 1
    assert said[0].startswith("step ")
    assert trainer.history[-1]["sparsity_coeff"] == pytest.approx(5e-3, rel=1e-3)


def shifted(l0, weight=1.0, excess=0.5, target=10.0):
    numbers = (torch.tensor(float(value)) for value in (excess, weight))
    return float(target_l0.shift(torch.tensor(float(l0)), target, 80, *numbers))


def test_thresholds_rise_by_a_tenth_of_the_excess_for_each_factor_of_e_above_the_target():
    assert shifted(10) == 0
    assert shifted(10 * math.exp(0.5)) == pytest.approx(0.1 * 0.5 * 0.5)
    assert shifted(10 / math.exp(0.5)) == pytest.approx(-0.1 * 0.5 * 0.5)
    assert shifted(1000) == pytest.approx(0.1 * 0.5)


def test_the_wanted_l0_falls_from_half_of_the_latents_while_the_penalty_warms_up():
    assert shifted(40, weight=0.0) == pytest.approx(0, abs=1e-7)
    assert shifted(20, weight=0.5) == pytest.approx(0, abs=1e-7)
    assert shifted(40, weight=0.5) == pytest.approx(0.1 * 0.5 * math.log(2))
    assert shifted(10, weight=0.5) == 0  # a model that is sparse already stays so


def test_nothing_is_shifted_after_a_bad_step_or_without_an_active_latent():
    assert shifted(20, weight=math.nan) == 0
    assert shifted(0, excess=math.nan) == 0
