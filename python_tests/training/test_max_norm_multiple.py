"""Rows of many times the median norm are dropped from the data, the mean and the scale."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.activations import write_shard
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

D_IN = 12
ROWS = torch.randn(320, D_IN, generator=torch.Generator().manual_seed(0)) + 3
SINKS = torch.arange(5, 320, 64)
LARGE = ROWS.clone()
LARGE[SINKS] *= 200
KEPT = torch.ones(320, dtype=torch.bool)
KEPT[SINKS] = False
SAE = SAEConfig(d_sae=40, k=4)
RUN = TrainConfig(batch_size=32, max_steps=6, lr=1e-2, log_every=1)
DROP = replace(RUN, max_norm_multiple=10.0)


def _trainer(run: TrainConfig, data: Any = None, **beside: Any) -> Trainer:
    return Trainer(SAE, run, data, show_progress=False, **beside)


def _check_robust(trainer: Trainer, rows: torch.Tensor) -> None:
    """Check mean and scale against the ones of these rows in float64."""
    mean = rows.double().mean(0)
    scale = math.sqrt(D_IN) / float((rows.double() - mean).norm(dim=1).mean())
    torch.testing.assert_close(trainer.sae.activation_mean.double(), mean, rtol=1e-6, atol=1e-6)
    assert float(trainer.sae.activation_scale) == pytest.approx(scale, rel=1e-6)


def test_rows_of_a_tensor_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = _trainer(DROP, LARGE)
    assert "dropping 5 of 320 rows, whose norms are above 10 times the median" in caplog.text
    assert trainer.source.rows_per_epoch == 315
    _check_robust(trainer, ROWS[KEPT])
    weights = trainer.train().state_dict()
    assert trainer.history[-1]["skipped_rows"] == 5
    expected = _trainer(RUN, ROWS[KEPT]).train().state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_rows_of_shards_are_dropped_with_their_held_out_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, part in enumerate(LARGE.split([70, 40, 210])):  # the second has no large row
        write_shard(tmp_path / f"{number}.h5", part)
    run = replace(DROP, shard_dir=str(tmp_path), heldout_fraction=0.25)
    with caplog.at_level(logging.WARNING):
        trainer = _trainer(run)
    assert "dropping 5 rows that" in caplog.text
    assert "times the median, up to" not in caplog.text  # the warning of what was left in
    train, held = LARGE[KEPT][:236], LARGE[KEPT][236:]
    assert trainer.source.rows_per_epoch == len(train)
    _check_robust(trainer, train)
    assert torch.equal(torch.cat([batch.clone() for batch in trainer.data.heldout or []]), held)
    trainer.train()
    again = _trainer(replace(run, max_norm_multiple=None))
    assert again.source.rows_per_epoch == 240
    again.close()


def test_without_the_setting_and_without_such_rows_nothing_changes(tmp_path: Path) -> None:
    plain = _trainer(RUN, ROWS).train().state_dict()
    dropping = _trainer(DROP, ROWS).train().state_dict()
    assert all(torch.equal(plain[name], dropping[name]) for name in plain)
    assert _trainer(RUN, LARGE).source.rows_per_epoch == 320


def test_held_out_rows_of_a_tensor_are_dropped_too() -> None:
    trainer = _trainer(replace(DROP, heldout_fraction=0.25), LARGE)
    assert torch.equal(torch.cat(list(trainer.data.heldout or [])), ROWS[240:][KEPT[240:]])


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="max_norm_multiple needs verify full"):
        replace(DROP, verify="off")
    with pytest.raises(ValueError, match="max_norm_multiple must be greater than 1, got 1"):
        replace(DROP, max_norm_multiple=1.0)
    with pytest.raises(ValueError, match=r"max_norm_multiple = 10\.0 needs shards or a tensor"):
        _trainer(DROP, [ROWS])
