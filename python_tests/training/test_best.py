"""`best` is the lowest value of what a run minimises, once its codes are sparse."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.autoencoder.architectures import make_architecture
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.best import BestRule
from sae_fast.training.schedule import make_schedules
from sae_fast.training.trainer import Trainer

RUN = TrainConfig(batch_size=10, max_steps=100, warmup_steps=0, sparsity_warmup_steps=30)


def _rule(run: TrainConfig = RUN, *, has_heldout: bool = True, **sae: Any) -> BestRule:
    config = SAEConfig(**{"d_in": 8, "d_sae": 16, **sae})
    schedules, wanted = make_schedules(run, config, 10_000), make_architecture(config).wanted_l0
    return BestRule(config, run, schedules, has_heldout=has_heldout, wanted_l0=wanted)


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
        (replace(RUN, warmup_steps=None), {"k": 2}, 5),
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
    assert rule.improved(None, first - 1, {rule.figure: 0.1}) is None
    assert rule.improved(None, first, {rule.figure: 0.9}) is not None


def test_with_a_target_a_lower_error_of_a_denser_code_is_not_better() -> None:
    rule = _rule(arch="gated", target_l0=4)
    dense = rule.objective(50, {"heldout_fvu": 0.1, "heldout_l0": 8.0})
    sparse = rule.objective(50, {"heldout_fvu": 0.3, "heldout_l0": 4.2})
    assert dense == {"objective": pytest.approx(1.1)}
    assert sparse == {"objective": pytest.approx(0.3 + 0.05**2)}
    assert rule.objective(29, {"heldout_fvu": 0.1, "heldout_l0": 4.0}) == {}
    best = rule.improved(None, 50, {"heldout_l0": 4.2, **sparse})
    assert best == {**sparse, "heldout_l0": 4.2, "step": 50}
    assert rule.improved(best, 60, {"heldout_l0": 8.0, **dense}) is None
    # A checkpoint of a version that ranked by FVU.
    assert rule.improved({"heldout_fvu": 0.1, "step": 40}, 60, dense) is not None


@pytest.mark.parametrize("arch", ["batch_topk", "matryoshka"])
def test_of_codes_with_a_threshold_one_that_has_more_than_k_latents_is_not_better(
    arch: str,
) -> None:
    rule = _rule(arch=arch, k=4)
    dense = rule.objective(50, {"heldout_fvu": 0.1, "heldout_l0": 6.0})
    exact = rule.objective(50, {"heldout_fvu": 0.3, "heldout_l0": 4.0})
    assert dense == {"objective": pytest.approx(0.35)}
    assert exact == {"objective": pytest.approx(0.3)}
    assert rule.improved({**exact, "step": 50}, 60, {"heldout_l0": 6.0, **dense}) is None
    penalised = _rule(arch=arch, k=4, l1_penalty_coeff=1.0)
    row = {"heldout_fvu": 0.1, "heldout_l0": 6.0, "l1_loss": 2.0}
    assert penalised.objective(50, row) == {"objective": pytest.approx(0.1 + 2.0 / 8 + 0.25)}
    # A training batch has k latents for a token, and more than half of all latents have no target.
    assert _rule(arch=arch, k=4, has_heldout=False).figure == "loss"
    assert _rule(arch=arch, k=9).figure == "heldout_fvu"


def test_with_a_penalty_its_terms_count_in_units_of_the_error_of_the_mean() -> None:
    rule = _rule(arch="relu", l1_penalty_coeff=1.0)
    row = {"heldout_fvu": 0.1, "heldout_l0": 8.0, "l1_loss": 2.0}
    assert rule.objective(50, row) == {"objective": pytest.approx(0.1 + 2.0 / 8)}
    rule = _rule(arch="jumprelu", sparsity_penalty="l0", loss_fn="fvu")
    row = {"heldout_fvu": 0.1, "heldout_l0": 8.0, "l1_loss": 0.0, "sparsity_loss": 0.3}
    assert rule.objective(50, row) == {"objective": pytest.approx(0.4)}


@pytest.mark.parametrize(
    ("name", "worse", "better"),
    [
        ("heldout_fvu", 0.3, 0.2),
        ("heldout_explained_variance", 0.7, 0.8),
        ("recon_loss", 3.0, 2.0),
        ("silent_fraction", 0.2, 0.0),
        ("objective", 0.3, 0.2),
    ],
)
def test_another_figure_is_compared_in_its_direction(
    name: str, worse: float, better: float
) -> None:
    rule = _rule(replace(RUN, best_by=name), arch="relu", target_l0=4)
    first = rule.improved(None, 50, {name: worse})
    assert first == {name: worse, "step": 50}
    assert rule.improved(first, 60, {name: better}) == {name: better, "step": 60}
    assert rule.improved({name: better, "step": 60}, 70, {name: worse}) is None


@pytest.mark.parametrize("name", ["heldout_l0", "learning_rate", "heldout_ce", "objective", "fuv"])
def test_a_figure_that_cannot_rank_is_refused_with_those_that_can(name: str) -> None:
    with pytest.raises(ValueError, match=rf"best_by must be .* heldout_fvu, .* got '{name}'"):
        _rule(replace(RUN, best_by=name), k=2)


def test_a_figure_of_eval_metrics_is_refused_with_the_flag_that_it_needs() -> None:
    with pytest.raises(ValueError, match=r"got 'heldout_ce_score', which needs --eval-metrics$"):
        _rule(replace(RUN, best_by="heldout_ce_score"), k=2)


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
    assert "no held-out rows: best is chosen by the training's loss" in caplog.text


def test_best_by_names_the_checkpoint_also_after_a_resume(
    activations: torch.Tensor, heldout: torch.Tensor, tmp_path: Path
) -> None:
    sae = SAEConfig(arch="gated", d_sae=32, target_l0=3)
    run = TrainConfig(
        batch_size=64, max_steps=12, learning_rate=1e-2, eval_every=3, log_every=1,
        checkpoint_every=3, checkpoint_dir=str(tmp_path / "a"), best_by="recon_loss",
    )  # fmt: skip
    trainer = Trainer(sae, run, activations, heldout=heldout, show_progress=False)
    trainer.train()
    rows = [row for row in trainer.history if row["step"] % 3 == 0]
    lowest = min(rows, key=lambda row: row["recon_loss"])
    summary = trainer.summary
    assert summary["best_recon_loss"] == lowest["recon_loss"]
    assert summary["best_step"] == lowest["step"]
    assert summary["best_heldout_l0"] == lowest["heldout_l0"]
    assert all(row["objective"] > row["heldout_fvu"] for row in rows)
    again = replace(run, resume_from="latest", best_by=None, max_steps=15)
    trainer = Trainer(sae, again, activations, heldout=heldout, show_progress=False)
    trainer.train()
    assert trainer.summary["best_objective"] == trainer.history[-1]["objective"]
    assert trainer.summary["best_step"] == 15
