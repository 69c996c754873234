"""A signed but inconsistent resume state is refused, or an earlier checkpoint is used."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.tensor_files import sha256_of
from sae_fast.training.checkpoint import CheckpointError, _digest
from sae_fast.training.schedule import make_schedule
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=32, k=3)
RUN = TrainConfig(
    batch_size=64,
    max_steps=6,
    learning_rate=1e-3,
    pool_rows=700,
    checkpoint_every=3,
    average_decay=0.9,
)

State = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(name="run", scope="module")
def finish_run(shard_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Finish a run with checkpoints of steps 0, 3 and 6."""
    directory = tmp_path_factory.mktemp("run")
    run = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(directory))
    Trainer(SAE, run, show_progress=False).train()
    return run


@pytest.fixture(name="resigned")
def copy_run(run: TrainConfig, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Copy a run, with another state or other tensors in its last checkpoint, validly signed."""

    def resign(
        edit_state: Callable[[State], object] = lambda state: None,
        edit_tensors: Callable[[Tensors], object] = lambda tensors: None,
    ) -> TrainConfig:
        directory = tmp_path / "run"
        shutil.copytree(str(run.checkpoint_dir), directory, symlinks=True)
        newest = directory / "checkpoints" / "step-00000006"
        tensors = load_file(newest / "trainer.safetensors")
        edit_tensors(tensors)
        save_file(tensors, newest / "trainer.safetensors")
        state = json.loads((newest / "trainer.json").read_text())
        del state["digest"]
        state["sha256"] = {
            path.name: sha256_of(path) for path in newest.iterdir() if path.name != "trainer.json"
        }
        edit_state(state)
        text = json.dumps({**state, "digest": _digest(state)})
        (newest / "trainer.json").write_text(text)
        return replace(run, checkpoint_dir=str(directory), resume_from="latest", max_steps=9)

    return resign


def test_state_that_was_only_signed_again_goes_on(resigned: Callable[..., TrainConfig]) -> None:
    trainer = Trainer(SAE, resigned(), show_progress=False)
    assert trainer.step == 6


@pytest.mark.parametrize("name", ["best", "wandb_id"])
def test_state_without_what_a_run_need_not_have_goes_on(
    resigned: Callable[..., TrainConfig], name: str
) -> None:
    trainer = Trainer(SAE, resigned(lambda state: state.pop(name)), show_progress=False)
    assert trainer.step == 6


def _set(*path: Any, to: Any) -> Callable[[State], object]:
    def edit(state: State) -> None:
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = to

    return edit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("step", to="6"), "step must be a whole number"),
        (_set("step", to=5), "step must be the number in step-00000006"),
        (_set("tokens", to=None), "tokens must be a whole number"),
        (_set("tokens", to=2), "tokens must be a number that fits 6 steps"),
        (_set("tokens", to=0), "tokens must be a number that fits 6 steps"),
        (_set("seconds", to=-1), "seconds must be a number of at least 0"),
        (_set("stalled_seconds", to="x"), "stalled_seconds must be a number"),
        (_set("config", to=[]), "config must be settings"),
        (_set("config", "sae", "k", to=-1), "config: k must be at least 1"),
        (_set("config", "train", "nothing", to=1), "config: unknown key 'nothing'"),
        (_set("loss_scaler", "scale", to=0), "loss_scaler.scale must be in float32, above 0"),
        (_set("loss_scaler", "scale", to=1e308), "loss_scaler.scale must be in float32, above 0"),
        (_set("loss_scaler", "skipped_steps", to=7), "loss_scaler.skipped_steps must be at most 6"),
        (_set("source", to=None), "source must be a JSON object"),
        (_set("best", to={"heldout_fvu": 1, "step": 9}), "best.step must be at most 6"),
        (_set("scheduler_state", "step", to=5), "scheduler_state.step must be the 6 steps made"),
        (_set("scheduler_state", "total_steps", to=None), "scheduler_state.total_steps must be"),
        (_set("best", to="x"), "best must be a JSON object"),
        (_set("best", to={"heldout_fvu": "x", "step": 4}), "best.heldout_fvu must be a number"),
        (_set("wandb_id", to=3), "wandb_id must be a string"),
        (_set("random", "python", 1, 3, to=-1), "random.python must be a state"),
        (_set("random", "numpy", 1, to=[1, 2]), "random.numpy must be a state"),
        (_set("random", to=None), "random must be a JSON object"),
        (_set("sha256", to={}), "sha256 must be sums"),
        (lambda state: state.pop("tokens"), "has no tokens"),
    ],
)
def test_inconsistent_values_are_passed_over_for_the_checkpoint_before(
    resigned: Callable[..., TrainConfig],
    edit: Callable[[State], object],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = Trainer(SAE, resigned(edit), show_progress=False)
    assert trainer.step == 3
    assert f"trainer.json: {message}" in caplog.text


@pytest.mark.parametrize("name", ["sae.safetensors", "trainer.safetensors", "trainer.json"])
def test_pipe_in_place_of_a_file_is_passed_over_without_waiting(
    resigned: Callable[..., TrainConfig], name: str
) -> None:
    run = resigned()
    path = Path(str(run.checkpoint_dir)) / "checkpoints" / "step-00000006" / name
    path.unlink()
    os.mkfifo(path)
    assert Trainer(SAE, run, show_progress=False).step == 3


def _with(name: str, value: torch.Tensor | None) -> Callable[[Tensors], object]:
    def edit(tensors: Tensors) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return edit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_with("optimizer.step", torch.tensor(5)), "must be the 6 updates of 6 steps, got 5"),
        (_with("optimizer.step", torch.tensor(6.0)), "optimizer.step must be of torch.int64"),
        (_with("optimizer.W_enc.exp_avg", None), "has no tensor optimizer.W_enc.exp_avg"),
        (
            _with("optimizer.b_dec.exp_avg", torch.full((16,), torch.nan)),
            "optimizer.b_dec.exp_avg holds NaN or Inf",
        ),
        (
            _with("optimizer.b_dec.exp_avg_sq", torch.full((16,), -1.0)),
            "optimizer.b_dec.exp_avg_sq must not be negative",
        ),
        (_with("optimizer.b_enc.exp_avg", torch.zeros(3)), r"must have shape \(32,\), got \(3,\)"),
        (_with("optimizer.nothing", torch.zeros(3)), "unknown tensor optimizer.nothing"),
        (_with("average.W_enc", None), "has no tensor average.W_enc"),
        (_with("average.b_dec", torch.zeros(3)), "average.b_dec must have shape"),
        (_with("rng.cpu", torch.zeros(5, dtype=torch.uint8)), "rng.cpu must have shape"),
        (_with("rng.cpu", None), "has no tensor rng.cpu"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    resigned: Callable[..., TrainConfig], edit: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"step-00000006 does not fit this run: .*{message}"):
        Trainer(SAE, resigned(edit_tensors=edit), show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("tokens", to=400), "source must be 400 tokens on, got 384"),
        (_set("source", "cursor", to=[]), "data position: must have epoch"),
        (_set("source", "cursor", "window", to=99), "window 99 of "),
        (_set("source", "cursor", "served", to=-1), "served must be a whole number"),
        (_set("source", "cursor", "tokens", to=385), "385 tokens served, but its window begins"),
        (_set("source", "cursor", "epoch", to=2**62), "epoch 4611686018427387904 with 384 tokens"),
        (_set("source", "shards", to="x"), "shards must be a list of names"),
        (_set("source", "shards", to=1e308), "shards must be a list of names"),
        (_set("source", "shards", to=[["a", 1]]), "shards must be a list of names"),
        (_set("source", "origin", to=3), "must be a JSON object with its origin"),
        (_set("source", "sets", to=3), "must be of 1 sets of shards"),
    ],
)
def test_position_that_does_not_fit_the_data_is_refused(
    resigned: Callable[..., TrainConfig], edit: Callable[[State], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"step-00000006 does not fit this run: .*{message}"):
        Trainer(SAE, resigned(edit), show_progress=False)


def test_checkpoint_tells_the_state_of_the_schedule(run: TrainConfig) -> None:
    path = Path(str(run.checkpoint_dir)) / "checkpoints" / "step-00000003" / "trainer.json"
    schedule = make_schedule(run, SAE, 6)
    assert json.loads(path.read_text())["scheduler_state"] == {
        "step": 3,
        "last_learning_rate": schedule(2),
        "peak_learning_rate": 1e-3,
        "warmup_steps": schedule.warmup_steps,
        "decay_steps": schedule.decay_steps,
        "total_steps": 6,
    }


def test_run_that_is_extended_tells_how_the_rate_goes_on(
    resigned: Callable[..., TrainConfig], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    longer = resigned()
    before, now = make_schedule(RUN, SAE, 6), make_schedule(longer, SAE, 9)
    Trainer(SAE, longer, show_progress=False)
    assert (
        "the run has 9 steps now, not 6: the learning rate continues from "
        f"{before(5):.3g} at step 6 to {now(6):.3g} at the next" in caplog.text
    )
    assert f"and ends with {now(8):.3g}" in caplog.text
    caplog.clear()
    Trainer(SAE, replace(longer, max_steps=6), show_progress=False)
    assert "the learning rate continues" not in caplog.text
