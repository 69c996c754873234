"""`best` is the lowest value of what a run minimises, once its codes are sparse."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.best import BestRule
from sae_fast.training.schedule import make_schedules
from sae_fast.training.trainer import Trainer

RUN = TrainConfig(batch_size=10, max_steps=100, sparsity_warmup_steps=30)


def _rule(run: TrainConfig = RUN, *, has_heldout: bool = True, **sae: Any) -> BestRule:
    config = SAEConfig(**{"d_in": 8, "d_sae": 16, **sae})
    return BestRule(config, make_schedules(run, config, 10_000), has_heldout=has_heldout)


@pytest.mark.parametrize(
    ("loss_fn", "figure"),
    [("mse", "fvu"), ("fvu", "fvu"), ("ce", "ce"), ("kl", "kl")],
)
def test_the_figure_is_what_the_run_minimises(loss_fn: str, figure: str) -> None:
    assert _rule(k=2, loss_fn=loss_fn).figure == f"heldout_{figure}"
    assert _rule(k=2, loss_fn=loss_fn, has_heldout=False).figure == "loss"


def test_the_lowest_value_is_the_best() -> None:
    rule = _rule(k=2)
    first = rule.improved(None, 1, {"heldout_fvu": 0.5})
    assert first == {"heldout_fvu": 0.5, "step": 1}
    assert rule.improved(first, 2, {"heldout_fvu": 0.5}) is None
    assert rule.improved(first, 2, {"heldout_fvu": math.nan}) is None
    assert rule.improved(first, 2, {}) is None
    assert rule.improved(first, 2, {"heldout_fvu": 0.4}) == {"heldout_fvu": 0.4, "step": 2}
    # A checkpoint written with another figure.
    assert rule.improved({"loss": 0.1, "step": 1}, 2, {"heldout_fvu": 0.4}) is not None


@pytest.mark.parametrize(
    ("run", "sae", "first"),
    [
        (RUN, {"k": 2}, 0),
        (RUN, {"k": 2, "l1_penalty_coeff": 0.1}, 30),
        (RUN, {"arch": "relu", "target_l0": 4}, 30),
        (replace(RUN, sparsity_warmup_steps=None), {"arch": "gated", "target_l0": 4}, 5),
        (replace(RUN, sparsity_warmup_steps=300), {"arch": "relu", "l1_penalty_coeff": 1.0}, 100),
        (replace(RUN, reconstruction_epochs=0.02), {"arch": "relu", "l1_penalty_coeff": 1.0}, 50),
        (replace(RUN, k_anneal_start=8, k_anneal_steps=40), {"k": 2}, 40),
    ],
)
def test_no_step_is_the_best_while_codes_become_sparse(
    run: TrainConfig, sae: dict[str, Any], first: int
) -> None:
    rule = _rule(run, **sae)
    assert rule.first_step == first
    assert rule.improved(None, first - 1, {"heldout_fvu": 0.1}) is None
    assert rule.improved(None, first, {"heldout_fvu": 0.9}) is not None


def test_without_heldout_rows_the_training_loss_decides(
    activations: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = TrainConfig(
        batch_size=64, max_steps=9, learning_rate=1e-2, log_every=1, eval_every=3,
        checkpoint_dir=str(tmp_path),
    )  # fmt: skip
    caplog.set_level("INFO")
    trainer = Trainer(SAEConfig(d_sae=32, k=2), run, activations, show_progress=False)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if row["step"] % 3 == 0]
    best = min(evaluated, key=lambda row: row["loss"])
    assert trainer.summary["best_step"] == best["step"]
    assert trainer.summary["best_loss"] == best["loss"]
    assert os.readlink(tmp_path / "checkpoints" / "best") == f"step-{best['step']:08d}"
    assert "no held-out rows: best is the checkpoint with the lowest training loss" in caplog.text
