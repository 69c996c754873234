"""`train_from_model`: the command's run with a model and texts in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_network, make_tokenizer, save_model
from small_texts import make_texts

from sae_fast import Callback, LossTerm, RunConfig, Trainer, train_from_model
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.train import main
from sae_fast.training.metrics import Row

TEXTS = [text or "" for text in make_texts(60)]
FROM_MODEL = {"max_tokens": 256, "ctx_len": 16, "batch_size": 4, "heldout_tokens": 64}
CONFIG = RunConfig(k=4, expansion_factor=2, lr=1e-2, pool_rows=100, seed=3, shuffle_seed=5)


def _train(network: Any = None, texts: Any = None, **more: Any) -> dict[str, SparseAutoencoder]:
    settings = {"config": CONFIG, "show_progress": False, **FROM_MODEL, **more}
    network = make_network("gpt2") if network is None else network
    texts = TEXTS if texts is None else texts
    return train_from_model(network, make_tokenizer(causal=True), texts, **settings)


def test_it_gives_the_autoencoders_of_the_command(tmp_path: Path) -> None:
    save_model(tmp_path / "gpt2", "gpt2")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    flags = (
        *(str(tmp_path / "gpt2"), str(tmp_path / "texts.jsonl"), "--layers", "0", "2", "--k", "4"),
        *("--expansion_factor", "2", "--lr", "1e-2", "--pool_rows", "100", "--init_seeds", "3"),
        *("--shuffle_seed", "5", "--save_dir", str(tmp_path), "--run_name", "run"),
        *(word for name, value in FROM_MODEL.items() for word in (f"--{name}", str(value))),
    )
    assert main(flags) == 0
    found = _train(layers=[0, 2], directory=tmp_path / "own")
    assert list(found) == ["residual.0", "residual.2"]
    for name, sae in found.items():
        checkpoint = f"{name}/checkpoints/latest"
        for place in ("run", "own"):
            saved = SparseAutoencoder.from_pretrained(tmp_path / place / checkpoint).state_dict()
            state = sae.state_dict()
            assert [key for key in state if not torch.equal(state[key], saved[key])] == []
        assert sae.origin["hook"] == name
        assert sae.origin["tokenizer"].startswith("sha256:")
        assert sae.origin["settings"]["ctx_len"] == 16


def test_the_model_is_left_as_it_was() -> None:
    network = make_network("gpt2").train()
    network.lm_head.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    needed = [parameter.requires_grad for parameter in network.parameters()]
    config = RunConfig(k=4, expansion_factor=2, lr=1e-2, loss_fn="kl")
    _train(network, config=config, layers=(1,), heldout_tokens=0)
    assert network.training
    assert needed == [parameter.requires_grad for parameter in network.parameters()]
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_one_layer_or_hook_point_stands_by_itself() -> None:
    assert list(_train(layers=1)) == ["residual.1"]
    assert list(_train(hook_points="mlp_out.2")) == ["mlp_out.2"]
    assert list(_train(layers=1, init_seeds=3)) == ["residual.1"]


class Watcher(Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.steps.append((trainer.sae.origin["hook"], trainer.step))
        if trainer.step == 2:
            trainer.stop()


@pytest.mark.parametrize("loss_fn", ["mse", "kl"])
def test_loss_terms_and_callbacks_are_of_every_layer(loss_fn: str, tmp_path: Path) -> None:
    watcher = Watcher()
    terms = [LossTerm("square", lambda sae, batch, code, x_hat: x_hat.square().mean(), 0.5)]
    config = RunConfig(k=4, expansion_factor=2, lr=1e-2, loss_fn=loss_fn, log_every=1)
    own = {"loss_terms": terms, "callbacks": [watcher], "directory": tmp_path}
    _train(config=config, layers=[0, 1], **own)
    assert watcher.steps == [(f"residual.{layer}", step) for step in (1, 2) for layer in (0, 1)]
    rows = (tmp_path / "residual.1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["square"] > 0 for row in rows] == [True, True]


def test_without_a_configuration_the_defaults_are_those_of_the_command() -> None:
    (sae,) = _train(config=None).values()
    assert (sae.config.k, sae.config.d_sae) == (192, 32 * 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _train(torch.nn.Linear(2, 2)), "model must be a transformers model .* got Linear"),
        (lambda: train_from_model(make_network("gpt2"), None, TEXTS), "tokenizer must be"),
        (lambda: _train(texts=["a", 3]), "texts must be strings, text 1 is int"),
        (lambda: _train(texts=[]), "texts has no documents"),
        (lambda: _train(layer=3), "unknown key 'layer' .did you mean 'layers'"),
        (lambda: _train(run_name="a"), "unknown key 'run_name'"),
        (lambda: _train(layers=[7]), "layers: GPT2LMHeadModel has blocks 0 to 2, got 7"),
        (lambda: _train(config=RunConfig(k=4, shard_dir="a")), "shard_dir = 'a' is for training"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
