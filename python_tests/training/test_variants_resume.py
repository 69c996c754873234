"""Every variant of TopK, stopped and resumed, equals an uninterrupted run, to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=64, k=4, dead_after_tokens=500)
RUN = TrainConfig(
    batch_size=64,
    max_steps=24,
    learning_rate=3e-3,
    pool_rows=700,
    log_every=1,
    eval_every=8,
    checkpoint_every=5,
)
TIMES = ("tokens_per_second", "time_per_step_ms", "reader_stall_fraction")
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "active_subspace": ({"decoder_init": "active_subspace", "b_dec_init": "mean"}, {}),
    "annealed k": ({}, {"k_anneal_start": 30, "k_anneal_steps": 14}),
    "chunked_max": (
        {"decorrelation": "chunked_max", "decorrelation_coeff": 1.0, "decorrelation_chunk": 10},
        {"grad_acc_steps": 2},
    ),
    "multi_topk": ({"multi_topk": True}, {}),
    "abs_topk": ({"activation": "abs_topk"}, {"grad_acc_steps": 2}),
    "groupmax": ({"activation": "groupmax"}, {}),
    "matryoshka": ({"arch": "matryoshka"}, {"grad_acc_steps": 2}),
}


def _train(sae: SAEConfig, run: TrainConfig, until: int | None = None) -> Trainer:
    """Train to the end, or to step `until` with a checkpoint as after a signal."""
    with Trainer(sae, run, show_progress=False) as trainer:
        while trainer.step < (until or trainer.total_steps):
            trainer.advance()
    return trainer


def _final(directory: Path) -> dict[str, torch.Tensor]:
    latest = directory / "checkpoints" / "latest"
    return load_file(latest / "sae.safetensors") | load_file(latest / "trainer.safetensors")


def _reproducible(trainer: Trainer) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name not in TIMES} for row in trainer.history]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_runs_end_bit_equal(variant: str, shard_dir: Path, tmp_path: Path) -> None:
    model, training = VARIANTS[variant]
    sae = replace(SAE, **model)
    run = replace(RUN, shard_dir=str(shard_dir), **training)
    straight = _train(sae, replace(run, checkpoint_dir=str(tmp_path / "straight")))
    run = replace(run, checkpoint_dir=str(tmp_path / "stopped"))
    for step in (3, 11):
        _train(sae, run, until=step)
        run = replace(run, resume_from="latest")
    resumed = _train(sae, run)
    expected, final = _final(tmp_path / "straight"), _final(tmp_path / "stopped")
    assert final.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(final[name], expected[name])] == []
    assert _reproducible(resumed) == _reproducible(straight)
