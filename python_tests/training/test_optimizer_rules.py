"""Runs with SGD or Signum, also schedule-free, where they differ from runs with Adam."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_sae import PARAMETERS, make_batch, make_sae
from safetensors.torch import load_file

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.checkpoint import CheckpointError
from sae_fast.training.memory_plan import plan_memory
from sae_fast.training.optimizer.row_optimizer import (
    STATE_DTYPES,
    DenseOptimizer,
    RowOptimizer,
    SparseOptimizer,
    make_optimizer,
)
from sae_fast.training.optimizer.signum import Signum
from sae_fast.training.trainer import Trainer

ONE_MOMENT = ("sgd", "signum", "schedule_free_signum")
RULES = ("adam", *ONE_MOMENT)
KEPT = [  # the state dtypes of each rule: the average of schedule-free is too inexact in 8 bits
    (rule, states)
    for rule in ONE_MOMENT
    for states in STATE_DTYPES
    if (rule, states) != ("schedule_free_signum", "8bit")
]
EXAMPLES = Path(__file__).parents[2] / "examples" / "activations"


def _train(sae: Any, optimizer: SparseOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = sae.training_loss(make_batch(sae, seed=step), dense_grad=optimizer.dense_grad)
        loss.total.backward()
        optimizer.step(1e-2)


@pytest.mark.parametrize(("rule", "states"), KEPT)
def test_one_moment_is_kept_and_planned(rule: Any, states: Any) -> None:
    state = RowOptimizer(make_sae(d_in=300), rule=rule, states=states).state_dict()
    first = {"sgd": "momentum_buffer", "signum": "exp_avg"}.get(rule, "z_minus_y")
    scales = {f"{name}.{first}_scale" for name in ("W_enc", "W_dec") if states == "8bit"}
    counters = {"step", "lr_squares"} if first == "z_minus_y" else {"step"}
    assert set(state) == counters | {f"{name}.{first}" for name in PARAMETERS} | scales
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    held -= 8 * len(counters)
    train = TrainConfig(optimizer=rule, optimizer_states=states)
    plan = plan_memory(SAEConfig(d_in=300, d_sae=40), train, native=True, pool_bytes=0)
    assert plan.parts["optimiser states"] == held


@pytest.mark.parametrize(
    ("kind", "rule", "states"),
    [
        *((RowOptimizer, rule, states) for rule, states in KEPT),
        *((DenseOptimizer, rule, "fp32") for rule in ONE_MOMENT),
    ],
)
def test_state_goes_on_in_another_optimizer_to_the_bit(rule: str, kind: Any, states: str) -> None:
    sae = make_sae(d_in=300)
    optimizer = kind(sae, rule=rule, states=states)
    _train(sae, optimizer, range(3))
    other = copy.deepcopy(sae)
    resumed = kind(other, rule=rule, states=states)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(sae, optimizer, range(3, 6))
    _train(other, resumed, range(3, 6))
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    for name in PARAMETERS:
        assert torch.equal(sae.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("saved", RULES)
@pytest.mark.parametrize("own", RULES)
def test_state_of_another_rule_is_refused_by_name(saved: str, own: str) -> None:
    state = RowOptimizer(make_sae(), rule=saved).state_dict()
    optimizer = RowOptimizer(make_sae(), rule=own)
    if saved == own:
        optimizer.load_state_dict(state)
        return
    message = f"is of a run with optimizer = {saved}, this one has {own}"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(state)


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of adam, sgd, signum, .*, got 'lion'"):
        DenseOptimizer(make_sae(), rule="lion")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rule", ONE_MOMENT)
def test_optimizer_is_made_as_configured(fused: bool, rule: Any) -> None:
    config = TrainConfig(fused=fused, optimizer=rule, momentum=0.8, weight_decay=0.1)
    optimizer = make_optimizer(make_sae(), config)
    assert (optimizer.rule, optimizer.momentum, optimizer.weight_decay) == (rule, 0.8, 0.1)
    default = make_optimizer(make_sae(), TrainConfig(optimizer=rule))
    assert default.momentum == TrainConfig(optimizer=rule).kept_momentum


def test_signum_makes_steps_of_one_size() -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizer = Signum([w], lr=0.5, momentum=0.75, weight_decay=0.0)
    optimizer.step()  # without a gradient there is nothing to do
    w.grad = torch.tensor([1e-9, -5.0, 0.0, 8.0])
    optimizer.step()
    assert w.tolist() == [0.5, 2.5, 3.0, 3.5]
    w.grad = torch.tensor([-1.0, 0.0, 0.0, -20.0])
    optimizer.step()
    assert w.tolist() == [1.0, 3.0, 3.0, 4.0]
    assert optimizer.state[w]["exp_avg"].tolist() == pytest.approx([-0.25, -0.9375, 0.0, -3.5])


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "states"), KEPT)
def test_resumed_run_equals_a_straight_one_to_the_bit(
    shard_dir: Path, tmp_path: Path, rule: Any, states: Any
) -> None:
    sae = SAEConfig(d_sae=64, k=3, decorrelation_coeff=0.1)
    run = TrainConfig(
        **{"shard_dir": str(shard_dir), "batch_size": 64, "max_steps": 20, "eval_every": 0},
        **{"optimizer": rule, "optimizer_states": states, "pool_rows": 700, "warmup_steps": 4},
        checkpoint_every=7,
        keep_checkpoints=9,
        checkpoint_dir=str(tmp_path / "run"),
    )

    def final(run: TrainConfig) -> dict[str, torch.Tensor]:
        Trainer(sae, run, show_progress=False).train()
        latest = Path(str(run.checkpoint_dir)) / "checkpoints" / "latest"
        return load_file(latest / "sae.safetensors") | load_file(latest / "trainer.safetensors")

    straight = final(run)
    (middle,) = (tmp_path / "run" / "checkpoints").glob("*14")
    again = replace(run, resume_from=str(middle), checkpoint_dir=str(tmp_path / "resumed"))
    resumed = final(again)
    assert set(straight) == set(resumed)
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


def test_run_is_not_resumed_with_another_rule(shard_dir: Path, tmp_path: Path) -> None:
    config = {"shard_dir": str(shard_dir), "checkpoint_dir": str(tmp_path / "run")}
    run = TrainConfig.from_dict({**config, "batch_size": 64, "max_steps": 3, "optimizer": "sgd"})
    sae = SAEConfig(d_sae=64, k=3)
    Trainer(sae, run, show_progress=False).train()
    again = replace(run, optimizer="signum", resume_from="latest", max_steps=5)
    with pytest.raises(CheckpointError, match="optimizer = sgd, this one has signum"):
        Trainer(sae, again, show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "rate"),
    [("adam", 3e-3), ("sgd", 0.3), ("signum", 1e-3), ("schedule_free_signum", 3e-3)],
)
def test_real_activations_are_learnt(rule: Any, rate: float) -> None:
    run = TrainConfig(
        **{"shard_dir": str(EXAMPLES), "batch_size": 128, "max_steps": 200, "eval_every": 0},
        **{"optimizer": rule, "learning_rate": rate},
    )
    trainer = Trainer(SAEConfig(d_sae=256, k=16), run, show_progress=False)
    trainer.train()
    assert trainer.summary["final_heldout_fvu"] < 0.5
