"""The batch size of a run that leaves it open."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.training.fitted_batch import with_fitted_batch
from sae_fast.training.sweep import Sweep
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=32, k=2)


@pytest.mark.parametrize(
    ("settings", "rows", "size"),
    [
        ({}, 400_096, 1024),
        ({"max_epochs": 5}, 400_096, 1024),
        ({"max_epochs": 10}, 400_096, 2048),
        ({}, 4_095_999, 2048),
        ({}, 4_096_000, 4096),
        ({}, 10**9, 4096),
        ({}, 255_999, 512),
        ({}, 3_000, 256),
        ({"max_tokens": 10**9}, 400_096, 4096),
        ({"max_tokens": 400_096}, 10**9, 1024),
        ({"max_tokens": 400_096}, None, 1024),
        ({"max_tokens": 10**9, "max_epochs": 1}, 400_096, 1024),
    ],
)
def test_a_short_run_has_smaller_batches(
    settings: dict[str, Any], rows: int | None, size: int
) -> None:
    assert with_fitted_batch(TrainConfig(**settings), rows).batch_size == size


@pytest.mark.parametrize("settings", [{"max_steps": 10}, {"grad_acc_steps": 2}])
def test_settings_that_ask_for_steps_keep_the_largest_batch(settings: dict[str, Any]) -> None:
    assert with_fitted_batch(TrainConfig(**settings), 400_096).batch_size == 4096
    assert with_fitted_batch(TrainConfig(max_steps=10), None).batch_size == 4096


def test_a_given_batch_size_stays() -> None:
    config = TrainConfig(batch_size=3)
    assert with_fitted_batch(config, 400_096) is config


def test_every_kind_of_data_gets_it_and_the_run_keeps_it(
    activations: torch.Tensor, shard_dir: Path, tmp_path: Path
) -> None:
    by_rows = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(activations), batch_size=100
    )
    for number, data in enumerate((activations, by_rows, list(activations.split(500)))):
        run = TrainConfig(checkpoint_dir=str(tmp_path / str(number)))
        trainer = Trainer(SAE, run, data, show_progress=False)
        trainer.train()
        rows = trainer.source.rows_per_epoch
        assert trainer.total_steps == rows // 256 > 0
        saved = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert saved["train"]["batch_size"] == trainer.train_config.batch_size == 256
    on_shards = Trainer(SAE, TrainConfig(shard_dir=str(shard_dir)), show_progress=False)
    assert on_shards.tokens_per_step == 256
    on_shards.close()
    source = replace(TrainConfig(), max_steps=2)
    assert Trainer(SAE, source, activations, show_progress=False).tokens_per_step == 4096


def test_a_resumed_run_keeps_its_batch_size_at_another_length(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    run = TrainConfig(checkpoint_dir=str(tmp_path), max_epochs=1)
    Trainer(SAE, run, activations, show_progress=False).train()
    longer = replace(run, resume_from="latest", max_epochs=10_000)
    trainer = Trainer(SAE, longer, activations, show_progress=False)
    assert with_fitted_batch(longer, len(activations)).batch_size == 4096
    assert trainer.train_config.batch_size == 256
    trainer.close()


def test_the_trainings_of_a_sweep_share_it_and_keep_it(shard_dir: Path, tmp_path: Path) -> None:
    def configs(**settings: Any) -> dict[str, RunConfig]:
        return {
            arch: RunConfig(
                sae=SAEConfig(arch=arch, d_sae=32, k=2),
                train=TrainConfig(
                    shard_dir=str(shard_dir), checkpoint_dir=str(tmp_path / arch), **settings
                ),
            )
            for arch in ("topk", "batch_topk")
        }

    Sweep(configs(), show_progress=False).train()
    again = Sweep(configs(resume_from="latest", max_epochs=10_000), show_progress=False)
    sizes = [trainer.train_config.batch_size for trainer in again.trainers.values()]
    assert sizes == [256, 256]
    for trainer in again.trainers.values():
        trainer.close()
