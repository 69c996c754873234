"""Signals and time limits: a checkpoint is written, the exit code says why, and the run goes on."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from train_runs import Run, assert_same, metrics, refused

from sae_fast.training.trainer import Trainer

SOON = "1e-9"  # hours or minutes, which have passed after any step
STEADY = ("--warmup-steps", "0", "--decay-fraction", "0")


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch, heeded_hangup: None) -> dict[int, signal.Signals]:
    """Return the signals that this process gets in a step, by the step, to be filled in."""
    due: dict[int, signal.Signals] = {}
    advance = Trainer.advance

    def interrupted(self: Trainer, **options: bool) -> dict[str, Any]:
        if self.step + 1 in due:
            signal.raise_signal(due.pop(self.step + 1))
        return advance(self, **options)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    return due


def steps_in(directory: str) -> list[str]:
    return sorted(path.name for path in Path(directory, "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 0),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGUSR2, 140),
    ],
)
def test_a_run_that_a_signal_stopped_goes_on_to_the_same_bits(
    run_small: Run,
    shards: Path,
    signalled: dict[int, signal.Signals],
    number: signal.Signals,
    code: int,
) -> None:
    where = ("--shard-dir", shards, *STEADY)
    assert run_small(*where, "--checkpoint-dir", "straight")[0] == 0
    signalled[3] = number
    ended, out, _ = run_small(*where, "--checkpoint-dir", "run", "--checkpoint-every", "100")
    assert ended == code
    assert f"stopped by {number.name} after 3 steps" in out
    assert steps_in("run")[-1] == "step-00000003"
    again = ("--checkpoint-dir", "run", "--resume-from", "latest")
    assert run_small(*again, "--checkpoint-every", "2")[0] == 0
    assert_same("straight", "run")
    assert metrics("straight") == metrics("run")


@pytest.mark.parametrize("sweep", [False, True])
def test_sigusr1_writes_a_checkpoint_and_the_training_goes_on(
    run_small: Run, shards: Path, signalled: dict[int, signal.Signals], sweep: bool
) -> None:
    Path("sweep.json").write_text('{"seed": [0, 1]}')
    more = ("--sweep", "sweep.json") if sweep else ()
    signalled[3] = signal.SIGUSR1
    sparse = ("--checkpoint-every", "100", "--eval-every", "100")
    where = ("--shard-dir", shards, "--checkpoint-dir", "run", *sparse, *more)
    assert run_small(*where, *STEADY)[0] == 0
    for directory in ("run/seed_0", "run/seed_1") if sweep else ("run",):
        # The signal comes within a step, so the checkpoint is written after the next one.
        assert steps_in(directory)[:2] == ["step-00000000", "step-00000004"]


@pytest.mark.slow
def test_max_hours_ends_with_a_checkpoint_and_a_code_of_its_own(
    run_small: Run, shards: Path
) -> None:
    where = ("--shard-dir", shards, *STEADY)
    assert run_small(*where, "--checkpoint-dir", "straight")[0] == 0
    code, out, _ = run_small(*where, "--checkpoint-dir", "run", "--max-hours", SOON)
    assert code == 75
    assert "stopped by --max-hours after 1 steps" in out
    again = ("--checkpoint-dir", "run", "--resume-from", "latest")
    codes = [run_small(*again)[0] for _ in range(5)]  # the limit is the run's and holds again
    assert codes == [75, 75, 75, 75, 0]
    assert_same("straight", "run")


def test_max_hours_ends_all_trainings_of_a_sweep_at_one_step(run_small: Run, shards: Path) -> None:
    Path("sweep.json").write_text('{"seed": [0, 1]}')
    where = ("--shard-dir", shards, "--sweep", "sweep.json", "--checkpoint-dir", "run")
    assert run_small(*where, "--max-hours", SOON)[0] == 75
    assert {path.name for path in Path("run").glob("*/checkpoints/step-*[1-9]")} == {
        "step-00000001"
    }
    resumed = (*where, "--resume-from", "latest")
    assert run_small(*resumed)[0] == 0


def test_checkpoints_come_by_the_clock_too(
    run_small: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    advance = Trainer.advance

    def slow(self: Trainer, **options: bool) -> dict[str, Any]:
        now[0] += 60.0  # a minute a step
        return advance(self, **options)

    monkeypatch.setattr(Trainer, "advance", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    flags = ("--checkpoint-every", "0", "--eval-every", "0", "--keep-checkpoints", "9")
    where = ("--shard-dir", shards, "--checkpoint-dir", "run", *flags)
    assert run_small(*where, "--checkpoint-minutes", "2.5", "--max-steps", "8")[0] == 0
    # Asked before each step: three minutes have passed after steps 3 and 6.
    assert steps_in("run") == [f"step-{step:08d}" for step in (0, 4, 8)]


@pytest.mark.parametrize("flag", ["--max-hours", "--checkpoint-minutes"])
def test_a_time_must_be_above_zero(run_small: Run, shards: Path, flag: str) -> None:
    refused(run_small("--shard-dir", shards, flag, "0"), "must be greater than 0, got 0")
