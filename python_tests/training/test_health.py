"""A run that collapses or does not learn warns and names flags; a healthy run does not."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.training.health import RunHealth, silent_window
from sae_fast.training.schedule import make_schedules
from sae_fast.training.trainer import Trainer

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = TrainConfig(batch_size=64, max_steps=60, learning_rate=1e-2, log_every=5, eval_every=0)
TOPK = SAEConfig(d_in=16, d_sae=64, k=3)
FIGURES: dict[str, Any] = {"loss": 5.0, "fvu": 0.3, "l0": 3.0, "silent_fraction": 0.1}


def _warnings(data: torch.Tensor, sae: SAEConfig, run: TrainConfig = RUN, **more: Any) -> list[str]:
    trainer = Trainer(sae, run, data, show_progress=False, **more)
    trainer.train()
    found: list[str] = trainer.summary["warnings"]
    return found


def _concluded(sae: SAEConfig, run: TrainConfig = RUN, **figures: Any) -> list[str]:
    """Return the warnings of a run whose last row has these figures and a lower loss."""
    health = RunHealth(sae, run, make_schedules(run, sae, 3000))
    first = {"step": 5, "tokens": 320, **FIGURES, "loss": 9.0}
    return health.conclude([first, {"step": 60, "tokens": 3840, **FIGURES, **figures}])


def test_a_penalty_that_silences_the_code_is_told(
    activations: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    sae = SAEConfig(arch="relu", d_sae=64, l1_penalty_coeff=3000.0)
    with caplog.at_level(logging.WARNING, logger="sae_fast"):
        l0, fvu = _warnings(activations, sae)
    assert l0.startswith("L0 is")
    assert fvu.startswith("FVU is")
    told = [record.message.split(": ")[1][:6] for record in caplog.records]
    assert sorted(told) == ["FVU is", "L0 is "]  # each once
    for text in (l0, fvu):
        assert "lower --l1-penalty-coeff (now 3000) or name the wanted L0 with --target-l0" in text


@pytest.mark.parametrize(("full", "is_told"), [(3, False), (4, True)])
def test_selections_that_score_every_latent_are_told(full: int, is_told: bool) -> None:
    sae = replace(TOPK, arch="batch_topk")
    warnings = _concluded(sae, full_batches=full)
    assert any(f"{full} of 60 steps had more candidates" in text for text in warnings) == is_told


def test_a_learning_rate_that_moves_nothing_is_told(activations: torch.Tensor) -> None:
    (text,) = _warnings(activations, TOPK, replace(RUN, learning_rate=1e-9))
    assert text.startswith("the loss has not fallen: ")
    assert "raise --lr (now 1e-09)" in text


def test_a_healthy_run_is_quiet(
    activations: torch.Tensor, heldout: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sae_fast"):
        assert _warnings(activations, TOPK, heldout=heldout) == []
    assert caplog.records == []


def test_a_loss_whose_batches_differ_in_variance_is_no_warning() -> None:
    health = RunHealth(TOPK, RUN, make_schedules(RUN, TOPK, 3000))
    rows = [
        {"step": 5, "tokens": 320, **FIGURES, "loss": 30.0, "fvu": 0.5},
        {"step": 60, "tokens": 3840, **FIGURES, "loss": 31.0, "fvu": 0.3},
    ]
    assert health.conclude(rows) == []


def test_relu_leaves_fewer_than_more_than_half_of_the_latents_without_a_warning() -> None:
    assert _concluded(replace(TOPK, k=60), l0=33.0) == []


def test_a_loss_that_rises_while_k_falls_is_no_warning(activations: torch.Tensor) -> None:
    run = replace(RUN, k_anneal_start=48, k_anneal_steps=50)
    assert _warnings(activations, TOPK, run) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["make demo", "first SAE"])
def test_the_commands_of_the_readme_are_quiet(name: str) -> None:
    if name == "make demo":
        config = RunConfig.load(EXAMPLES / "demo.json")
    else:
        sae = SAEConfig(k=32, expansion_factor=8)
        config = RunConfig(sae=sae, train=TrainConfig(learning_rate=3e-3))
    run = replace(config.train, shard_dir=str(EXAMPLES / "activations"), max_steps=24)
    trainer = Trainer(config.sae, replace(run, eval_every=0), show_progress=False)
    trainer.train()
    assert trainer.summary["warnings"] == []


def test_a_short_run_is_not_judged(activations: torch.Tensor) -> None:
    assert _warnings(activations, TOPK, replace(RUN, max_steps=19, learning_rate=1e-9)) == []


def test_a_row_with_good_figures_gives_no_warning() -> None:
    assert _concluded(TOPK) == []


@pytest.mark.parametrize(
    ("sae", "figures", "parts"),
    [
        (TOPK, {"l0": 0.4}, ("L0 is 0.4", "lower --lr (now 0.01)")),
        (TOPK, {"heldout_l0": 1.0}, ("L0 is 1, and --k asks for 3", "--max-steps (now 60)")),
        (
            TOPK,
            {"loss": 9.5},
            ("the loss has not fallen: 9 at first, 9.5 at the end", "lower --lr"),
        ),
        (
            TOPK,
            {"silent_fraction": 0.125, "l0": 4.0},
            ("8 of 64 latents", "384 tokens (they count as dead after 10,000,000", "AuxK"),
        ),
        *(
            (
                SAEConfig(arch=arch, d_in=16, d_sae=64, target_l0=3),
                {"silent_fraction": 0.125, "l0": 4.0},
                ("8 of 64 latents", "raise --pre-act-loss-coeff (now 0.00016), or lower --lr"),
            )
            for arch in ("jumprelu", "gated")
        ),
        (TOPK, {"heldout_fvu": 1.3}, ("held-out FVU is 1.3, in training 0.3", "--heldout")),
        (
            TOPK,
            {"heldout_fvu": 0.01, "heldout_ordinary_fvu": 0.4},
            ("held-out FVU is 0.01, and 0.4 without the 1 % of rows",),
        ),
        (
            SAEConfig(arch="relu", d_in=16, d_sae=64, target_l0=16),
            {"l0": 40.0},
            ("L0 is 40, and --target-l0 asks for 16", "raise --l1-penalty-coeff (now 5)"),
        ),
        (
            SAEConfig(arch="jumprelu", d_in=16, d_sae=64, target_l0=16),
            {"l0": 5.0},
            ("L0 is 5, and --target-l0 asks for 16", "raise --lr (now 0.01), which thresholds"),
        ),
    ],
)
def test_each_fault_is_told_with_its_flags(
    sae: SAEConfig, figures: dict[str, float], parts: tuple[str, ...]
) -> None:
    text = _concluded(sae, **figures)[-1]
    for part in parts:
        assert part in text


def test_nothing_is_judged_while_a_warm_up_lasts() -> None:
    sae = SAEConfig(arch="relu", d_in=16, d_sae=64)
    run = replace(RUN, sparsity_warmup_steps=61)
    assert _concluded(sae, run, l0=0.1, fvu=1.0) == []


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("loss_fn", ["mse", "fvu"])
def test_equal_rows_are_told_and_leave_the_model_finite(
    arch: Any, loss_fn: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sae = SAEConfig(arch=arch, d_sae=32, loss_fn=loss_fn, normalize_activations="none")
    rows = torch.zeros(300, 8)
    run = replace(RUN, max_steps=3, log_every=1)
    trainer = Trainer(sae, run, rows, heldout=rows[:50], show_progress=False)
    with caplog.at_level(logging.WARNING, logger="sae_fast"):
        trainer.train()
    texts = [text.split(" is not defined")[0] for text in trainer.summary["warnings"]]
    assert texts == ["fvu", "heldout_fvu"]
    assert sum("is not defined" in record.message for record in caplog.records) == 2
    assert all(tensor.isfinite().all() for tensor in trainer.sae.state_dict().values())


def test_silence_is_counted_over_a_tenth_of_the_run_and_at_most_the_budget() -> None:
    assert silent_window(1000, 2000) == 200
    assert silent_window(100, 2000) == 50
    assert silent_window(0, 2000) == 1


def test_silence_in_which_a_latent_fires_but_few_times_on_average_is_no_warning() -> None:
    assert _concluded(TOPK, silent_fraction=0.5) == []  # 384 tokens, 18 firings each


def test_skipped_steps_are_in_rows_summary_and_warning(activations: torch.Tensor) -> None:
    trainer = Trainer(TOPK, replace(RUN, amp="fp16"), activations, show_progress=False)
    trainer.scaler.scale.fill_(2.0**126)
    before = trainer.sae.W_dec.clone()
    trainer.train()
    assert torch.equal(before, trainer.sae.W_dec)
    assert trainer.history[-1]["skipped_steps"] == trainer.summary["skipped_steps"] == 60
    assert trainer.summary["trained_tokens"] == 0
    (text,) = [text for text in trainer.summary["warnings"] if "skipped" in text]
    assert "60 of 60 steps were skipped because gradients overflowed in fp16" in text


def test_a_run_without_overflow_trained_on_all_its_tokens(activations: torch.Tensor) -> None:
    trainer = Trainer(TOPK, replace(RUN, amp="fp16"), activations, show_progress=False)
    trainer.train()
    assert trainer.summary["skipped_steps"] == 0
    assert trainer.summary["trained_tokens"] == trainer.summary["tokens"] == 60 * 64


def _logged(fvus: list[float], l0s: list[float] | None = None, **more: Any) -> list[dict[str, Any]]:
    """Return rows with these figures, 5 steps apart, of a run of 60 per 12 of them."""
    return [
        {"step": 5 * n, "tokens": 320 * n, **FIGURES, "loss": 9 / n, "fvu": fvu, "l0": l0, **more}
        for n, (fvu, l0) in enumerate(zip(fvus, l0s or [3.0] * len(fvus), strict=True), 1)
    ]


def _watched(
    rows: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, sae: SAEConfig = TOPK
) -> tuple[list[str], list[str]]:
    """Return what is logged while a run logs rows, and its warnings at the end."""
    run = replace(RUN, max_steps=5 * len(rows), sparsity_warmup_steps=None)
    health = RunHealth(sae, run, make_schedules(run, sae, 3000))
    with caplog.at_level(logging.WARNING, logger="sae_fast"):
        for row in rows:
            health.watch(row)
    told = [record.message for record in caplog.records]
    return told, health.conclude(rows)


FALLING = [1 / n for n in range(2, 12)]  # to 0.091


def test_an_error_that_rises_is_told_once_with_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    (told,), (warning,) = _watched(_logged([*FALLING, *[0.3] * 10]), caplog)
    assert "the reconstruction gets worse: FVU is " in told
    assert "and was 0.114 at step 50; lower --lr (now 0.01)" in warning


def test_an_error_that_rises_and_falls_again_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert _watched(_logged([*FALLING, 0.3, *[0.09] * 29]), caplog) == ([], [])


def test_an_error_that_rises_while_codes_become_sparse_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sae = SAEConfig(arch="relu", d_in=16, d_sae=64, target_l0=4)
    l0s = [64 * 0.75**n for n in range(10)] + [4.0] * 10
    fvus = [0.01 * 1.3**n for n in range(10)] + [0.12] * 10
    assert _watched(_logged(fvus, l0s), caplog, sae) == ([], [])


def test_an_error_above_the_one_of_the_mean_is_told_before_half_of_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (told,), _ = _watched(_logged([1.6] * 10 + [0.5] * 30), caplog)
    assert told.startswith("step 30: FVU is 1.6, and has been above 1 for a tenth of the run")
    assert "lower --lr (now 0.01)" in told


def test_heldout_rows_that_are_explained_worse_than_before_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = _logged([1 / n for n in range(2, 22)])
    for row, fvu in zip(rows[4::5], (0.2, 0.1, 0.16, 0.2), strict=True):
        row |= {"heldout_fvu": fvu, "heldout_l0": 3.0}
    _, (warning,) = _watched(rows, caplog)
    assert "held-out FVU is 0.2, and was 0.1 at step 50" in warning
