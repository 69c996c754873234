"""Conflicts of settings are told before a row of the shards is read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_fast.activations.row_scan import RowScanner
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.training.checkpoint import CheckpointError
from sae_fast.training.sweep import Sweep, read_sweep
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=32, k=2)
RUN = TrainConfig(batch_size=64, max_steps=4, learning_rate=3e-3)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test fail where a row is read."""
    monkeypatch.setattr(RowScanner, "add", lambda *_: pytest.fail("read a row"))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("sae", "train", "message"),
    [
        ({"k": 40}, {}, "k must be at most"),
        ({"d_in": 9}, {}, "d_in"),
        ({}, {"warmup_steps": 9}, "warmup_steps = 9 needs a run that is as long, not 4"),
        ({}, {"sparsity_warmup_steps": 2}, "sparsity_warmup_steps = 2 needs a sparsity penalty"),
        ({}, {"max_steps": None, "batch_size": 10**6}, "batch_size"),
        ({"d_sae": 10**11, "k": 2}, {}, "the run needs .* is available"),
        ({}, {"checkpoint_dir": "taken"}, "taken already holds a run"),
    ],
)
def test_a_conflict_is_told_before_anything_is_read(
    shard_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sae: dict[str, Any],
    train: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "checkpoints" / "step-00000003").mkdir(parents=True)
    config = replace(RUN, shard_dir=str(shard_dir), **train)
    with pytest.raises(ValueError, match=message):
        Trainer(replace(SAE, **sae), config, show_progress=False)


@pytest.mark.usefixtures("unread")
def test_a_conflict_of_one_training_of_a_sweep_is_told_before_anything_is_read(
    shard_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"k": [1, 40]}))
    base = RunConfig(sae=replace(SAE, k=None), train=replace(RUN, shard_dir=str(shard_dir)))
    with pytest.raises(ValueError, match="k_40: k must be at most"):
        Sweep(read_sweep(tmp_path / "sweep.json", base), show_progress=False)


def test_a_resume_that_does_not_fit_is_told_before_anything_is_read(
    shard_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(tmp_path / "run"))
    Trainer(SAE, config, show_progress=False).train()
    (tmp_path / "run" / "shards.json").unlink()
    monkeypatch.setattr(RowScanner, "add", lambda *_: pytest.fail("read a row"))
    again = replace(config, resume_from="latest")
    with pytest.raises(CheckpointError, match="is of a model with k = 2, this run's has 3"):
        Trainer(replace(SAE, k=3), again, show_progress=False)
    with pytest.raises(ValueError, match="steps"):
        Trainer(SAE, replace(again, max_steps=3), show_progress=False)


@pytest.mark.parametrize("verify", ["off", "lazy", "full"])
def test_what_is_verified_changes_no_bit_of_the_result(
    shard_dir: Path, tmp_path: Path, verify: str
) -> None:
    configs = (replace(RUN, shard_dir=str(shard_dir)) for _ in range(2))
    models = [
        Trainer(SAE, replace(config, verify=mode), show_progress=False).train()
        for config, mode in zip(configs, ("full", verify), strict=True)
    ]
    assert (models[0].W_dec == models[1].W_dec).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verify": "off", "repeated_rows": "drop"}, "repeated_rows drop needs verify full"),
        ({"verify": "lazy", "repeated_rows": "drop"}, "repeated_rows drop needs verify full"),
        ({"verify": "lazy", "skip_nonfinite": True}, "skip_nonfinite needs verify full or off"),
    ],
)
def test_rows_that_are_dropped_must_be_looked_for_first(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
