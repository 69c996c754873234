"""`python -m sae_fast.train`: flags, what it prints, exit codes, and every bad input."""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from sae_fast.activations import write_shard
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.train import main, parse_arguments
from sae_fast.training import run_directory

D_IN = 8
SMALL = (
    *("--d-sae", "32", "--k", "2", "--batch-size", "32", "--max-steps", "6", "--lr", "1e-2"),
    *("--log-every", "2", "--eval-every", "3", "--checkpoint-every", "2", "--num-threads", "1"),
)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    # Drawing takes longer than training here.
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards and a held-out one."""
    directory = tmp_path / "shards"
    directory.mkdir()
    for number, name in enumerate(("train_00", "train_01", "heldout_00")):
        generator = torch.Generator().manual_seed(number)
        write_shard(directory / f"{name}.h5", torch.randn(300, D_IN, generator=generator))
    return directory


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; gives its exit code and what it printed."""

    def command(*arguments: object, small: bool = True) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*(SMALL if small else []), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


def _refused(result: tuple[int, str, str], *parts: object) -> str:
    """The one line of a refusal, with exit code 2, that names all `parts`."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert lines[0] == err.splitlines()[-1]
    for part in parts:
        assert str(part) in lines[0]
    return lines[0]


# ---- what it does ------------------------------------------------------------------------------


def test_a_run_prints_plan_metrics_plot_and_checkpoint(
    run: Run, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with a real plot
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--shard-dir", shards, "--checkpoint-dir", "run")
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


def test_without_a_directory_runs_are_numbered(run: Run, shards: Path) -> None:
    for number in (1, 2):
        assert run("--shard-dir", shards, "--max-steps", 1)[0] == 0
        assert Path(f"runs/topk-k2-{number}/checkpoints/latest/sae.safetensors").exists()


def test_interrupted_and_resumed_by_its_directory_alone(run: Run, shards: Path) -> None:
    assert run("--shard-dir", shards, "--checkpoint-dir", "run", "--max-steps", 3)[0] == 0
    code, out, err = run("--resume-from", "run", "--max-steps", 6, small=False)
    assert code == 0
    assert "resumed from" in err
    assert "trained 6 steps" in out
    assert Path("run/checkpoints/latest").resolve().name == "step-00000006"


def test_skip_nonfinite_drops_and_counts(run: Run, shards: Path) -> None:
    rows = torch.randn(300, D_IN)
    rows[[7, 9]] = math.nan
    with h5py.File(shards / "train_02.h5", "w") as file:
        file["activations"] = rows.numpy()
    code, _, err = run("--shard-dir", shards, "--checkpoint-dir", "run", "--skip-nonfinite")
    assert code == 0
    assert "dropping 2 rows" in err
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])["skipped_rows"] == 2


def test_wandb_offline_gets_the_same_names(
    run: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    logged: list[dict[str, Any]] = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    init = wandb.init

    def spied_init(**settings: Any) -> Any:
        spied = init(**settings)
        log = spied.log
        monkeypatch.setattr(
            spied, "log", lambda row, step: (logged.append({**row, "step": step}), log(row, step))
        )
        return spied

    monkeypatch.setattr(wandb, "init", spied_init)
    code, _, _ = run(
        *("--shard-dir", shards, "--checkpoint-dir", "run", "--wandb-project", "tests")
    )
    assert code == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [dict(sorted(row.items())) for row in logged] == [
        dict(sorted(row.items())) for row in rows
    ]
    assert list(Path("run/wandb").glob("offline-run-*/*.wandb"))


def test_no_wandb_wins_over_a_project(
    run: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    arguments = ("--shard-dir", shards, "--wandb-project", "tests")
    assert run(*arguments, "--no-wandb")[0] == 0
    _refused(run(*arguments), "wandb_project", "--no-wandb")


# ---- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--shard-dir x --expansion-factor 4 --lr 0.1 --max-tokens 9 --grad-clip 2",
        "--shard_dir x --expansion_factor 4 --learning_rate 0.1 --max_tokens 9 --grad_clip 2",
        "--shard-dir=x --expansion_factor=4 --learning-rate=0.1 --max-tokens=9 --grad_clip=2",
    ],
)
def test_both_spellings_and_the_alias_mean_the_same(flags: str) -> None:
    config = parse_arguments(flags.split())
    assert config.sae == SAEConfig(expansion_factor=4.0)
    assert config.train == TrainConfig(
        shard_dir="x",
        learning_rate=0.1,
        max_tokens=9,
        grad_clip=2.0,
        checkpoint_dir="runs/topk-1",
    )


@pytest.mark.parametrize(
    ("flags", "amp"),
    [("--use-amp", "bf16"), ("--use_amp --k 3", "bf16"), ("--use-amp fp16", "fp16"), ("", "off")],
)
def test_use_amp_is_a_switch_or_another_name_of_amp(flags: str, amp: str) -> None:
    assert parse_arguments(flags.split()).train.amp == amp


def test_other_names_of_sizes_are_understood() -> None:
    sae = parse_arguments(["--input-dim", "5", "--num_latents=7", "--k", "2"]).sae
    assert (sae.d_in, sae.d_sae) == (5, 7)


@pytest.mark.parametrize("nested", [True, False])
def test_the_command_line_wins_over_the_file(tmp_path: Path, nested: bool) -> None:
    sae, train = {"k": 5, "num_latents": 9}, {"lr": 0.5, "batch_size": 3, "no_wandb": True}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"sae": sae, "train": train} if nested else {**sae, **train}))
    config = parse_arguments(["--batch-size", "4", "--config", str(path)])
    assert (config.sae.k, config.sae.d_sae) == (5, 9)
    assert (config.train.learning_rate, config.train.batch_size) == (0.5, 4)
    assert config.train.no_wandb is True


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for config in (SAEConfig, TrainConfig):
        for field in fields(config):
            assert f"--{field.name.replace('_', '-')}" in text


# ---- bad input: one line, exit code 2 ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--k abc", "--k"),
        ("--batch-size", "--batch-size"),
        ("--learning-rate fast", "--learning-rate"),
        ("--lr", "--learning-rate"),
        ("--bach-size 3", "--bach-size"),
        ("--amp fp8", "--amp"),
        ("--betas 0.9", "--betas"),
        ("--k 0", "k must be at least 1, got 0"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--d-in 4 --d-sae 3 --k 4", "k must be at most d_sae = 3, got 4"),
        ("--config missing.json", "missing.json"),
        ("--resume-from nowhere", "nowhere"),
        ("--resume-from latest", "checkpoint_dir"),
        ("--probe-loss-coeff -1", "probe_loss_coeff"),
    ],
)
def test_a_bad_flag_is_named(run: Run, flags: str, named: str) -> None:
    _refused(run(*flags.split(), small=False), named)


def test_an_unknown_key_of_a_file_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"batch_sise": 3}')
    _refused(run("--config", tmp_path / "bad.json"), "bad.json", "batch_sise", "batch_size")


def test_k_larger_than_what_the_data_allow(run: Run, shards: Path) -> None:
    result = run("--shard-dir", shards, "--k", 9, "--expansion-factor", 1, small=False)
    _refused(result, "k must be at most d_sae = 8, got 9")


@pytest.mark.parametrize("flags", [(), ("--shard-dir", "nowhere"), ("--shard-dir", "empty")])
def test_no_shards(run: Run, tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "empty").mkdir()
    _refused(run(*flags), flags[1] if flags else "--shard-dir")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_shard(run: Run, shards: Path, share: float) -> None:
    path = shards / "train_01.h5"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    _refused(run("--shard-dir", shards), path)
    assert not Path("runs").exists()


def test_a_file_that_is_not_hdf5(run: Run, shards: Path) -> None:
    (shards / "train_02.h5").write_text("activations, honestly")
    _refused(run("--shard-dir", shards), "train_02.h5", "not an HDF5 file")


def test_a_wrong_dataset_key_lists_what_is_there(run: Run, shards: Path) -> None:
    result = run("--shard-dir", shards, "--activations-key", "acts")
    _refused(result, "'acts'", "activations (300, 8)")


def test_shards_of_different_width(run: Run, shards: Path) -> None:
    write_shard(shards / "train_02.h5", torch.randn(50, D_IN + 1))
    _refused(run("--shard-dir", shards), "train_02.h5", "9", "8")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite(run: Run, shards: Path, value: float) -> None:
    rows = torch.randn(300, D_IN)
    rows[123, 4] = value
    with h5py.File(shards / "train_02.h5", "w") as file:
        file["activations"] = rows.numpy()
    _refused(run("--shard-dir", shards), "train_02.h5", "row 123", "--skip-nonfinite")


def test_fewer_rows_than_a_step_takes(run: Run, shards: Path) -> None:
    result = run("--shard-dir", shards, "--batch-size", 700, small=False)
    _refused(result, "max_epochs = 1 of 600 rows", "700")


def test_cuda_where_there_is_none(run: Run, shards: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    _refused(run("--shard-dir", shards, "--device", "cuda"), "device", "CUDA", "--device cpu")


def test_memory_that_runs_out(run: Run, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(SparseAutoencoder, "training_loss", full)
        result = run("--shard-dir", shards, "--checkpoint-dir", "full")
    found = ("step 1: out of memory (CUDA out of memory)", "planned (largest: ")
    _refused(result, *found, "lower batch_size, expansion_factor", "step-00000000 is intact")
    assert run("--shard-dir", shards, "--checkpoint-dir", "full", "--resume-from", "latest")[0] == 0


def test_what_cannot_fit_in_memory(run: Run, shards: Path) -> None:
    result = run("--shard-dir", shards, "--d-sae", 2**34)
    _refused(result, "GiB", "available", "optimiser states")
    assert not Path("runs").exists()


def test_a_directory_that_cannot_be_written(run: Run, shards: Path) -> None:
    Path("file").write_text("")
    _refused(run("--shard-dir", shards, "--checkpoint-dir", "file/run"), "file/run")


def test_a_directory_that_holds_another_run(run: Run, shards: Path) -> None:
    arguments = ("--shard-dir", shards, "--checkpoint-dir", "run")
    assert run(*arguments)[0] == 0
    before = sorted(Path("run").rglob("*"))
    _refused(run(*arguments), "run already holds a run", "--resume-from latest")
    assert sorted(Path("run").rglob("*")) == before


def test_a_checkpoint_of_another_width(run: Run, shards: Path, tmp_path: Path) -> None:
    assert run("--shard-dir", shards, "--checkpoint-dir", "run")[0] == 0
    other = tmp_path / "other"
    other.mkdir()
    write_shard(other / "a.h5", torch.randn(300, D_IN + 2))
    result = run("--shard-dir", other, "--checkpoint-dir", "run", "--resume-from", "latest")
    _refused(result, "step-00000006", "d_in = 8", "10 wide")


def test_a_corrupted_checkpoint_falls_back_and_says_so(run: Run, shards: Path) -> None:
    arguments = ("--shard-dir", shards, "--checkpoint-dir", "run")
    assert run(*arguments)[0] == 0
    for name in ("trainer.json", "sae.safetensors"):
        victim = Path("run/checkpoints/step-00000006") / name
        content = victim.read_bytes()
        victim.write_bytes(content[: len(content) // 2])
        code, out, err = run(*arguments, "--resume-from", "latest")
        assert code == 0
        assert f"{victim} is corrupted" in err
        assert "resumed from run/checkpoints/step-00000004" in err
        assert "trained 6 steps" in out


def test_no_intact_checkpoint_is_left(run: Run, shards: Path) -> None:
    arguments = ("--shard-dir", shards, "--checkpoint-dir", "run")
    assert run(*arguments)[0] == 0
    for path in Path("run/checkpoints").glob("step-*/trainer.json"):
        path.write_text("{}")
    _refused(run(*arguments, "--resume-from", "latest"), "step-00000006", "no intact checkpoint")


# ---- in a process of its own -------------------------------------------------------------------


PATIENCE = 240  # seconds; only a machine that stands still takes so long


@contextlib.contextmanager
def _started(*arguments: object, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which does not outlive the test."""
    command = [sys.executable, "-m", "sae_fast.train", *SMALL, *map(str, arguments)]
    root = Path(__file__).parents[1]
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
    line = _refused(result, "step-0000000", "step-00000002 is the last")
    assert "File too large" in line
    assert _finished(*resumed)[0] == 0
