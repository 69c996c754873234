"""`python -m sae_fast.train`: its effects, its output and its files."""

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import pytest
import torch
from train_runs import D_IN, Run, refused

from sae_fast.activations import write_shard
from sae_fast.activations.row_scan import RowScanner
from sae_fast.config import RunConfig


def test_a_run_prints_plan_metrics_plot_and_checkpoint(
    run_small: Run, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with a real plot
    monkeypatch.chdir(tmp_path)
    code, out, err = run_small("--shard-dir", shards, "--checkpoint-dir", "run")
    assert code == 0
    assert Path("run/plots/training.png").stat().st_size > 10_000
    assert out.index("memory plan") < out.index("training topk: d_in 8, d_sae 32, k 2")
    assert "trained 6 steps, 192 tokens" in out
    assert "heldout_fvu" in out
    for line in ("plot       run/plots/training.png", "checkpoint run/checkpoints/step-00000006"):
        assert line in out
    assert "step 6: loss" in err
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert RunConfig.load("run/config.json").sae.d_in == D_IN


def test_without_a_directory_runs_are_numbered(run_small: Run, shards: Path) -> None:
    for number in (1, 2):
        assert run_small("--shard-dir", shards, "--max-steps", 1)[0] == 0
        assert Path(f"runs/topk-k2-{number}/checkpoints/latest/sae.safetensors").exists()


def test_interrupted_and_resumed_by_its_directory_alone(
    run: Run, run_small: Run, shards: Path
) -> None:
    assert run_small("--shard-dir", shards, "--checkpoint-dir", "run", "--max-steps", 3)[0] == 0
    code, out, err = run("--resume-from", "run", "--max-steps", 6)
    assert code == 0
    assert "resumed from" in err
    assert "trained 6 steps" in out
    assert Path("run/checkpoints/latest").resolve().name == "step-00000006"


def test_skip_nonfinite_drops_and_counts(run_small: Run, shards: Path) -> None:
    rows = torch.randn(300, D_IN)
    rows[[7, 9]] = math.nan
    with h5py.File(shards / "train_02.h5", "w") as file:
        file["activations"] = rows.numpy()
    code, _, err = run_small("--shard-dir", shards, "--checkpoint-dir", "run", "--skip-nonfinite")
    assert code == 0
    assert "dropping 2 rows" in err
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])["skipped_rows"] == 2


def test_repeated_rows_are_dropped_and_counted_or_kept(run_small: Run, shards: Path) -> None:
    write_shard(shards / "train_02.h5", torch.zeros(50, D_IN))
    flags = ("--shard-dir", shards, "--repeated-rows")
    code, _, err = run_small(*flags, "drop", "--checkpoint-dir", "dropped")
    assert code == 0
    assert "dropping 50 rows" in err
    row = json.loads(Path("dropped/metrics.jsonl").read_text().splitlines()[0])
    assert row["skipped_rows"] == 50
    code, _, err = run_small(*flags, "keep", "--checkpoint-dir", "kept")
    assert code == 0
    assert "50 of 650 rows are zero or equal to the row before them" in err


