"""Trains a sweep of small models as one of several processes, or alone, and saves what it saw.

Run by test_ranks_layers.py: `main(DIRECTORY)`, with the variables of a launcher.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from several_ranks import error_of
from small_models import make_tokenizer
from small_texts import make_texts
from torch import Tensor

from sae_fast import Callback, RunConfig
from sae_fast.activations.capture import Documents, HookedModel
from sae_fast.activations.capture.language_model import loaded_language_model
from sae_fast.config.model_text import FromModelConfig
from sae_fast.distributed.environment import launched
from sae_fast.train import main as main_of_train
from sae_fast.training import run_directory
from sae_fast.training.from_model import open_from_model
from sae_fast.training.from_model.loaded_model import train_from_model
from sae_fast.training.sweep import Sweep
from sae_fast.training.trainer import Trainer

LAYERS = 3
FLAGS = "--d-sae 32 --k 2 --max-steps 6 --batch-size 16 --checkpoint-every 2 --keep-checkpoints 1"
TEXT = {"layers": [0, 1, 2], "ctx_len": 16, "batch_size": 2, "max_tokens": 256}
TEXT["heldout_tokens"] = 0
LOSSES = ("ce", "kl")  # of the model itself


def command(directory: Path, out: str, *flags: str) -> tuple[int, str]:
    """Run the command of training on the layers in a directory; return its code and its errors."""
    printed = io.StringIO()
    arguments = ["--shard-dir", str(directory / "shards"), *FLAGS.split(), *flags]
    with contextlib.redirect_stderr(printed):
        code = main_of_train([*arguments, "--checkpoint-dir", str(directory / out)])
    return code, printed.getvalue()


def from_model(directory: Path, network: torch.nn.Module, **train: Any) -> None:
    """Train on the layers of a model."""
    config = RunConfig(d_sae=32, k=2, lr=1e-2, eval_every=0, **train)
    given = (network, make_tokenizer(True), [text for text in make_texts() if text], config)
    train_from_model(*given, directory=directory, show_progress=False, **TEXT)


def opened_from_model(
    network: torch.nn.Module,
    directory: Path,
    callbacks: Sequence[Callback] = (),
    *,
    normalizations: Sequence[str] = ("none", "mean_scale"),
    **train: Any,
) -> Sweep:
    """Return a training for each normalisation on one layer of a model; only one looks at rows."""
    texts = [text for text in make_texts() if text]
    settings = FromModelConfig(
        layers=(1,), ctx_len=16, batch_size=2, max_tokens=224, heldout_tokens=40
    )
    given = {
        name: RunConfig(
            **{"d_sae": 32, "k": 2, "lr": 1e-2, "eval_every": 3, "checkpoint_every": 2, **train},
            pool_rows=48,
            normalize_activations=name,
        )
        for name in normalizations
    }
    network.eval().requires_grad_(False)
    return open_from_model(
        loaded_language_model(network, make_tokenizer(True)),
        Documents(texts, "texts", 0),
        settings,
        given,
        directory,
        callbacks=callbacks,
        show_progress=False,
    )


@contextlib.contextmanager
def counted_tokens() -> Iterator[list[int]]:
    """Count the tokens of each pass of the model in this context, but for trials with one."""
    found: list[int] = []
    run = HookedModel.activations

    def counted(self: HookedModel, tokens: Tensor, *others: Any, **given: Any) -> dict[str, Tensor]:
        if tokens.numel() > 1:
            found.append(tokens.numel())
        return run(self, tokens, *others, **given)

    with patch.object(HookedModel, "activations", counted):
        yield found


def dying_in_a_pass() -> Any:
    """End this process by a signal, in this context, when the model begins its next pass."""
    return patch.object(HookedModel, "activations", lambda *_, **__: os.kill(os.getpid(), 9))


def configs(directory: Path, **train: Any) -> dict[str, RunConfig]:
    """Return two trainings on the first layer."""
    given = {"d_sae": 32, "k": 2, "max_steps": 6, "batch_size": 16, "checkpoint_every": 2}
    given |= {"shard_dir": str(directory / "shards/layer_0"), **train}
    out = train.get("checkpoint_dir")
    return {
        name: RunConfig(
            **{**given, "seed": seed, "checkpoint_dir": f"{out}/{name}" if out else None},
            shuffle_seed=0,
        )
        for seed, name in enumerate(("first", "second"))
    }


def slots(directory: Path, out: str, **train: Any) -> None:
    """Train two models with relation slots on the first layer."""
    given = {"d_sae": 32, "n_relations": 2, "max_steps": 4, "batch_size": 16, **train}
    given |= {"arch": "slots", "slots_mode": "separate_activation"}
    given |= {"shard_dir": str(directory / "shards/layer_0"), "shuffle_seed": 0}
    trainings = {
        name: RunConfig(**given, seed=seed, checkpoint_dir=str(directory / out / name))
        for seed, name in enumerate(("first", "second"))
    }
    Sweep(trainings, show_progress=False).train()


def in_model(directory: Path, **train: Any) -> list[dict[str, float]]:
    """Train on a layer; return what the language model loses with the reconstructions."""
    text = {"eval_dataset": str(directory / "text.txt"), "eval_tokens": 64}
    text |= {"eval_model": str(directory / "model"), "eval_hook": "residual.1"}
    given = {"eval_every": 3, "eval_metrics": 1, "log_every": 1, "lr": 1e-2, **text, **train}
    trainer = Trainer(configs(directory, **given)["first"], show_progress=False)
    trainer.train()
    return [
        {name: value for name, value in row.items() if name.startswith("heldout_")}
        for row in trainer.history
    ]


class Signal(Callback):
    """Sends a signal to this process after a step, if it is rank 1."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Send it."""
        if trainer.step == self.step and launched().rank == 1:
            os.kill(os.getpid(), self.number)


