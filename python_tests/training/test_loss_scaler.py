"""Loss scaling follows torch.amp.GradScaler."""

import torch

from sae_fast.training.optimizer.loss_scaler import GROWTH_INTERVAL, LossScaler

NORM, OVERFLOW = torch.tensor(1.0), torch.tensor(torch.inf)


def test_scale_halves_on_overflow_and_doubles_after_the_interval() -> None:
    scaler = LossScaler(enabled=True)
    scaler.update(OVERFLOW)
    assert scaler.factor == 2.0**15
    for _ in range(GROWTH_INTERVAL):
        scaler.update(NORM)
    assert scaler.factor == 2.0**16
    assert scaler.skipped_steps == 1


def test_sequence_of_scales_is_that_of_torch() -> None:
    theirs = torch.amp.GradScaler("cpu", growth_interval=GROWTH_INTERVAL)
    ours = LossScaler(enabled=True)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(40):
        overflowed = step % 7 == 3
        theirs.scale(weight.sum() * (float("inf") if overflowed else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(OVERFLOW if overflowed else NORM)
        assert ours.factor == theirs.get_scale()


def test_state_round_trips_and_disabled_stays_at_one() -> None:
    scaler = LossScaler(enabled=True)
    scaler.update(OVERFLOW)
    other = LossScaler(enabled=True)
    other.load(scaler.state())
    assert other.state() == scaler.state()
    disabled = LossScaler(enabled=False)
    disabled.update(OVERFLOW)
    assert disabled.factor == 1.0


def test_factor_is_one_tensor_and_the_scale_has_a_floor() -> None:
    scaler = LossScaler(enabled=True)
    factor = scaler.factor
    for _ in range(40):
        scaler.update(OVERFLOW)
    assert scaler.factor is factor
    assert factor == 2.0**-14
    assert scaler.state() == {
        "enabled": True,
        "scale": 2.0**-14,
        "steps_since_overflow": 0,
        "skipped_steps": 40,
    }


def test_scale_never_grows_to_infinity() -> None:
    scaler = LossScaler(enabled=True)
    scaler.scale.fill_(2.0**127)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    theirs.scale(torch.zeros(1))
    theirs._per_optimizer_states[0]["found_inf_per_device"][torch.device("cpu")] = torch.zeros(1)
    theirs.update()
    for _ in range(GROWTH_INTERVAL):
        scaler.update(NORM)
    assert scaler.factor == theirs.get_scale() == 2.0**127
    scaler.update(OVERFLOW)
    assert scaler.factor == 2.0**126
