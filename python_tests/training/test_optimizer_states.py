"""Moments in bfloat16 and 8 bits: similar training, less memory, and no mixed dtypes."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_sae import PARAMETERS, make_batch, make_sae

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.checkpoint import CheckpointError
from sae_fast.training.memory_plan import plan_memory
from sae_fast.training.optimizer.row_optimizer import (
    STATE_DTYPES,
    DenseOptimizer,
    RowOptimizer,
    make_optimizer,
)
from sae_fast.training.trainer import Trainer

LOW = ("bf16", "8bit")
EXAMPLES = Path(__file__).parents[2] / "examples" / "activations"


def _train(sae: Any, optimizer: RowOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        sae.training_loss(make_batch(sae, seed=step), dense_grad=False).total.backward()
        optimizer.step(1e-2)


@pytest.mark.parametrize("states", STATE_DTYPES)
def test_rows_are_kept_as_asked_and_biases_in_float32(states: str) -> None:
    state = RowOptimizer(make_sae(d_in=300), states=states).state_dict()
    for name in PARAMETERS:
        dtype = STATE_DTYPES[states] if name.startswith("W") else torch.float32
        assert state[f"{name}.exp_avg"].dtype == state[f"{name}.exp_avg_sq"].dtype == dtype
    scales = {name: tuple(state[name].shape) for name in state if name.endswith("scale")}
    wanted = {
        f"{W}.{m}_scale": (40, 2) for W in ("W_enc", "W_dec") for m in ("exp_avg", "exp_avg_sq")
    }
    assert scales == (wanted if states == "8bit" else {})


@pytest.mark.parametrize("states", LOW)
def test_first_step_is_that_of_float32_moments(states: str) -> None:
    sae = make_sae(dead=(1, 3, 8))
    other = copy.deepcopy(sae)
    _train(sae, RowOptimizer(sae, states=states), range(1))
    _train(other, RowOptimizer(other), range(1))
    for name in PARAMETERS:
        assert torch.equal(sae.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("states", LOW)
def test_state_goes_on_in_another_optimizer_to_the_bit(states: str) -> None:
    sae = make_sae(d_in=300)
    optimizer = RowOptimizer(sae, states=states)
    _train(sae, optimizer, range(3))
    other = copy.deepcopy(sae)
    resumed = RowOptimizer(other, states=states)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(sae, optimizer, range(3, 6))
    _train(other, resumed, range(3, 6))
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    for name in PARAMETERS:
        assert torch.equal(sae.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize(("saved", "own"), [("fp32", "8bit"), ("8bit", "bf16"), ("bf16", "fp32")])
def test_state_of_another_kind_is_refused_by_name(saved: str, own: str) -> None:
    state = RowOptimizer(make_sae(), states=saved).state_dict()
    message = f"W_enc.exp_avg is of a run with optimizer_states = {saved}, this one has {own}"
    with pytest.raises(ValueError, match=re.escape(message)):
        RowOptimizer(make_sae(), states=own).load_state_dict(state)


def test_dense_optimizer_keeps_float32_only() -> None:
    message = "optimizer_states must be 'fp32' where fused is false: .*, got '8bit'"
    with pytest.raises(ValueError, match=message):
        TrainConfig(fused=False, optimizer_states="8bit")
    with pytest.raises(ValueError, match=r"states must be 'fp32' .*, got 'bf16'"):
        DenseOptimizer(make_sae(), states="bf16")


@pytest.mark.parametrize("states", STATE_DTYPES)
def test_optimizer_is_made_as_configured(states: str) -> None:
    config = TrainConfig.from_dict({"optimizer_states": states})
    assert make_optimizer(make_sae(), config).states == states


@pytest.mark.parametrize(("states", "a_row"), [("fp32", 400), ("bf16", 200), ("8bit", 104)])
def test_memory_plan_counts_the_states_as_they_are_kept(states: str, a_row: int) -> None:
    sae = SAEConfig(d_in=100, d_sae=1000)
    train = TrainConfig.from_dict({"optimizer_states": states})
    plan = plan_memory(sae, train, native=True, pool_bytes=0)
    assert plan.parts["optimiser states"] == 2 * (2 * 1000 * a_row + 4 * (1000 + 100))
    state = RowOptimizer(make_sae(d_in=100, d_sae=1000), states=states).state_dict()
    del state["step"]
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert plan.parts["optimiser states"] == held


@pytest.mark.parametrize("changed", STATE_DTYPES)
def test_run_is_not_resumed_with_other_states(
    shard_dir: Path, tmp_path: Path, changed: str
) -> None:
    config = {"shard_dir": str(shard_dir), "checkpoint_dir": str(tmp_path / "run")}
    run = TrainConfig.from_dict({**config, "batch_size": 64, "max_steps": 3})
    sae = SAEConfig(d_sae=64, k=3)
    Trainer(sae, replace(run, optimizer_states="8bit"), show_progress=False).train()
    again = TrainConfig.from_dict(
        {**run.to_dict(), "optimizer_states": changed, "resume_from": "latest", "max_steps": 5}
    )
    if changed == "8bit":
        Trainer(sae, again, show_progress=False).train()
        return
    message = f"optimizer_states = 8bit, this one has {changed}"
    with pytest.raises(CheckpointError, match=message):
        Trainer(sae, again, show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("states", LOW)
def test_real_activations_are_learnt_as_with_float32(states: str) -> None:
    reached = {}
    for kept in ("fp32", states):
        run = TrainConfig.from_dict(
            {
                **{"shard_dir": str(EXAMPLES), "batch_size": 128, "max_steps": 200},
                **{"learning_rate": 2e-3, "eval_every": 0, "optimizer_states": kept},
            }
        )
        trainer = Trainer(SAEConfig(d_sae=256, k=16), run, show_progress=False)
        trainer.train()
        reached[kept] = trainer.summary["final_heldout_fvu"]
    assert reached["fp32"] < 0.5
    assert reached[states] == pytest.approx(reached["fp32"], rel=0.01)
    assert reached[states] != reached["fp32"]