def main(directory: Path) -> None:
    """Do what the test looks at, as rank 0 or 1 of two."""
    rank = launched().rank
    network = torch.load(directory / "network.pt", weights_only=False)
    run_directory.plot_run = lambda rows, path, title: path  # it takes longer than the trainings
    mesh = {"mesh": "layers=2", "mesh_timeout": 1.0}
    found: dict[str, Any] = {"trained": command(directory, "two", "--mesh", "layers=2")}
    with counted_tokens() as found["tokens"]:
        from_model(directory / "two-of-model", network, **mesh)
    out = directory / "two-of-text"
    stop = [Signal(3, signal.SIGTERM)]
    opened_from_model(network, out, stop, **mesh).train()
    again = opened_from_model(network, out, resume_from="latest", **mesh)
    found["goes on"] = [trainer.step for trainer in again.trainers.values()]
    again.train()
    one = {"normalizations": ["mean_scale"], "mesh_timeout": 1.0}
    out = directory / "data-of-text"
    opened_from_model(network, out, [Signal(2, signal.SIGTERM)], mesh="data=2", **one).train()
    again = opened_from_model(network, out, mesh="data=2", resume_from="latest", **one)
    found["data goes on"] = [trainer.step for trainer in again.trainers.values()]
    again.train()
    with counted_tokens() as found["tokens of one"]:
        opened_from_model(network, directory / "latents-of-text", mesh="latents=2", **one).train()
    for loss_fn in LOSSES:
        from_model(directory / f"two-of-model-{loss_fn}", network, loss_fn=loss_fn, **mesh)
    slots(directory, "two-slots", **mesh)
    found["in model"] = in_model(directory, mesh="latents=2", mesh_timeout=1.0)
    out = str(directory / "stopped")
    own = configs(directory, checkpoint_dir=out, **mesh)
    stopped = Sweep(own, callbacks=[Signal(3, signal.SIGTERM)], show_progress=False)
    stopped.train()
    found["trainings"] = list(stopped.trainers)
    found["stopped"] = [trainer.step for trainer in stopped.trainers.values()]
    own = configs(directory, checkpoint_dir=out, resume_from="latest", **mesh)
    again = Sweep(own, show_progress=False)
    found["continued"] = [trainer.step for trainer in again.trainers.values()]
    again.train()
    found["data"] = command(directory, "none", "--mesh", "data=2")
    found["one"] = error_of(lambda: Trainer(configs(directory, **mesh)["first"]))
    first = {"first": configs(directory, **mesh)["first"]}
    found["few"] = error_of(lambda: Sweep(first))
    other = configs(directory, **mesh, lr=1e-2 + rank * 1e-3)
    found["settings"] = error_of(lambda: Sweep(other))
    several = {"mesh": "data=2", "mesh_timeout": 1.0}
    found["several"] = error_of(lambda: opened_from_model(network, out, **several))
    if rank == 1:
        shutil.move(directory / "shards/layer_2", directory / "away")
    found["gone"] = error_of(
        lambda: Sweep(
            {
                f"layer_{number}": RunConfig(
                    **{"d_sae": 32, "k": 2, "max_steps": 2, "batch_size": 16, **mesh},
                    shard_dir=str(directory / f"shards/layer_{number}"),
                )
                for number in (0, 2)
            }
        )
    )
    torch.save(found, directory / f"rank-{rank}.pt")
    few = {"normalizations": ("none", "layer_norm")}  # which look at few rows before
    killed = opened_from_model(network, directory / "killed", **few, **mesh)
    with dying_in_a_pass() if rank == 1 else contextlib.nullcontext():
        found["killed"] = error_of(killed.train)
    torch.save(found, directory / f"rank-{rank}.pt")
