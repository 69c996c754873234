"""File systems with slow renames, without space, and read-only: the run loses nothing it had."""

import errno
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import files_up_to

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.directory_lock import FileLock
from sae_fast.training.checkpoint import CheckpointError
from sae_fast.training.run_directory import LOCK
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=32, k=2)
RUN = TrainConfig(
    batch_size=64,
    max_steps=8,
    learning_rate=3e-3,
    log_every=2,
    checkpoint_every=2,
    warmup_steps=0,
    decay_fraction=0.0,
)


def trainer(rows: torch.Tensor, path: Path, **more: Any) -> Trainer:
    return Trainer(SAE, replace(RUN, checkpoint_dir=str(path), **more), rows, show_progress=False)


def rename_by_copies(source: Path, target: Path, *, copies: int | None = None) -> None:
    """Rename a directory file by file, as mounts of object stores do.

    With `copies` the process is killed after this number of files.
    """
    target.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        if number == copies:
            os.kill(os.getpid(), signal.SIGKILL)
        shutil.copy(path, target / path.name)
    shutil.rmtree(source)


@pytest.mark.slow
@pytest.mark.parametrize("copies", [0, 1, 3])
def test_a_kill_in_the_middle_of_a_slow_rename_loses_that_checkpoint_only(
    activations: torch.Tensor, tmp_path: Path, copies: int
) -> None:
    straight = trainer(activations, tmp_path / "straight").train()
    child = os.fork()
    if child == 0:
        rename = os.rename

        def slow(source: Path, target: Path) -> None:
            if str(target).endswith("step-00000006"):
                rename_by_copies(Path(source), Path(target), copies=copies)
            rename(source, target)

        os.rename = slow  # type: ignore[assignment]
        torch.set_num_threads(1)
        trainer(activations, tmp_path / "run").train()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    resumed = trainer(activations, tmp_path / "run", resume_from="latest")
    assert resumed.step == 4
    assert torch.equal(resumed.train().W_dec, straight.W_dec)
    whole = sorted(path.name for path in (tmp_path / "straight" / "checkpoints").iterdir())
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == whole


def test_renames_by_copies_are_enough_for_a_run(
    activations: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = trainer(activations, tmp_path / "straight").train()
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", lambda a, b: rename_by_copies(Path(a), Path(b)))
        trainer(activations, tmp_path / "run", max_steps=4).train()
        resumed = trainer(activations, tmp_path / "run", resume_from="latest").train()
    assert torch.equal(resumed.W_dec, straight.W_dec)


@pytest.mark.parametrize(
    ("room", "message"),
    [(1_000, "metrics.jsonl"), (4_000, r"cannot write the checkpoint .*step-00000004 is the last")],
)
def test_a_disk_that_fills_up_keeps_the_checkpoints_before(
    activations: torch.Tensor, tmp_path: Path, room: int, message: str
) -> None:
    straight = trainer(activations, tmp_path / "straight").train()
    run = trainer(activations, tmp_path / "run")
    with pytest.raises((CheckpointError, OSError), match=message):
        advance_until_full(run, room)
    resumed = trainer(activations, tmp_path / "run", resume_from="latest")
    assert resumed.step == 4
    assert torch.equal(resumed.train().W_dec, straight.W_dec)


def advance_until_full(run: Trainer, room: int) -> None:
    """Make the steps of a run; after the fourth no file can be longer than `room` bytes."""
    with run:
        while run.step < 4:
            run.advance()
        with files_up_to(room):
            while run.step < 8:
                run.advance()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    activations: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    mkdir = Path.mkdir

    def refuse(self: Path, *options: Any, **more: Any) -> None:
        if "run" in self.parts:
            raise OSError(number, os.strerror(number))
        mkdir(self, *options, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = f"cannot write to the checkpoint directory .*run.*: {os.strerror(number)}"
    with pytest.raises(CheckpointError, match=message):
        trainer(activations, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_became_read_only_is_refused_and_left_as_it_is(
    activations: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(activations, tmp_path / "run", max_steps=4).train()
    names = sorted(str(path) for path in tmp_path.rglob("*"))
    opened = os.open

    def refuse(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY) and str(tmp_path) in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *more, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            trainer(activations, tmp_path / "run", resume_from="latest")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == names


def test_a_killed_run_leaves_no_lock_and_a_living_one_does(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    ready, end = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        with trainer(activations, tmp_path / "run") as run:
            run.advance()
            os.write(ready[1], b"x")
            os.close(end[1])
            os.read(end[0], 1)  # until it is killed
        os._exit(1)
    os.read(ready[0], 1)
    message = rf"run is in use: another run writes to it \(process {child} on .*\); wait for it"
    with pytest.raises(CheckpointError, match=message):
        trainer(activations, tmp_path / "run", resume_from="latest")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for descriptor in (*ready, *end):
        os.close(descriptor)
    assert (tmp_path / "run" / LOCK).exists()  # a file without a lock
    FileLock(tmp_path / "run" / LOCK).take()
    trainer(activations, tmp_path / "run", resume_from="latest").train()
