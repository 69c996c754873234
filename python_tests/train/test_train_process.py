"""`python -m sae_fast.train` in a process of its own: it ends by a signal."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from train_runs import PATIENCE, SMALL, Run, refused


@contextlib.contextmanager
def _started(*arguments: object, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """Start the command in a process of its own, which ends with the test."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_ends_with_its_code_and_no_other_process_has_the_run(
    run: Run, shards: Path, number: signal.Signals, code: int
) -> None:
    deadline = time.monotonic() + PATIENCE
    arguments = ("--shard-dir", shards, "--checkpoint-dir", "run", "--max-steps", 10**7)
    with _started(*arguments) as process:
        while not list(Path("run/checkpoints").glob("step-*[2-9]")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        again = run("--checkpoint-dir", "run", "--resume-from", "latest")
        refused(again, f"run is in use: another run writes to it (process {process.pid} on ")
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    newest = Path("run/checkpoints/latest").resolve()
    steps = int(newest.name.removeprefix("step-"))
    assert f"stopped by {number.name} after {steps:,} steps" in out