def test_a_resumed_run_reads_no_shard_before_its_first_step(
    run: Run, run_small: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_small("--shard-dir", shards, "--checkpoint-dir", "run", "--max-steps", 3)[0] == 0
    record = json.loads(Path("run/shards.json").read_text())
    assert len(record["shards"]) == 3
    for entry in record["shards"].values():
        entry["scanned_at"] += 10**9  # as if the files were older
    Path("run/shards.json").write_text(json.dumps(record))
    monkeypatch.setattr(RowScanner, "add", lambda *_: pytest.fail("read again"))
    assert run("--resume-from", "run", "--max-steps", 6)[0] == 0


def test_a_shard_without_a_checksum_that_changed_is_refused_on_resume(
    run: Run, run_small: Run, tmp_path: Path
) -> None:
    path = tmp_path / "plain" / "a.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["activations"] = torch.randn(600, D_IN).numpy()
    flags = ("--shard-dir", path.parent, "--checkpoint-dir", "run", "--max-steps", 3)
    assert run_small(*flags)[0] == 0
    shutil.copyfile(path, path.with_name("copy"))
    path.with_name("copy").replace(path)
    assert run("--resume-from", "run", "--max-steps", 4)[0] == 0
    with h5py.File(path, "r+") as file:
        file["activations"][100] = 1
    result = run("--resume-from", "run", "--max-steps", 5)
    refused(
        result,
        "the shards differ from the ones that the checkpoint was made with: a.h5 has other content",
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["beside", "apart"])
def test_a_held_out_shard_that_changed_is_refused_on_resume(
    run: Run, run_small: Run, shards: Path, where: str
) -> None:
    flags: tuple[object, ...] = ("--shard-dir", shards, "--checkpoint-dir", "run")
    (held,) = shards.glob("heldout*")
    if where == "apart":
        held = held.rename(Path("aside.h5"))
        flags += ("--heldout", held)
    assert run_small(*flags, "--max-steps", 3)[0] == 0
    assert run("--resume-from", "run", "--max-steps", 4)[0] == 0
    with h5py.File(held, "r+") as file:
        rows = file["activations"].shape[0]
        file.attrs.pop("checksum", None)
        file["activations"].attrs.pop("checksum", None)
        file["activations"][rows // 2] = 1
    differ = "the held-out shards differ from the ones that the checkpoint was made with"
    words = f"{differ}: {held.name} has other content"
    refused(run("--resume-from", "run", "--max-steps", 5), words)
    other = held.rename(held.with_name("heldout_other.h5"))
    changed = ("--heldout", other) if where == "apart" else ()
    result = run("--resume-from", "run", "--max-steps", 5, *changed)
    refused(result, f"{held.name} is gone and heldout_other.h5 is new")
    other.unlink()
    Path("none").mkdir()
    assert run_small(*flags[:2], "--checkpoint-dir", "bare", "--max-steps", 3)[0] == 0
    shutil.copy(next(shards.glob("*.h5")), shards / "heldout_9.h5")
    assert run("--resume-from", "bare", "--max-steps", 5)[0] == 0  # there were none to compare with


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without its histogram, which metrics.jsonl does not have."""
    return {name: value for name, value in row.items() if name != "heldout_log10_density"}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the rows logged to Weights & Biases, offline."""
    pytest.importorskip("wandb")
    logged: list[dict[str, Any]] = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    init = wandb.init

    def spied_init(**settings: Any) -> Any:
        spied = init(**settings)
        log = spied.log
        monkeypatch.setattr(spied, "log", lambda row: (logged.append(_plain(row)), log(row)))
        return spied

    monkeypatch.setattr(wandb, "init", spied_init)
    return logged


@pytest.mark.slow
def test_wandb_offline_gets_the_same_names(
    run_small: Run, shards: Path, logged: list[dict[str, Any]]
) -> None:
    code, _, _ = run_small(
        *("--shard-dir", shards, "--checkpoint-dir", "run", "--wandb-project", "tests")
    )
    assert code == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [dict(sorted(row.items())) for row in logged] == [
        dict(sorted(row.items())) for row in rows
    ]
    assert list(Path("run/wandb").glob("offline-run-*/*.wandb"))


def test_wandb_has_an_interval_of_its_own(
    run_small: Run, shards: Path, logged: list[dict[str, Any]]
) -> None:
    flags = ("--log-every", "4", "--wandb-log-every", "6", "--eval-every", "9", "--max-steps", "20")
    where = ("--shard-dir", shards, "--checkpoint-dir", "run", "--wandb-project", "tests")
    assert run_small(*where, *flags)[0] == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 6, 8, 9, 12, 16, 18, 20]
    assert [row["step"] for row in logged] == [6, 9, 12, 18, 20]
    assert [row["step"] for row in rows if "loss" not in row] == [9]


def test_no_wandb_wins_over_a_project(
    run_small: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    arguments = ("--shard-dir", shards, "--wandb-project", "tests")
    assert run_small(*arguments, "--no-wandb")[0] == 0
    refused(run_small(*arguments), "pip install 'sae_fast[wandb]'", "--no-wandb")


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Set Weights & Biases online without a key."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # values read from the environment for another test
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()


@pytest.mark.usefixtures("no_account")
def test_wandb_without_a_key_is_refused_before_the_first_step(run_small: Run, shards: Path) -> None:
    arguments = ("--shard-dir", shards, "--checkpoint-dir", "run", "--wandb-project", "tests")
    refused(run_small(*arguments), "wandb_project = 'tests'", "WANDB_MODE=offline", "--no-wandb")
    assert not Path("run/metrics.jsonl").exists()
    assert run_small(*arguments, "--no-wandb")[0] == 0


class RecordingRun:
    """Replaces a run of wandb: records the calls, and fails from a given step on."""

    def __init__(self, log: list[Any], fails_at: int | None = None) -> None:
        self.id, self.summary = "run-1", dict[str, Any]()
        self._log, self._fails_at = log, fails_at

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self._log.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        if self._fails_at is not None and row["step"] >= self._fails_at:
            raise RuntimeError("the service\nhas died")
        self._log.append(row["step"])

    def finish(self, exit_code: int) -> None:
        self._log.append(f"finished with {exit_code}")


def _stand_in(monkeypatch: pytest.MonkeyPatch, run: RecordingRun) -> list[dict[str, Any]]:
    given: list[dict[str, Any]] = []
    module = SimpleNamespace(
        init=lambda **settings: (given.append(settings), run)[1],
        Histogram=lambda np_histogram: np_histogram,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return given


def test_wandb_gets_the_rows_of_a_resumed_run_on_a_step_axis_of_its_own(
    run_small: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []
    given = _stand_in(monkeypatch, RecordingRun(log))
    where = ("--shard-dir", shards, "--checkpoint-dir", "run", "--wandb-project", "tests")
    assert run_small(*where)[0] == 0
    shutil.rmtree("run/checkpoints/step-00000006")  # as if killed after step 4
    again = ("--resume-from", "run/checkpoints/step-00000004", "--checkpoint-dir", "run")
    assert run_small(*again)[0] == 0
    axis = [("step", None), ("*", "step")]
    # Step 6 was logged before the kill: made again, it is not logged again.
    assert log == [*axis, 2, 3, 4, 6, "finished with 0", *axis, "finished with 0"]
    assert [settings["id"] for settings in given] == [None, "run-1"]


def test_wandb_that_fails_on_the_way_is_told_once_and_training_goes_on(
    run_small: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []
    _stand_in(monkeypatch, RecordingRun(log, fails_at=3))
    where = ("--shard-dir", shards, "--checkpoint-dir", "run", "--wandb-project", "tests")
    code, _, err = run_small(*where)
    assert code == 0
    assert log[2:] == [2]
    assert err.count("Weights & Biases fails and gets no more rows: the service has died") == 1
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 4
