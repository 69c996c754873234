"""`python -m sae_fast.train` in a process of its own: signals, and a disk that is full."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from train_runs import PATIENCE, SMALL, refused


@contextlib.contextmanager
def _started(*arguments: object, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which does not outlive the test."""
    command = [sys.executable, "-m", "sae_fast.train", *SMALL, *map(str, arguments)]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    pipe = subprocess.PIPE
    settings |= {"stdout": pipe, "stderr": pipe, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def _finished(*arguments: object, **settings: Any) -> tuple[int, str, str]:
    with _started(*arguments, **settings) as process:
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_its_code(
    shards: Path, number: signal.Signals, code: int
) -> None:
    deadline = time.monotonic() + PATIENCE
    arguments = ("--shard-dir", shards, "--checkpoint-dir", "run", "--max-steps", 10**7)
    with _started(*arguments) as process:
        while not list(Path("run/checkpoints").glob("step-*[2-9]")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    newest = Path("run/checkpoints/latest").resolve()
    steps = int(newest.name.removeprefix("step-"))
    assert f"stopped by {number.name} after {steps:,} steps" in out


def test_a_full_disk_while_checkpointing_leaves_the_previous_one(shards: Path) -> None:
    run = ("--shard-dir", shards, "--checkpoint-dir", "run")
    assert _finished(*run, "--max-steps", 2)[0] == 0
    size = max(path.stat().st_size for path in Path("run/checkpoints/latest/").iterdir())

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))

    resumed = (*run, "--resume-from", "latest", "--max-steps", 40)
    result = _finished(*resumed, preexec_fn=small_disk)
    line = refused(result, "step-0000000", "step-00000002 is the last")
    assert "File too large" in line
    assert _finished(*resumed)[0] == 0
