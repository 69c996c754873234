"""`python -m sae_fast.train --sweep FILE`: its output, its files, and refusals."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import warm_python
from train_runs import PATIENCE

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.train import main

FLAGS = (
    *("--shard-dir", "shards", "--checkpoint-dir", "runs", "--d-sae", "32", "--batch-size", "32"),
    *("--lr", "1e-2", "--log-every", "2", "--eval-every", "4", "--checkpoint-every", "2"),
    *("--num-threads", "1"),
)
pytestmark = pytest.mark.usefixtures("shards")


def _write(content: Any) -> None:
    Path("sweep.json").write_text(json.dumps(content))


def test_all_combinations_are_trained_and_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    _write({"k": [1, 2], "seed": [0, 1]})
    assert main([*FLAGS, "--sweep", "sweep.json", "--max-steps", "6"]) == 0
    out = capsys.readouterr().out
    runs = json.loads(Path("runs/sweep.json").read_text())["runs"]
    assert list(runs) == ["k_1-seed_0", "k_1-seed_1", "k_2-seed_0", "k_2-seed_1"]
    for name, summary in runs.items():
        assert f"{name}: training topk: d_in 8, d_sae 32, k {name[2]}; 600 rows, 6 steps" in out
        assert f"{name}: trained 6 steps, 192 tokens" in out
        assert summary["steps"] == 6
        history = json.loads(Path("runs", name, "training_history.json").read_text())
        assert history["summary"]["final_heldout_fvu"] == summary["final_heldout_fvu"]
        assert SparseAutoencoder.from_pretrained(summary["checkpoint"]).config.k == int(name[2])
    assert out.splitlines()[-1] == "sweep      runs/sweep.json"


def test_a_sweep_killed_before_its_last_link_names_the_last_checkpoint() -> None:
    _write({"k": [1, 2]})
    flags = [*FLAGS, "--sweep", "sweep.json", "--max-steps", "6"]
    assert main(flags) == 0
    latest = Path("runs/k_2/checkpoints/latest")
    latest.unlink()
    latest.symlink_to("step-00000004")
    assert main([*flags, "--resume-from", "latest"]) == 0
    assert os.readlink(latest) == "step-00000006"


@pytest.mark.slow
def test_every_run_has_its_own_wandb_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    _write({"k": [1, 2]})
    flags = ("--sweep", "sweep.json", "--max-steps", "4", "--wandb-project", "p")
    assert main([*FLAGS, *flags]) == 0
    for name in ("k_1", "k_2"):
        assert len(list(Path("runs", name, "wandb").glob("offline-run-*/*.wandb"))) == 1


@pytest.mark.slow
def test_a_sweep_stopped_by_a_signal_goes_on() -> None:
    _write({"k": [1, 2]})
    command = ["-m", "sae_fast.train", *FLAGS, "--sweep", "sweep.json"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    deadline = time.monotonic() + PATIENCE
    with warm_python.Process(
        [*command, "--max-steps", "1000000"], env={**os.environ, "PYTHONPATH": path}
    ) as process:
        try:
            while not list(Path("runs/k_2/checkpoints").glob("step-*[2-9]")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 143
        finally:
            process.kill()
    newest = [Path(f"runs/k_{k}/checkpoints/latest").resolve().name for k in (1, 2)]
    assert newest[0] == newest[1]
    steps = int(newest[0].removeprefix("step-")) + 4
    resumed = [*FLAGS, "--sweep", "sweep.json", "--resume-from", "latest"]
    assert main([*resumed, "--max-steps", str(steps)]) == 0
    runs = json.loads(Path("runs/sweep.json").read_text())["runs"]
    assert [summary["steps"] for summary in runs.values()] == [steps, steps]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"k": [1, 1]}, "error: sweep.json: two trainings have the name 'k_1'"),
        ({"k": [1, 64]}, "error: sweep.json: k_64: k must be at most d_sae = 32, got 64"),
        ({"kk": [1]}, "error: sweep.json: kk_1: unknown key 'kk' (did you mean 'k'?)"),
        ({"max_steps": [1]}, "error: sweep.json: max_steps_1: max_steps is the same for all"),
    ],
)
def test_a_bad_sweep_is_one_line(
    content: Any, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(content)
    assert main([*FLAGS, "--sweep", "sweep.json", "--max-steps", "4"]) == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert said.startswith(line)


def test_a_directory_that_holds_another_sweep_is_not_written_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _write({"k": [1, 2]})
    command = [*FLAGS, "--sweep", "sweep.json", "--max-steps", "4"]
    assert main(command) == 0
    assert main(command) == 2
    assert "error: k_1: runs/k_1 already holds a run" in capsys.readouterr().err


def test_a_sweep_of_architectures_goes_on_where_one_training_alone_has_saved() -> None:
    _write([{"name": "topk", "k": 2}, {"name": "relu", "arch": "relu", "l1_penalty_coeff": 0.1}])
    command = [*FLAGS, "--sweep", "sweep.json", "--max-steps", "4"]
    assert main(command) == 0
    shutil.rmtree("runs/relu")
    for step in (2, 4):
        shutil.rmtree(f"runs/topk/checkpoints/step-{step:08d}")
    assert main([*command, "--resume-from", "latest"]) == 0
    runs = json.loads(Path("runs/sweep.json").read_text())["runs"]
    assert [summary["steps"] for summary in runs.values()] == [4, 4]
