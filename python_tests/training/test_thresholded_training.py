"""Training relu, jumprelu and gated: updates, resuming, and the log."""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_sae import make_batch
from plain_thresholded import PATHS, go, make_thresholded, plain_terms
from safetensors.torch import load_file

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.ops import DenseCode
from sae_fast.training.launcher import explain_no_graph
from sae_fast.training.optimizer.loss_scaler import LossScaler
from sae_fast.training.optimizer.row_optimizer import (
    DenseOptimizer,
    RowOptimizer,
    SparseOptimizer,
)
from sae_fast.training.step import TrainingStep
from sae_fast.training.trainer import Trainer

MODELS: dict[str, dict[str, Any]] = {
    "relu": {"arch": "relu", "l1_penalty_coeff": 0.5},
    "relu, unit rows": {"arch": "relu", "decoder_norm": "unit", "l1_penalty_coeff": 0.5},
    "jumprelu": {"arch": "jumprelu", "jumprelu_threshold_lr": 3.0, "target_l0": 4.0},
    "gated": {"arch": "gated", "l1_penalty_coeff": 0.5},
}
RUN = TrainConfig(batch_size=64, max_steps=40, learning_rate=1e-2, log_every=5, eval_every=0)
SETTINGS: dict[str, Any] = {"eps": 1e-5, "weight_decay": 0.01, "grad_clip": 0.5}


@pytest.fixture(params=MODELS, name="fields")
def make_fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODELS[request.param]


def plain_step(sae: SparseAutoencoder, adam: torch.optim.AdamW, x: torch.Tensor, lr: float) -> None:
    """Take a step of torch.optim.AdamW on autograd's gradients, with clip and projection."""
    adam.zero_grad()
    sum(plain_terms(sae, x).values()).backward()
    unit_norm, W_dec = sae.architecture.unit_norm, sae.W_dec
    if unit_norm:
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
    torch.nn.utils.clip_grad_norm_(sae.parameters(), SETTINGS["grad_clip"])
    for (name, _), group in zip(sae.named_parameters(), adam.param_groups, strict=True):
        group["lr"] = lr * sae.architecture.learning_rates().get(name, 1.0)
    adam.step()
    with torch.no_grad():
        if unit_norm:
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        sae.clamp_parameters_()


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
@pytest.mark.parametrize("path", [*PATHS, "both"])
def test_steps_equal_those_of_pytorch_for_every_parameter(
    fields: dict[str, Any], kind: type[SparseOptimizer], path: str
) -> None:
    sae = make_thresholded(**fields)
    other = copy.deepcopy(sae)
    optimizer = kind(sae, **SETTINGS)
    groups = [{"params": [parameter]} for parameter in other.parameters()]
    adam = torch.optim.AdamW(groups, eps=SETTINGS["eps"], weight_decay=SETTINGS["weight_decay"])
    for step in range(6):
        x = make_batch(sae, 40, seed=step)
        go(sae, PATHS[step % 2] if path == "both" else path)
        optimizer.zero_grad()
        sae.training_loss(x, dense_grad=kind.dense_grad).total.backward()
        optimizer.step(1e-2)
        sae.clamp_parameters_()
        plain_step(other, adam, x, 1e-2)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(
            parameter, other.get_parameter(name), rtol=1e-4, atol=2e-6, msg=lambda m, n=name: n + m
        )


def test_micro_batches_of_both_ways_make_one_step(fields: dict[str, Any]) -> None:
    sae = make_thresholded(**fields)
    other = copy.deepcopy(sae)
    batches = [make_batch(sae, 40, seed=seed) for seed in (1, 2)]
    for model, paths in ((sae, PATHS), (other, ("sparse", "sparse"))):
        optimizer = RowOptimizer(model, **SETTINGS)
        for x, path in zip(batches, paths, strict=True):
            go(model, path)
            model.training_loss(x, dense_grad=False).total.backward()
        optimizer.step(1e-2)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-4, atol=2e-6)


def make_trainer(shards: Path, directory: Path, fields: dict[str, Any], **run: Any) -> Trainer:
    config = SAEConfig(**{"d_sae": 64, "dead_after_tokens": 500, **fields})
    train = replace(RUN, shard_dir=str(shards), checkpoint_dir=str(directory), **run)
    return Trainer(config, train, show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 7, 33])
def test_resumed_run_equals_a_straight_one_to_the_bit(
    shard_dir: Path, tmp_path: Path, fields: dict[str, Any], stop: int
) -> None:
    finals = []
    for steps in ((40,), (stop, 40)):
        directory = tmp_path / str(len(steps))
        for number, max_steps in enumerate(steps):
            trainer = make_trainer(
                shard_dir,
                directory,
                {"target_l0": 6.0, **fields},
                max_steps=max_steps,
                resume_from="latest" if number else None,
                warmup_steps=2,
                sparsity_warmup_steps=5,
                decay_fraction=0.0,
            )
            trainer.train()
        latest = directory / "checkpoints" / "latest"
        finals.append(load_file(latest / "sae.safetensors"))
        finals[-1] |= load_file(latest / "trainer.safetensors")
    straight, resumed = finals
    assert straight.keys() == resumed.keys()
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []


@pytest.mark.slow
def test_run_begins_on_all_latents_and_ends_on_few(
    activations: torch.Tensor, fields: dict[str, Any]
) -> None:
    few = {"d_sae": 128, "target_l0": 4.0, **fields}
    run = replace(RUN, max_steps=300, sparsity_warmup_steps=0)
    trainer = Trainer(SAEConfig(**few), run, activations, show_progress=False)
    assert isinstance(trainer.sae.training_loss(activations[:64]).code, DenseCode)
    trainer.train()
    assert not isinstance(trainer.sae.training_loss(activations[:64]).code, DenseCode)
    assert trainer.history[-1]["fvu"] < 0.7
    assert 2.5 < trainer.history[-1]["l0"] < 5


def test_gpu_run_without_a_graph_is_told(
    fields: dict[str, Any],
) -> None:
    sae = make_thresholded(**fields)
    step = TrainingStep(sae, RowOptimizer(sae), LossScaler(enabled=False), "screened")
    assert str(explain_no_graph(step)).startswith(f"arch {fields['arch']}: the host waits")


@pytest.mark.parametrize("changed", [1, 2])
def test_resuming_with_other_threads_is_told_since_dense_products_follow_them(
    shard_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: int
) -> None:
    make_trainer(shard_dir, tmp_path, MODELS["relu"], max_steps=1, num_threads=1).train()
    with caplog.at_level(logging.WARNING, logger="sae_fast"):
        make_trainer(
            shard_dir,
            tmp_path,
            MODELS["relu"],
            max_steps=1,
            num_threads=changed,
            resume_from="latest",
        )
    assert ("num_threads 1 -> 2" in caplog.text) == (changed == 2)
