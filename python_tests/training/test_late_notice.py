"""A run whose host is ahead of the device equals one whose host waits; errors name their step.

On a GPU the host of every run is ahead. On the CPU these tests emulate it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_cuda_graph import EmulatedRecorder

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training import launcher
from sae_fast.training.step import TrainingStep
from sae_fast.training.trainer import Trainer, TrainingError

SAE = SAEConfig(d_sae=128, k=3, dead_after_tokens=500, decorrelation_coeff=0.1)
RUN = TrainConfig(
    batch_size=64,
    max_steps=60,
    learning_rate=1e-2,
    pool_rows=700,
    log_every=6,
    eval_every=20,
    checkpoint_every=15,
)
TIMES = ("tokens_per_second", "time_per_step_ms", "reader_stall_fraction")
Make = Callable[..., Trainer]


@pytest.fixture(params=[True, False], ids=["graph", "eager"])
def graph(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def make(device: torch.device, graph: bool, shard_dir: Path) -> Make:
    """Make a trainer on the device; on the CPU with a host that behaves as on a GPU."""
    run = replace(RUN, shard_dir=str(shard_dir), device=str(device), cuda_graph=graph)

    def make_trainer(data: Any = None, *, sae: SAEConfig = SAE, **changes: Any) -> Trainer:
        if data is not None:  # rows in memory accept no settings of shards
            changes = {"shard_dir": None, **changes}
        kind = Trainer if device.type == "cuda" else AheadTrainer
        return kind(sae, replace(run, **changes), data, show_progress=False)

    return make_trainer


class AheadTrainer(Trainer):
    """On the CPU: batches ahead, a census instead of counts, late notice, and replayed steps."""

    is_ahead = True

    def graph_recorder(self, step: TrainingStep) -> Any:
        config = self.train_config
        return EmulatedRecorder(step.sae) if config.cuda_graph and config.fused else None


class WaitingTrainer(Trainer):
    """On a GPU: the host waits for every step and counts the dead latents itself."""

    is_ahead = False

    def graph_recorder(self, step: TrainingStep) -> None:
        return None


def _reproducible(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name not in TIMES} for row in rows]


def _outcome(trainer: Trainer) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    trainer.train()
    state = trainer.optimizer.state_dict()
    tensors = [*trainer.sae.state_dict().values(), *state.values()]
    return [tensor.cpu() for tensor in tensors], _reproducible(trainer.history)


def _equal(first: Any, second: Any) -> bool:
    return all(map(torch.equal, first[0], second[0])) and first[1] == second[1]


def _stop_after(trainer: Trainer, step: int) -> None:
    with trainer:
        while trainer.step < step:
            trainer.advance()


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_two_runs_are_bit_equal_and_learn_of_the_dead(make: Make, amp: str) -> None:
    first, second = _outcome(make(amp=amp)), _outcome(make(amp=amp))
    assert _equal(first, second)
    assert max(row["aux_loss"] for row in first[1] if "aux_loss" in row) > 0


def test_a_host_that_is_ahead_changes_no_result(
    make: Make, device: torch.device, shard_dir: Path
) -> None:
    run = replace(RUN, shard_dir=str(shard_dir), device=str(device), cuda_graph=False)
    other = WaitingTrainer(SAE, run, show_progress=False)
    assert _equal(_outcome(make()), _outcome(other))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"amp": "bf16"},
        {"amp": "fp16", "grad_acc_steps": 2, "max_steps": 30},
        {"fused": False, "max_steps": 30},
    ],
    ids=["screened", "bf16", "fp16-accumulated", "dense"],
)
def test_stopped_and_resumed_runs_end_bit_equal(
    make: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    straight = make(checkpoint_dir=str(tmp_path / "straight"), **changes)
    expected = _outcome(straight)
    stopped: dict[str, Any] = {**changes, "checkpoint_dir": str(tmp_path / "stopped")}
    for step in (1, 13, 14, 29):
        _stop_after(make(**stopped), step)
        stopped["resume_from"] = "latest"
    resumed = make(**stopped)
    assert resumed.step == 29
    assert _equal(_outcome(resumed), expected)
    finals = [load_file(d / "checkpoints/latest/trainer.safetensors") for d in tmp_path.iterdir()]
    assert finals[0].keys() == finals[1].keys()


def test_a_tensor_where_the_training_is_gives_the_same(
    make: Make, device: torch.device, activations: torch.Tensor
) -> None:
    assert _equal(_outcome(make(activations.to(device))), _outcome(make(activations)))


class _Poisoned:
    """A caller's own source with a NaN in batch number `bad`, counted from 1."""

    d_in, stall_seconds, epoch = 16, 0.0, 0

    def __init__(self, rows: torch.Tensor, bad: int, value: float = math.nan) -> None:
        self.rows_per_epoch = len(rows)
        self._batches = rows.split(64)[:40]
        self._bad, self._value = bad, value
        self._state = {"served": 0}

    @property
    def tokens_served(self) -> int:
        return 64 * self._state["served"]

    def next_batch(self) -> torch.Tensor:
        batch = self._batches[self._state["served"] % 40].clone()
        self._state["served"] += 1
        if self._state["served"] == self._bad:
            batch[5, 2] = self._value
        return batch

    def current_shards(self) -> list[Path]:
        return [Path(f"shard-of-batch-{self._state['served']}")]

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)

    def close(self) -> None:
        pass


