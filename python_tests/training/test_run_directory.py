"""A run locks its directory, and a refused start leaves nothing in it."""

import contextlib
import errno
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.training.checkpoint import CheckpointError, CheckpointStore, find_checkpoint
from sae_fast.training.run_directory import claimed_run_directory, held
from sae_fast.training.sweep import Sweep, read_sweep
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=32, k=2)
RUN = TrainConfig(
    batch_size=64,
    max_steps=8,
    learning_rate=3e-3,
    eval_every=2,
    checkpoint_every=2,
    warmup_steps=0,
    decay_fraction=0.0,
)


def _trainer(rows: torch.Tensor, path: Path, **more: Any) -> Trainer:
    heldout = more.pop("heldout", rows[:200])
    run = replace(RUN, checkpoint_dir=str(path), **more)
    return Trainer(SAE, run, rows, heldout=heldout, show_progress=False)


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def _names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_second_run_into_a_directory_is_refused(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    first = _trainer(activations, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run is in use: .* \(process \d+ on "):
        _trainer(activations, tmp_path / "run")
    first.train()
    assert not (tmp_path / "run" / ".run.lock").exists()


def test_a_second_resume_of_a_run_is_refused(activations: torch.Tensor, tmp_path: Path) -> None:
    _trainer(activations, tmp_path / "run", max_steps=4).train()
    first = _trainer(activations, tmp_path / "run", resume_from="latest")
    before = _names(tmp_path)
    with pytest.raises(CheckpointError, match="run is in use"):
        _trainer(activations, tmp_path / "run", resume_from="latest")
    assert _names(tmp_path) == before
    first.train()
    assert first.step == 8


def test_a_directory_of_several_runs_has_one_command(tmp_path: Path) -> None:
    with (
        held(tmp_path / "sweep"),
        pytest.raises(CheckpointError, match="sweep is in use"),
        held(tmp_path / "sweep"),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_refused_start_leaves_nothing(
    activations: torch.Tensor, tmp_path: Path, exists: bool
) -> None:
    run = tmp_path / "deep" / "run"
    if exists:
        run.mkdir(parents=True)
    with pytest.raises(ValueError, match="start_from"):
        _trainer(activations, run, start_from=str(tmp_path / "nowhere"))
    assert _names(tmp_path) == (["deep", "deep/run"] if exists else [])
    _trainer(activations, run).train()


def test_a_refused_start_on_shards_leaves_nothing(shard_dir: Path, tmp_path: Path) -> None:
    run = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="start_from"):
        Trainer(SAE, replace(run, start_from=str(tmp_path / "nowhere")), show_progress=False)
    assert _names(tmp_path) == []


def test_a_failed_first_checkpoint_leaves_nothing(
    activations: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(activations, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", _refuse)
        with pytest.raises(CheckpointError, match="Operation not supported"):
            trainer.train()
    assert list(tmp_path.iterdir()) == []


def test_names_claimed_at_once_are_different(tmp_path: Path) -> None:
    barrier, names = threading.Barrier(16), []

    def claim() -> None:
        barrier.wait()
        with claimed_run_directory(SAE, tmp_path / "runs") as path:
            names.append(path.name)
            barrier.wait()

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == sorted(f"topk-k2-{number}" for number in range(1, 17))
    assert list(tmp_path.glob("runs/*")) == []


def test_leftovers_of_a_kill_are_removed(activations: torch.Tensor, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "average_decay": 0.5}
    _trainer(activations, tmp_path, **settings).train()
    whole = _names(tmp_path)
    for name in (".tmpAb1", ".sae.safetensors.partial", ".sae.safetensors.1.tmp"):
        (tmp_path / "averaged" / name).touch()
    for name in (".history-1.json", ".config-1.json", ".training_history.json.1.tmp"):
        (tmp_path / name).touch()
    for name in (".latest-1", ".best-1"):
        (tmp_path / "checkpoints" / name).symlink_to("step-00000002")
    (tmp_path / "checkpoints" / ".probe-1").touch()
    (tmp_path / "checkpoints" / ".step-00000004-1").mkdir()
    (tmp_path / ".run.lock").touch()
    _trainer(activations, tmp_path, **settings, resume_from="latest").train()
    assert _names(tmp_path) == whole


def test_without_links_latest_and_best_are_text(
    activations: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(os, "symlink", _refuse)
    straight = _trainer(activations, tmp_path / "straight")
    straight.train()
    said = [record.message for record in caplog.records if "symbolic links" in record.message]
    assert len(said) == 1
    store = CheckpointStore(tmp_path / "straight" / "checkpoints", keep=1)
    assert (store.directory / "latest").read_text() == "step-00000008\n"
    assert store.named("best") == store.path_of(straight.summary["best_step"])
    assert SparseAutoencoder.from_pretrained(store.directory / "latest").config.k == 2
    _trainer(activations, tmp_path / "run", max_steps=4).train()
    assert find_checkpoint(str(tmp_path / "run" / "checkpoints" / "best"), None) is not None
    resumed = _trainer(activations, tmp_path / "run", resume_from="latest")
    assert resumed.step == 4
    resumed.train()
    assert torch.equal(straight.sae.W_dec, resumed.sae.W_dec)


def test_a_copy_with_links_followed_goes_on(activations: torch.Tensor, tmp_path: Path) -> None:
    straight = _trainer(activations, tmp_path / "straight")
    straight.train()
    _trainer(activations, tmp_path / "run", max_steps=4).train()
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=False)
    assert not (tmp_path / "copy" / "checkpoints" / "latest").is_symlink()
    resumed = _trainer(activations, tmp_path / "copy", resume_from="latest")
    assert (tmp_path / "copy" / "checkpoints" / "latest").is_symlink()
    resumed.train()
    assert torch.equal(straight.sae.W_dec, resumed.sae.W_dec)
    assert _names(tmp_path / "copy") == _names(tmp_path / "straight")


def test_a_text_that_names_no_checkpoint_is_not_followed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.path_of(3).mkdir()
    for text in ("step-00000004", "../step-00000003", "\0", "", "step-00000003" * 100):
        (tmp_path / "best").write_text(text)
        assert store.named("best") is None
    (tmp_path / "best").write_text("step-00000003")
    assert store.named("best") == store.path_of(3)


def test_a_resume_mends_the_links_that_a_kill_left_behind(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    straight = _trainer(activations, tmp_path / "straight", keep_checkpoints=1)
    straight.train()
    shutil.copytree(tmp_path / "straight", tmp_path / "killed", symlinks=True)
    best = tmp_path / "killed" / "checkpoints" / "best"
    best.unlink()
    best.symlink_to("step-00000002")
    (best.parent / "step-00000002").mkdir(exist_ok=True)
    _trainer(activations, tmp_path / "killed", keep_checkpoints=1, resume_from="latest").train()
    assert _names(tmp_path / "killed") == _names(tmp_path / "straight")
    assert os.readlink(best) == f"step-{straight.summary['best_step']:08d}"


def test_rows_of_a_run_that_goes_back_are_not_lost(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    """A resume from an earlier step makes that one the latest before it cuts the metrics."""
    _trainer(activations, tmp_path).train()
    back = _trainer(activations, tmp_path, resume_from=str(tmp_path / "checkpoints/step-00000004"))
    back.close()
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step-00000004"
    _trainer(activations, tmp_path, resume_from="latest").train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]


# ---- sweeps ------------------------------------------------------------------------------------


def _sweep(shard_dir: Path, path: Path, **more: Any) -> Sweep:
    train = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(path / "sweep"), **more)
    (path / "sweep.json").write_text(json.dumps({"k": [1, 2]}))
    base = RunConfig(sae=replace(SAE, k=None), train=train)
    return Sweep(read_sweep(path / "sweep.json", base), show_progress=False)


def test_a_sweep_killed_at_its_first_checkpoints_goes_on(shard_dir: Path, tmp_path: Path) -> None:
    straight = _sweep(shard_dir, tmp_path)
    straight.train()
    whole = _names(tmp_path)
    shutil.rmtree(tmp_path / "sweep")
    first, second = _sweep(shard_dir, tmp_path).trainers.values()
    with contextlib.suppress(KeyboardInterrupt), first:
        raise KeyboardInterrupt
    second.close()
    resumed = _sweep(shard_dir, tmp_path, resume_from="latest")
    resumed.train()
    assert _names(tmp_path) == whole
    for name, trainer in straight.trainers.items():
        assert torch.equal(trainer.sae.W_dec, resumed.trainers[name].sae.W_dec)


def test_trainings_of_a_sweep_keep_a_checkpoint_in_common(shard_dir: Path, tmp_path: Path) -> None:
    sweep = _sweep(shard_dir, tmp_path, keep_checkpoints=1)
    first, second = sweep.trainers.values()
    with contextlib.suppress(KeyboardInterrupt), first, second:
        for _ in range(4):
            first.advance(prune=False)
        raise KeyboardInterrupt  # as if killed before the second one has saved
    resumed = _sweep(shard_dir, tmp_path, keep_checkpoints=1, resume_from="latest")
    assert {trainer.step for trainer in resumed.trainers.values()} == {0}
    resumed.train()
    for trainer in resumed.trainers.values():
        assert trainer.checkpoints is not None
        assert set(trainer.checkpoints.steps()) == {trainer.summary["best_step"], 8}


def test_a_finished_run_that_is_resumed_names_its_checkpoint(
    activations: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run looks as after a kill between the last checkpoint and the results."""
    _trainer(activations, tmp_path).train()
    whole = json.loads((tmp_path / "training_history.json").read_text())["summary"]
    (tmp_path / "training_history.json").unlink()
    monkeypatch.chdir(tmp_path.parent)  # a path as it was given, not the real one
    _trainer(activations, Path(tmp_path.name), resume_from=str(tmp_path)).train()
    again = json.loads((tmp_path / "training_history.json").read_text())["summary"]
    assert again.keys() == whole.keys()
    assert again["checkpoint"] == f"{tmp_path.name}/checkpoints/step-00000008"


def test_a_refused_training_of_a_sweep_leaves_no_directory(shard_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep" / "k_2" / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(ValueError, match="k_2 already holds a run"):
        _sweep(shard_dir, tmp_path)
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["k_2"]
    assert _names(tmp_path / "sweep" / "k_2") == ["checkpoints", "checkpoints/step-00000003"]
