"""A capture that is killed at any place can be resumed, and ends with the files of a whole one."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm_python
from captured import arguments, assert_same_shards, capture

from sae_fast.capture import main


class Killed(BaseException):
    """Ends a capture like a kill."""


def kill_at_rename(monkeypatch, number, *, before):
    """End the capture at its nth rename, of a shard, the recipe, progress or a manifest."""
    rename = Path.replace
    made = []

    def counting(path, target):
        made.append(target)
        if len(made) == number and before:
            raise Killed
        result = rename(path, target)
        if len(made) == number:
            raise Killed
        return result

    monkeypatch.setattr(Path, "replace", counting)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("before", "pack"), [(True, "--pack"), (False, "--no-pack")])
def test_a_capture_that_dies_at_any_rename_goes_on_to_the_same_files(
    inputs, tmp_path, monkeypatch, before, pack
):
    whole = tmp_path / "whole"
    assert capture(inputs, whole, pack, max_tokens=500) == 0
    number, died = 1, True
    while died:
        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patched:
            made = kill_at_rename(patched, number, before=before)
            try:
                capture(inputs, out, pack, max_tokens=500)
                died = False
            except Killed:
                pass
        # A kill leaves this file, an exception does not.
        for hook in ("residual.0", "residual.2"):
            if (out / hook).exists():
                (out / hook / ".shard_00001.h5.123.tmp").write_bytes(b"half a shard")
        assert capture(inputs, out, pack, max_tokens=500) == 0
        assert_same_shards(out, whole)
        if died:
            assert not list(out.rglob("*.tmp"))
        number += 1
    # Recipe, held-out shards of two hooks, progress, twice shards and progress, the manifests.
    assert len(made) == 1 + 2 + 1 + 2 * 3 + 1 + 2


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_files(inputs, whole, tmp_path):
    out = tmp_path / "out"
    process = warm_python.Process(
        ["-c", SLOWLY, *arguments(inputs, out)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (shards := made_shards(out)) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < shards < 4
    assert capture(inputs, out) == 0
    assert_same_shards(out, whole)


# The command with a slow model, so that it can be killed while it runs.
SLOWLY = """
import sys, time
from sae_fast.activations.capture.language_model import HookedModel
from sae_fast.capture import main
run = HookedModel.activations
HookedModel.activations = lambda *given, **named: (time.sleep(0.1), run(*given, **named))[1]
sys.exit(main(sys.argv[1:]))
"""


def made_shards(out):
    """Return the number of shards in the progress of a capture."""
    path = out / "progress_00.json"
    if not path.exists():
        return 0
    progress = json.loads(path.read_text())
    return progress["shards"] if progress["part"] == "train" else 0


@pytest.mark.slow
def test_a_signal_ends_behind_a_whole_shard_and_says_so(
    inputs, whole, tmp_path, monkeypatch, capsys
):
    from sae_fast.activations.capture import runner

    stored, calls = runner.bring_to_host, []

    def interrupting(*given):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return stored(*given)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "bring_to_host", interrupting)
        assert capture(inputs, tmp_path / "out") == 128 + signal.SIGTERM
    assert (
        "stopped: the same command continues after 800 and 100 held-out" in capsys.readouterr().out
    )
    assert capture(inputs, tmp_path / "out") == 0
    assert "continuing after 800 tokens in 2 shards" in capsys.readouterr().out
    assert_same_shards(tmp_path / "out", whole)


def test_a_complete_capture_is_left_as_it_is(inputs, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert capture(inputs, whole) == 0
    assert "is complete: 1,500 tokens, nothing to do" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {p: t for p, t in after.items() if p.suffix != ".lock"} == {
        p: t for p, t in before.items() if p.suffix != ".lock"
    }


def test_the_same_capture_from_another_place_goes_on(inputs, whole, monkeypatch, capsys):
    """Models and texts are identified by their content, so a relative path is accepted."""
    folder = Path(inputs[1]).parent
    monkeypatch.chdir(folder)
    assert main(arguments(["llama", "texts.jsonl"], whole)) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_same_hook_points_in_another_order_are_the_same_capture(inputs, whole, capsys):
    assert capture(inputs, whole, "--layers", "2", "0") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_shard_that_is_gone_is_named(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    assert capture(inputs, out) == 0
    (out / "residual.0" / "shard_00001.h5").unlink()
    assert capture(inputs, out) == 2
    error = capsys.readouterr().err
    assert "residual.0/shard_00001.h5: missing, but progress_00.json has it" in error
