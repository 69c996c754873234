"""A run that is stopped or killed and resumed equals an uninterrupted run, to the bit."""

import json
import random
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from safetensors.torch import load_file
from slow_cases import slow_after

from sae_fast.activations import write_shard
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.train import main
from sae_fast.training.checkpoint import CheckpointError
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=64, k=3, dead_after_tokens=500, decorrelation_coeff=0.1)
RUN = TrainConfig(
    batch_size=64,
    max_steps=60,
    learning_rate=3e-3,
    pool_rows=700,  # several windows an epoch, several epochs a run
    log_every=3,
    eval_every=8,
    checkpoint_every=5,
)
TIMES = ("tokens_per_second", "time_per_step_ms", "reader_stall_fraction")


def _reproducible(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name not in TIMES} for row in rows]


def _stop_after(step: int, run: TrainConfig) -> None:
    """Train to `step` and save, as a run does after a signal."""
    with Trainer(SAE, run, show_progress=False) as trainer:
        while trainer.step < step:
            trainer.advance()


@pytest.fixture
def straight(shard_dir: Path, tmp_path: Path) -> Any:
    """Return a function that gives a finished run's tensors and rows, by changed settings."""

    def finish(**changes: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        directory = tmp_path / "straight"
        run = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(directory), **changes)
        trainer = Trainer(SAE, run, show_progress=False)
        trainer.train()
        return _final(directory), trainer.history

    return finish


def _final(directory: Path) -> dict[str, torch.Tensor]:
    latest = directory / "checkpoints" / "latest"
    return load_file(latest / "sae.safetensors") | load_file(latest / "trainer.safetensors")


@pytest.mark.parametrize(
    "changes",
    slow_after(
        1,
        [
            {},
            {"amp": "bf16"},
            {"amp": "fp16", "grad_acc_steps": 2, "max_steps": 30},
            {"fused": False, "max_steps": 30},
            {"optimizer_states": "bf16", "max_steps": 30},
            {"optimizer_states": "8bit", "amp": "bf16", "max_steps": 30},
        ],
    ),
    ids=["screened", "bf16", "fp16-accumulated", "dense", "bf16-states", "8bit-states"],
)
def test_stopped_runs_end_bit_equal(
    straight: Any, shard_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    tensors, rows = straight(**changes)
    directory = tmp_path / "stopped"
    run = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(directory), **changes)
    for stop in (1, 13, 14, 29):
        _stop_after(stop, run)
        run = replace(run, resume_from="latest")
    trainer = Trainer(SAE, run, show_progress=False)
    trainer.train()
    final = _final(directory)
    assert final.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(final[name], tensors[name])] == []
    assert _reproducible(trainer.history) == _reproducible(rows)
    on_disk = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert _reproducible(on_disk) == _reproducible(rows)


@pytest.mark.slow
def test_resuming_an_older_checkpoint_drops_the_rows_after_it(
    straight: Any, tmp_path: Path
) -> None:
    tensors, rows = straight(keep_checkpoints=100)
    directory = tmp_path / "straight"
    config = json.loads((directory / "config.json").read_text())["train"]
    run = replace(
        TrainConfig.from_dict(config), resume_from=str(directory / "checkpoints" / "step-00000025")
    )
    trainer = Trainer(SAE, run, show_progress=False)
    assert [row["step"] for row in trainer.history] == [
        row["step"] for row in rows if row["step"] <= 25
    ]
    trainer.train()
    assert _reproducible(trainer.history) == _reproducible(rows)
    assert all(torch.equal(value, tensors[name]) for name, value in _final(directory).items())


@pytest.mark.slow
def test_a_corrupted_checkpoint_falls_back_and_still_ends_bit_equal(
    straight: Any, tmp_path: Path, shard_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, _ = straight()
    directory = tmp_path / "damaged"
    run = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(directory))
    _stop_after(22, run)
    victim = directory / "checkpoints" / "step-00000022" / "trainer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    run = replace(run, resume_from="latest")
    trainer = Trainer(SAE, run, show_progress=False)
    assert trainer.step == 20
    assert f"{victim} is corrupted" in caplog.text
    trainer.train()
    assert all(torch.equal(value, tensors[name]) for name, value in _final(directory).items())


def test_a_finished_run_resumed_is_finished(straight: Any, tmp_path: Path) -> None:
    tensors, rows = straight()
    directory = tmp_path / "straight"
    config = json.loads((directory / "config.json").read_text())["train"]
    run = replace(TrainConfig.from_dict(config), resume_from="latest")
    trainer = Trainer(SAE, run, show_progress=False)
    trainer.train()
    assert trainer.history == rows
    assert all(torch.equal(value, tensors[name]) for name, value in _final(directory).items())


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (replace(SAE, k=4), "of a model with k = 3, this run's has 4"),
        (replace(SAE, d_sae=32), "of a model with d_sae = 64, this run's has 32"),
    ],
)
def test_another_model_is_refused(
    straight: Any, tmp_path: Path, shard_dir: Path, changed: SAEConfig, complaint: str
) -> None:
    straight(max_steps=2)
    run = replace(
        RUN,
        shard_dir=str(shard_dir),
        checkpoint_dir=str(tmp_path / "straight"),
        resume_from="latest",
    )
    with pytest.raises(CheckpointError, match=complaint):
        Trainer(changed, run, show_progress=False)