RAW = replace(SAE, normalize_activations="none")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "amp", "told"),
    [
        (math.nan, "off", "loss is nan .*; rows hold NaN or Inf"),
        (math.inf, "bf16", "loss is nan .*; rows hold NaN or Inf"),
        (math.nan, "fp16", "loss is nan .*; rows hold NaN or Inf"),
        (1e19, "off", "gradient's norm is inf .*; a lower learning rate may help"),
        (1e25, "off", "loss is nan .*; rows hold numbers too large to square"),
    ],
    ids=["NaN", "Inf", "fp16", "norm", "loss"],
)
def test_a_bad_step_is_named_late_and_leaves_everything_as_it_was(
    make: Make, activations: torch.Tensor, tmp_path: Path, value: float, amp: str, told: str
) -> None:
    changes = {"checkpoint_dir": str(tmp_path), "log_every": 20, "eval_every": 0, "amp": amp}
    trainer = make(_Poisoned(activations, bad=24, value=value), sae=RAW, **changes)
    named = f"^step 24, reading shard-of-batch-24: the {told}"
    with pytest.raises(TrainingError, match=f"{named}.*step-00000015 is intact$") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert trainer.step == 30  # when the next checkpoint was due
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000015"
    changes["checkpoint_dir"] = str(tmp_path / "good")
    good = make(_Poisoned(activations, bad=0), sae=RAW, max_steps=23, decay_fraction=0.0, **changes)
    halted = make(
        _Poisoned(activations, bad=24, value=value),
        sae=RAW,
        decay_fraction=0.0,
        warmup_steps=round(0.05 * 23),
        **{**changes, "checkpoint_dir": None},
    )
    with pytest.raises(TrainingError):
        halted.train()
    good.train()
    assert all(map(torch.equal, halted.sae.parameters(), good.sae.parameters()))


def test_a_signal_after_a_bad_step_saves_nothing(
    make: Make, activations: torch.Tensor, tmp_path: Path
) -> None:
    trainer = make(_Poisoned(activations, bad=17), sae=RAW, checkpoint_dir=str(tmp_path))
    with pytest.raises(TrainingError, match="step 17, reading shard-of-batch-17"):
        _stop_after(trainer, 17)
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000015"


def test_a_bad_step_is_noticed_even_where_nothing_is_due(
    make: Make, activations: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "NOTICED_WITHIN", 8)
    trainer = make(_Poisoned(activations, bad=18), sae=RAW, log_every=1000, eval_every=0)
    with pytest.raises(TrainingError, match="step 18, reading shard-of-batch-18"):
        trainer.train()
    assert trainer.step == 24


def test_a_callers_own_source_is_resumed_where_the_step_was(
    make: Make, activations: torch.Tensor, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"checkpoint_dir": str(tmp_path / "straight")}
    expected = _outcome(make(_Poisoned(activations, bad=0), **changes))
    changes["checkpoint_dir"] = str(tmp_path / "stopped")
    _stop_after(make(_Poisoned(activations, bad=0), **changes), 22)
    resumed = make(_Poisoned(activations, bad=0), resume_from="latest", **changes)
    assert _equal(_outcome(resumed), expected)


def test_a_full_memory_is_told_with_the_plan_and_saves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(checkpoint_dir=str(tmp_path))
    loss = trainer.sae.architecture.loss
    calls = []

    def full(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")
        return loss(*arguments, **options)

    monkeypatch.setattr(trainer.sae.architecture, "loss", full)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    message = str(error.value)
    assert re.match(r"step 2: out of memory \(CUDA out of memory\); .* MiB in memory", message)
    for part in ("planned (largest: ", "lower batch_size, expansion_factor", "pool_rows"):
        assert part in message
    assert message.endswith("is intact")
    assert "\n" not in message
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000000"
