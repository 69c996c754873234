"""The moving average of the weights: its values, its evaluation, its files in a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_sae import make_batch, make_sae
from safetensors.torch import load_file

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.evaluation.metrics import evaluate
from sae_fast.training.optimizer.weight_average import WeightAverage
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=64, k=3)
RUN = TrainConfig(
    batch_size=64,
    max_steps=24,
    learning_rate=1e-2,
    eval_every=8,
    average_decay=0.8,
    keep_checkpoints=9,
)


def test_average_follows_its_formula():
    sae, step_count = make_sae(), torch.zeros((), dtype=torch.int64)
    average = WeightAverage(sae, 0.5, step_count)
    expected = {name: p.detach().double().clone() for name, p in sae.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 8):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, parameter in sae.named_parameters():
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
        step_count.fill_(step)
        average.update()
    for name, tensor in average.state_dict().items():
        exact = expected[name.removeprefix("average.")]
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-5, atol=1e-6)


def test_averaged_model_has_unit_rows_and_leaves_the_model_alone():
    sae = make_sae()
    average = WeightAverage(sae, 0.9, torch.ones((), dtype=torch.int64))
    with torch.no_grad():
        sae.W_dec.neg_()
    average.update()
    before = sae.W_dec.detach().clone()
    averaged = average.model()
    torch.testing.assert_close(averaged.W_dec.norm(dim=1), torch.ones(sae.config.d_sae))
    assert torch.equal(sae.W_dec, before)
    assert not torch.equal(averaged(make_batch(sae)), sae(make_batch(sae)))


def test_run_evaluates_and_saves_the_average(shard_dir: Path, tmp_path: Path) -> None:
    run = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(tmp_path / "run"))
    trainer = Trainer(SAE, run, show_progress=False)
    trainer.train()
    saved = SparseAutoencoder.from_pretrained(tmp_path / "run" / "averaged")
    assert trainer.data.heldout is not None
    measured = evaluate(saved, trainer.data.heldout)["heldout_fvu"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["averaged_heldout_fvu"] == pytest.approx(measured, rel=1e-6)
    assert last["averaged_heldout_fvu"] != last["heldout_fvu"]


def test_resumed_average_equals_an_uninterrupted_one(shard_dir: Path, tmp_path: Path) -> None:
    def train(name: str, **changes: object) -> dict[str, torch.Tensor]:
        run = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(tmp_path / name), **changes)
        Trainer(SAE, run, show_progress=False).train()
        return load_file(tmp_path / name / "averaged" / "sae.safetensors")

    straight = train("straight", checkpoint_every=10)
    train("resumed", checkpoint_every=10)
    resumed = train(
        "resumed", resume_from=str(tmp_path / "resumed" / "checkpoints" / "step-00000010")
    )
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_decay_of_one_is_refused():
    with pytest.raises(ValueError, match="average_decay must be from 0 to below 1, got 1"):
        TrainConfig(average_decay=1.0)