def test_other_held_out_rows_and_labels_are_refused(tmp_path: Path) -> None:
    rows, held = torch.randn(640, 16), torch.randn(128, 16)
    columns = {"relation": torch.arange(640) % 3}
    labels = {"relation": torch.arange(128) % 3}
    names = {"relation_labels": "relation", "slots_mode": "separate_activation"}
    sae = SAEConfig(arch="slots", d_sae=64, **names)  # type: ignore[arg-type]
    run = replace(RUN, checkpoint_dir=str(tmp_path), max_steps=3)

    def trainer(held: torch.Tensor, labels: torch.Tensor, **changes: Any) -> Trainer:
        return Trainer(
            *(sae, replace(run, **changes), rows),
            heldout=held,
            columns=columns,
            heldout_columns={"relation": labels},
            show_progress=False,
        )

    trainer(held, labels["relation"]).train()
    further = {"resume_from": str(tmp_path), "max_steps": 4}
    trainer(held, labels["relation"], **further).train()
    further["max_steps"] = 5
    for other, own in ((held + 1, labels["relation"]), (held, labels["relation"].flip(0))):
        with pytest.raises(
            CheckpointError, match="the held-out rows differ from the ones that the check"
        ):
            trainer(other, own, **further)


def test_other_data_and_another_width_are_refused(straight: Any, tmp_path: Path) -> None:
    straight(max_steps=2)
    for width, complaint in ((16, "does not fit this run: .*shards"), (12, "d_in = 16.* 12 wide")):
        other = tmp_path / f"other{width}"
        other.mkdir()
        write_shard(other / "a.h5", torch.randn(1000, width))
        run = replace(
            RUN,
            shard_dir=str(other),
            checkpoint_dir=str(tmp_path / "straight"),
            resume_from="latest",
        )
        with pytest.raises(CheckpointError, match=complaint) as error:
            Trainer(SAE, run, show_progress=False)
        assert "\n" not in str(error.value)


def test_other_settings_are_told(
    straight: Any, tmp_path: Path, shard_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight(max_steps=2)
    run = replace(
        RUN,
        shard_dir=str(shard_dir),
        checkpoint_dir=str(tmp_path / "straight"),
        resume_from="latest",
        grad_clip=2.0,
        max_steps=4,
        log_every=1,
    )
    Trainer(SAE, run, show_progress=False).train()
    assert "max_steps 2 -> 4, grad_clip 1.0 -> 2.0" in caplog.text
    assert "log_every" not in caplog.text


def test_without_a_checkpoint_latest_starts_and_says_so(
    shard_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(tmp_path), resume_from="latest")
    assert Trainer(SAE, run, show_progress=False).step == 0
    assert "starting from the beginning" in caplog.text


def _rows(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # not half a row


def _kill_after(rows: int, command: list[str], directory: Path, pause: float) -> None:
    """Start the command and kill it soon after it has written the given number of rows."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with warm_python.Process(command, **output) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(b"training"):
            assert process.poll() is None
        while len(_rows(directory)) < rows:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(pause)
        process.kill()


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_bit_equal(shard_dir: Path, tmp_path: Path) -> None:
    def flags(name: str) -> list[str]:
        return [
            *("--shard-dir", str(shard_dir)),
            *("--checkpoint-dir", str(tmp_path / name), "--resume-from", "latest"),
            *("--d-sae", "64", "--k", "3", "--batch-size", "64", "--max-steps", "200"),
            *("--pool-rows", "700", "--log-every", "2", "--eval-every", "50"),
            *("--checkpoint-every", "4", "--dead-after-tokens", "500", "--num-threads", "1"),
        ]

    assert main(flags("straight")) == 0
    command = ["-m", "sae_fast.train", *flags("killed")]
    chance = random.Random(0)
    rows = 0
    for _ in range(4):
        _kill_after(rows, command, tmp_path / "killed", chance.uniform(0, 0.01))
        rows = len(_rows(tmp_path / "killed")) + chance.randint(1, 15)
    assert main(flags("killed")) == 0
    expected, final = _final(tmp_path / "straight"), _final(tmp_path / "killed")
    assert [name for name in expected if not torch.equal(final[name], expected[name])] == []
    straight_rows, killed_rows = _rows(tmp_path / "straight"), _rows(tmp_path / "killed")
    assert len(straight_rows) == 100
    assert _reproducible(straight_rows) == _reproducible(killed_rows)
