"""The directory of the command: one training at a time, unchanged after a refusal."""

import os
from pathlib import Path

import pytest
from train_runs import Run, assert_same, metrics, refused

from sae_fast.directory_lock import FileLock
from sae_fast.training.run_directory import LOCK


@pytest.mark.slow
def test_a_directory_in_use_is_refused(run_small: Run, shards: Path) -> None:
    assert run_small("--shard-dir", shards, "--checkpoint-dir", "run")[0] == 0
    lock = FileLock(Path("run") / LOCK)
    lock.take()
    line = refused(run_small("--checkpoint-dir", "run", "--resume-from", "latest"), "run is in use")
    assert f"(process {os.getpid()} on " in line
    refused(run_small("--shard-dir", shards, "--checkpoint-dir", "run"), "run is in use")
    Path("sweep.json").write_text('{"seed": [1]}')
    sweep = ("--shard-dir", shards, "--checkpoint-dir", "run", "--sweep", "sweep.json")
    refused(run_small(*sweep), "run is in use")
    lock.release()
    assert run_small("--checkpoint-dir", "run", "--resume-from", "latest")[0] == 0


@pytest.mark.parametrize("flags", [("--k", "40"), ("--sweep", "sweep.json")])
def test_a_refused_start_leaves_no_directory(
    run_small: Run, shards: Path, flags: tuple[str, ...]
) -> None:
    Path("sweep.json").write_text('{"k": [1, 40]}')
    refused(run_small("--shard-dir", shards, *flags), "k must be at most")
    assert not Path("runs").exists()


def test_several_processes_are_refused(
    run_small: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refused(run_small("--shard-dir", shards), "WORLD_SIZE = 2", "--mesh data=2", "without torchrun")
    monkeypatch.setenv("RANK", "1")
    assert run_small("--shard-dir", shards)[::2] == (2, "")  # rank 0 says it for all
    assert not Path("runs").exists()


def test_a_run_without_links_goes_on_to_the_same_bits(
    run_small: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    more = ("--shard-dir", shards, "--warmup-steps", "0", "--decay-fraction", "0")
    assert run_small(*more, "--checkpoint-dir", "straight")[0] == 0
    monkeypatch.setattr(os, "symlink", refuse)
    code, _, err = run_small(*more, "--checkpoint-dir", "run", "--max-steps", "4")
    assert code == 0
    assert err.count("makes no symbolic links") == 1
    again = ("--checkpoint-dir", "run", "--resume-from", "latest", "--max-steps", "6")
    assert run_small(*again)[0] == 0
    assert_same("straight", "run")
    assert metrics("straight")[-1] == metrics("run")[-1]
