"""The script for SLURM in docs/guide/cluster.md runs, requeues what is left, and goes on."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm_python

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide" / "cluster.md"
if not PAGE.exists():
    pytest.skip("no checkout: the documents are not installed", allow_module_level=True)
PATIENCE = 240  # seconds; only a blocked machine takes longer


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the script, with a small training, and a scontrol that notes how it is called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "scontrol").write_text('#!/bin/bash\necho "$@" >> requeued\n')
    (programs / "python").write_text(f'#!/bin/bash\nexec {warm_python.shell_command()} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for name, value in {"ARRAY_TASK_ID": "1", "ARRAY_JOB_ID": "70", "JOB_ID": "71"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (text,) = re.findall(r"```text\n(#!/bin/bash\n.*?)```", PAGE.read_text(), flags=re.S)
    small = "--d-sae 64 --batch-size 64 --num-threads 1 --eval-every 0 --log-every 1000"
    path = tmp_path / "train.sh"
    path.write_text(text.replace("--max-steps 40", f"$STEPS {small}"))
    return path


def run(script: Path, monkeypatch: pytest.MonkeyPatch, steps: str, hours: str) -> int:
    monkeypatch.setenv("STEPS", steps)
    text = script.read_text().replace("--max-hours 3.8", f"--max-hours {hours}")
    changed = script.with_name("changed.sh")
    changed.write_text(text)
    return subprocess.run(["bash", str(changed)], timeout=PATIENCE).returncode


@pytest.mark.slow
def test_a_task_is_requeued_until_it_is_done(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(script, monkeypatch, "--max-steps 3", hours="1e-9") == 0
    assert Path("requeued").read_text() == "requeue 70_1\n"
    assert Path("runs/k32/checkpoints/latest").resolve().name == "step-00000001"
    assert run(script, monkeypatch, "--max-steps 3", hours="3.8") == 0
    assert Path("requeued").read_text() == "requeue 70_1\n"
    assert Path("runs/k32/checkpoints/latest").resolve().name == "step-00000003"
    assert "trained 3 steps" in Path("runs/k32.log").read_text()


@pytest.mark.slow
def test_the_signal_before_the_limit_saves_and_requeues(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPS", "--max-steps 10000000 --max-epochs 10000000 --checkpoint-every 1")
    deadline = time.monotonic() + PATIENCE
    with subprocess.Popen(["bash", str(script)]) as process:
        try:
            while not list(Path("runs/k32/checkpoints").glob("step-*[1-9]")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR2)
            assert process.wait(PATIENCE) == 0
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(PATIENCE)
    assert Path("requeued").read_text() == "requeue 70_1\n"
    assert "stopped by SIGUSR2 after" in Path("runs/k32.log").read_text()
