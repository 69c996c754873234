"""Checkpoint directories survive kills, full disks and damage."""

import errno
import os
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch
import warm_python
from full_disk import files_up_to

from sae_fast.training import checkpoint as module
from sae_fast.training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    find_checkpoint,
    read_checkpoint,
    read_newest_intact,
)


def _save_model(directory: Path) -> None:
    (directory / "config.json").write_text("{}")
    (directory / "sae.safetensors").write_bytes(bytes(range(256)) * 16)


def _save(store: CheckpointStore, step: int, *, best: bool = False) -> Path:
    tensors = {"state": torch.full((64,), float(step)), "empty": torch.empty(0, 3)}
    return store.save({"step": step, "note": [step, "x"], **tensors}, _save_model, best=best)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    store.prepare()
    return store


def test_what_was_saved_is_read_back(store: CheckpointStore) -> None:
    read = read_checkpoint(_save(store, 7))
    assert read.step == 7
    assert read.state["note"] == [7, "x"]
    assert torch.equal(read.tensors["state"], torch.full((64,), 7.0))
    assert read.tensors["empty"].shape == (0, 3)


def test_only_the_newest_and_the_best_are_kept(store: CheckpointStore) -> None:
    for step in (0, 10, 20, 30, 40):
        _save(store, step, best=step == 10)
    assert store.steps() == [10, 30, 40]
    assert store.newest() == store.path_of(40)
    assert (store.directory / "best").resolve() == store.path_of(10).resolve()
    assert sorted(path.name for path in store.directory.iterdir() if path.name[0] == ".") == []


def test_a_step_saved_again_replaces_the_old_one(store: CheckpointStore) -> None:
    _save(store, 10)
    store.save({"step": 10, "note": "second"}, _save_model)
    assert read_checkpoint(store.path_of(10)).state["note"] == "second"


def test_steps_of_another_branch_are_not_pruned(store: CheckpointStore) -> None:
    for step in (10, 90, 20):  # 20 is written by a run resumed from 10
        _save(store, step)
    assert store.steps() == [10, 20, 90]
    assert store.newest() == store.path_of(20)


@pytest.mark.parametrize("name", ["sae.safetensors", "config.json", "trainer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_falls_back_and_is_named(
    store: CheckpointStore, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    _save(store, 10)
    victim = _save(store, 20) / name
    _damage(victim, damage)
    assert read_newest_intact(store.path_of(20)).step == 10
    assert str(victim) in caplog.text
    assert "the checkpoint before it" in caplog.text


def _damage(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
        return
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    path.write_bytes(bytes(content))


def test_every_damaged_byte_of_the_state_is_noticed(store: CheckpointStore) -> None:
    path = _save(store, 10) / "trainer.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        flipped = bytes([content[position] ^ 2])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        with pytest.raises(CheckpointError, match=r"trainer\.json is corrupted"):
            read_checkpoint(path.parent)
        path.write_bytes(content[:position])
        with pytest.raises(CheckpointError, match=r"trainer\.json is corrupted"):
            read_checkpoint(path.parent)


def test_no_intact_checkpoint_is_an_error_that_names_the_newest(store: CheckpointStore) -> None:
    for step in (10, 20):
        _damage(_save(store, step) / "config.json", "flip")
    with pytest.raises(CheckpointError, match=r"step-00000020.config\.json.*no intact"):
        read_newest_intact(store.path_of(20))


@pytest.mark.parametrize(
    "failing", ["save_model", "save_tensors", "_write_state", "_flush_directory"]
)
def test_a_full_disk_at_any_point_leaves_the_previous_one(
    store: CheckpointStore, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(store, 10, best=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing != "save_model":
        monkeypatch.setattr(module, failing, full)
    with pytest.raises(CheckpointError, match=r"No space left on device; .*step-00000010"):
        store.save({"step": 20}, full if failing == "save_model" else _save_model)
    assert store.newest() == store.path_of(10)
    assert read_checkpoint(store.path_of(10)).step == 10
    assert [path.name for path in store.directory.glob(".*")] == []


@pytest.mark.parametrize("failing", ["_write_state", "_point"])
def test_memory_that_runs_out_leaves_the_previous_one_and_nothing_else(
    store: CheckpointStore, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(store, 10, best=True)

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    if failing == "_point":  # fails within it, with the new name beside the old one
        monkeypatch.setattr(os, "replace", out_of_memory)
    else:
        monkeypatch.setattr(module, failing, out_of_memory)
    with pytest.raises(MemoryError):
        store.save({"step": 20}, _save_model)
    assert store.newest() == store.path_of(10)
    assert [path.name for path in store.directory.glob(".*")] == []


@pytest.mark.parametrize("limit", [0, 100, 4096, 5000, 70_000])
def test_a_write_that_fails_at_byte_n_leaves_the_previous_one(
    store: CheckpointStore, limit: int
) -> None:
    _save(store, 10)
    with (
        files_up_to(limit),
        pytest.raises(CheckpointError, match="step-00000010 is the last complete one"),
    ):
        store.save({"step": 20, "a": torch.zeros(30_000)}, _save_model)
    assert read_newest_intact(store.path_of(10)).step == 10


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to the checkpoint directory"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=1).prepare()


def test_find_checkpoint_understands_every_reference(store: CheckpointStore) -> None:
    run = store.directory.parent
    assert find_checkpoint("latest", run) is None
    _save(store, 10, best=True)
    last = _save(store, 20)
    assert find_checkpoint("latest", run) == last
    assert find_checkpoint("best", run) == store.path_of(10)
    for reference in (run, store.directory, last, store.directory / "latest"):
        assert find_checkpoint(str(reference), None) == last.resolve()
    assert find_checkpoint(str(store.directory / "best"), None) == store.path_of(10).resolve()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(str(run.parent / "elsewhere"), None)
    with pytest.raises(CheckpointError, match="needs --checkpoint-dir RUN"):
        find_checkpoint("latest", None)


def test_a_kill_at_any_moment_leaves_an_intact_newest_checkpoint(tmp_path: Path) -> None:
    writer = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from sae_fast.training.checkpoint import CheckpointStore
        store = CheckpointStore(Path(sys.argv[1]), keep=2)
        store.prepare()
        for step in range(10**6):
            tensors = {"a": torch.full((20_000,), float(step))}
            model = lambda path: (path / "sae.safetensors").write_bytes(bytes(50_000))
            store.save({"step": step, **tensors}, model, best=step % 3 == 0)
            print(step, flush=True)
        """
    )
    process = warm_python.Process(["-c", writer, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    written = 0
    for line in process.stdout:
        written = int(line)
        if written == 20:
            time.sleep(0.013)  # somewhere inside a later save
            process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    newest = CheckpointStore(tmp_path, keep=2).newest()
    assert newest is not None
    read = read_checkpoint(newest)
    assert read.step >= written
    assert torch.equal(read.tensors["a"], torch.full((20_000,), float(read.step)))
    store = CheckpointStore(tmp_path, keep=2)
    for step in store.steps():
        assert read_checkpoint(store.path_of(step)).step == step
