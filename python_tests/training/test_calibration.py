"""A run ends with the L0 that was asked for, in training and on held-out rows."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast import SAEConfig, SparseAutoencoder, TrainConfig, Trainer
from sae_fast.activations import Rows
from sae_fast.training.trainer import TrainingError

L0 = 6
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "batch_topk": {"k": L0},
    "matryoshka": {"k": L0, "matryoshka_prefixes": (64, 256)},
    "jumprelu": {"target_l0": float(L0)},
    "gated": {"target_l0": float(L0)},
    "relu": {"target_l0": float(L0)},
}


@pytest.fixture(scope="module", name="rows")
def sparse_sums() -> torch.Tensor:
    """Return rows [4000, 32], sums of about 6 of 128 directions, some of them ten times as long."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(128, 32, generator=generator), dim=1)
    is_on = torch.rand(4000, 128, generator=generator) < 6 / 128
    rows = (is_on * torch.rand(4000, 128, generator=generator)) @ directions
    return torch.where(torch.rand(4000, 1, generator=generator) < 0.02, 10 * rows, rows)


def _trained(rows: torch.Tensor, arch: str, heldout: torch.Tensor, **train: Any) -> Trainer:
    sae = SAEConfig(arch=arch, d_sae=256, **ARCHITECTURES[arch])  # type: ignore[arg-type]
    settings = {"lr": 3e-3, "batch_size": 256, "max_steps": 300, "log_every": 5, "eval_every": 0}
    run = TrainConfig(**{**settings, **train})
    trainer = Trainer(sae, run, rows, heldout=heldout, show_progress=False)
    trainer.train()
    return trainer


@pytest.mark.parametrize("arch", ["jumprelu", "gated", "relu"])
def test_training_reaches_its_target_without_loss_of_latents(arch: str, rows: torch.Tensor) -> None:
    trainer = _trained(rows[500:], arch, rows[:500])
    l0s = [row["l0"] for row in trainer.history[-8:]]
    assert sum(l0s) / len(l0s) == pytest.approx(L0, rel=0.05)
    assert trainer.summary["final_heldout_l0"] == pytest.approx(L0, rel=0.05)
    assert trainer.summary["final_heldout_dead_fraction"] < 0.1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_rows_than_the_few_of_training_have_the_l0_too(
    arch: str, rows: torch.Tensor, tmp_path: Path
) -> None:
    trainer = _trained(rows[500:800], arch, rows[:500], max_steps=40, checkpoint_dir=str(tmp_path))
    assert trainer.summary["final_heldout_l0"] == pytest.approx(L0, rel=0.05)
    saved = SparseAutoencoder.from_pretrained(tmp_path)
    assert float(saved.encode(rows[:500]).l0().float().mean()) == pytest.approx(L0, rel=0.05)


def test_nothing_is_set_without_heldout_rows_or_a_wanted_l0(rows: torch.Tensor) -> None:
    plain = SAEConfig(arch="jumprelu", d_sae=256, sparsity_penalty="l0")
    run = TrainConfig(batch_size=256, max_steps=2, eval_every=0)
    with_rows = Trainer(plain, run, rows[500:], heldout=rows[:500], show_progress=False).train()
    without = Trainer(plain, run, rows[500:], show_progress=False).train()
    assert torch.equal(with_rows.get_parameter("threshold"), without.get_parameter("threshold"))


@pytest.mark.parametrize("value", [math.nan, 1e19], ids=["loss", "norm"])
@pytest.mark.parametrize("arch", ["jumprelu", "gated", "relu"])
def test_a_bad_step_moves_no_threshold(arch: str, value: float, rows: torch.Tensor) -> None:
    sae = SAEConfig(
        arch=arch,  # type: ignore[arg-type]
        d_sae=256,
        normalize_activations="none",
        **ARCHITECTURES[arch],
    )
    run = TrainConfig(batch_size=100, max_steps=4, eval_every=0, warmup_steps=0)
    trainer = Trainer(sae, run, rows[:400], show_progress=False)
    serve = trainer.source.next_rows
    before: dict[str, torch.Tensor] = {}

    def poisoned() -> Rows:
        served = serve()
        if trainer.step == 2:
            before.update((name, v.clone()) for name, v in trainer.sae.named_parameters())
            served.x[5, 2] = value
        return served

    trainer.source.next_rows = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="step 3"):
        trainer.train()
    assert all(torch.equal(before[name], v) for name, v in trainer.sae.named_parameters())
