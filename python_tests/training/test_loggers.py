"""Weights & Biases (offline) and TensorBoard get the rows of a run, each step once and in order."""

import contextlib
import json
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.training.loggers import DENSITIES, Loggers, log_densities
from sae_fast.training.sweep import Sweep, read_sweep
from sae_fast.training.trainer import Trainer

PATIENCE = 240  # seconds; only a blocked machine takes longer
VALUES = f"{DENSITIES}.values"
SAE = SAEConfig(d_sae=32, k=2)
RUN = TrainConfig(
    batch_size=64,
    max_steps=8,
    learning_rate=3e-3,
    log_every=2,
    eval_every=4,
    checkpoint_every=2,
    warmup_steps=0,
    decay_fraction=0.0,
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Weights & Biases write files only."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def train(rows: torch.Tensor, path: Path, *, kill_at: int | None = None, **more: Any) -> Trainer:
    """Train on rows; with `kill_at` leave the run after that step, as a kill does."""
    config = replace(RUN, checkpoint_dir=str(path), **more)
    trainer = Trainer(SAE, config, rows, heldout=rows[:200], show_progress=False)
    if kill_at is None:
        trainer.train()
        return trainer
    with contextlib.suppress(KeyboardInterrupt), trainer:
        while trainer.step < kill_at:
            trainer.advance()
        raise KeyboardInterrupt
    return trainer


def wandb_records(directory: Path) -> list[Any]:
    """Return the records in the files that W&B has written for a run, in their order.

    Its service writes them beside this process, and is waited for.
    """
    deadline = time.monotonic() + PATIENCE
    found: list[Any] = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        records = read_records(path)
        while not (records and records[-1].WhichOneof("record_type") == "exit"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
            records = read_records(path)
        found += records
    return found


def read_records(path: Path) -> list[Any]:
    """Return the records in a file of W&B."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for data in leveldb_log(path.read_bytes()):
        records.append(Record())
        records[-1].ParseFromString(data)
    return records


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log as LevelDB writes it, in blocks, behind a head of 7 bytes."""
    block, place, record = 32_768, 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # the rest of a block holds no head of a part
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_rows(directory: Path) -> list[dict[str, Any]]:
    """Return the rows that W&B has of a run."""
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in wandb_records(directory)
        if r.WhichOneof("record_type") == "history"
    ]


def wandb_runs(directory: Path) -> list[Any]:
    """Return the heads of the runs that W&B has."""
    records = wandb_records(directory)
    return [record.run for record in records if record.WhichOneof("record_type") == "run"]


def scalars(directory: Path) -> Any:
    """Return what TensorBoard shows of a run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"), {"histograms": 0, "scalars": 0})
    events.Reload()
    return events


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_after_a_kill_and_a_resume_wandb_has_each_step_once(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    names = {"wandb_entity": "team", "wandb_name": "mine", "wandb_tags": ("a", "b")}
    settings = {"wandb_project": "tests", "wandb_group": "all", **names}
    train(activations, tmp_path, kill_at=7, checkpoint_every=4, **settings)
    assert [row["step"] for row in wandb_rows(tmp_path)] == [2, 4, 6]
    train(activations, tmp_path, resume_from="latest", checkpoint_every=4, **settings)
    rows = wandb_rows(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if VALUES in row] == [4, 8]
    assert sum(rows[1][VALUES]) > 0
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in logged] == [pytest.approx(row["loss"]) for row in rows]
    first, second = wandb_runs(tmp_path)[0], wandb_runs(tmp_path)[-1]
    assert first.run_id == second.run_id
    told = (first.project, first.entity, first.display_name, first.run_group)
    assert told == ("tests", "team", "mine", "all")
    assert sorted(first.tags) == ["a", "b"]


@pytest.mark.usefixtures("offline")
def test_a_branch_of_a_run_is_another_run_on_wandb(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    train(activations, tmp_path / "one", max_steps=4, wandb_project="tests")
    place = str(tmp_path / "one" / "checkpoints" / "step-00000004")
    train(activations, tmp_path / "two", resume_from=place, wandb_project="tests")
    one, two = wandb_runs(tmp_path / "one")[0], wandb_runs(tmp_path / "two")[0]
    assert one.run_id != two.run_id
    assert (one.display_name, two.display_name) == ("one", "two")
    assert [row["step"] for row in wandb_rows(tmp_path / "two")] == [6, 8]


@pytest.mark.usefixtures("offline")
def test_the_trainings_of_a_sweep_are_told_apart_on_wandb(shard_dir: Path, tmp_path: Path) -> None:
    config = replace(
        *(RUN,),
        shard_dir=str(shard_dir),
        checkpoint_dir=str(tmp_path / "sizes"),
        max_steps=2,
        logger=("wandb",),
    )
    (tmp_path / "sweep.json").write_text(json.dumps({"k": [1, 2]}))
    configs = read_sweep(tmp_path / "sweep.json", RunConfig(sae=replace(SAE, k=None), train=config))
    Sweep(configs, show_progress=False).train()
    runs = [wandb_runs(tmp_path / "sizes" / name)[0] for name in ("k_1", "k_2")]
    assert [(run.display_name, run.run_group) for run in runs] == [
        ("k_1", "sizes"),
        ("k_2", "sizes"),
    ]
    assert {run.project for run in runs} == {"sae_fast"}


def test_after_a_kill_and_a_resume_tensorboard_has_each_step_once(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    settings = {"logger": ("tensorboard",), "checkpoint_every": 4}
    train(activations, tmp_path, kill_at=7, **settings)
    assert [event.step for event in scalars(tmp_path).Scalars("loss")] == [2, 4, 6]
    train(activations, tmp_path, resume_from="latest", **settings)
    events = scalars(tmp_path)
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Histograms(DENSITIES)] == [4, 8]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = [event.value for event in events.Scalars("heldout_fvu")]
    assert values == [pytest.approx(row["heldout_fvu"]) for row in rows if "heldout_fvu" in row]


@pytest.mark.usefixtures("offline")
def test_several_loggers_get_the_rows(activations: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(activations, tmp_path, logger=("wandb", "tensorboard"), max_steps=4)
    assert [row["step"] for row in wandb_rows(tmp_path)] == [2, 4]
    assert [event.step for event in scalars(tmp_path).Scalars("loss")] == [2, 4]


def test_a_quiet_training_lets_wandb_print_no_history(
    activations: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    train(activations, tmp_path, logger=("wandb",), max_steps=2)
    assert [row["step"] for row in wandb_rows(tmp_path)] == [2]
    assert "history" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("offline")
def test_wandb_that_does_not_start_is_one_line_before_any_step(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    words = r"^wandb_project = 'a/b': Weights & Biases does not start .*Invalid project name"
    with pytest.raises(ValueError, match=words) as caught:
        train(activations, tmp_path / "run", wandb_project="a/b")
    assert "\n" not in str(caught.value)
    assert "WANDB_MODE=offline keeps the log in" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_named_with_what_installs_it(
    activations: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    words = rf"logger {name} needs {name}: install it \(pip install 'sae_fast\[{name}\]'\)"
    with pytest.raises(ValueError, match=words):
        train(activations, tmp_path, logger=(name,))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ()),
        ({"wandb_project": "p"}, ("wandb",)),
        ({"wandb_project": "p", "no_wandb": True}, ()),
        ({"wandb_project": "p", "logger": ("none",)}, ()),
        ({"wandb_project": "p", "logger": ("tensorboard",)}, ("tensorboard",)),
        ({"logger": ("tensorboard", "wandb")}, ("wandb", "tensorboard")),
        ({"logger": ("wandb",), "no_wandb": True}, ()),
    ],
)
def test_loggers_follow_from_the_settings(
    settings: dict[str, Any], expected: tuple[str, ...]
) -> None:
    assert TrainConfig(**settings).loggers == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logger": ("none", "wandb")}, "logger none stands alone, got none wandb"),
        ({"wandb_group": "g"}, "wandb_group = 'g' needs logger wandb, or wandb_project"),
        ({"wandb_tags": ("g",), "logger": ("tensorboard",)}, "needs logger wandb"),
        ({"logger": ("mlflow",)}, "logger must be a list of values, each one of 'wandb', 'tens"),
    ],
)
def test_loggers_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


def test_tensorboard_needs_a_directory(activations: torch.Tensor) -> None:
    trainer = Trainer(SAE, replace(RUN, logger=("tensorboard",)), activations, show_progress=False)
    with pytest.raises(ValueError, match="logger tensorboard needs checkpoint_dir"):
        trainer.train()


class Failing:
    """A logger that fails at its second row."""

    def __init__(self) -> None:
        self.rows = 0

    def write(self, row: Any, densities: Any) -> None:
        self.rows += 1
        if self.rows == 2:
            raise RuntimeError("the service\nhas died")

    def finish(self, summary: Any, *, failed: bool) -> None:
        raise AssertionError


def test_a_logger_that_fails_is_told_once_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing()
    loggers = Loggers({"a service": failing})
    for step in range(4):
        loggers.write({"step": step}, None)
    loggers.finish({}, failed=False)
    assert failing.rows == 2
    told = [record.message for record in caplog.records]
    assert told == ["a service fails and gets no more rows: the service has died"]


def test_densities_leave_silent_latents_out() -> None:
    rates = torch.tensor([0.0, 1.0, 0.01, 0.0], dtype=torch.float64)
    assert log_densities(rates).tolist() == [0.0, -2.0]
