"""Trains small models whose latents two processes divide, or one process alone.

Run by test_ranks_latents.py: `main(DIRECTORY)`, with the variables of a launcher.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from several_ranks import error_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_fast import Callback, SAEConfig, TrainConfig, Trainer
from sae_fast.distributed.environment import launched
from sae_fast.training import run_directory

STEPS = 8
MANY = 20_001  # latents, more than are drawn at a time
_SAE = {"d_sae": 67}  # which two processes cannot divide evenly
_TOPK = {**_SAE, "k": 4, "dead_after_tokens": 32, "aux_k_coeff": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "topk": {**_TOPK, "loss_fn": "fvu"},
    "few dead": {**_TOPK, "aux_k": 3},
    "multi_topk": {**_TOPK, "multi_topk": True, "l1_penalty_coeff": 0.1},
    "batch_topk": {**_TOPK, "arch": "batch_topk"},
    "matryoshka": {**_TOPK, "arch": "matryoshka", "matryoshka_prefixes": (16, 40, 67)},
    "relu": {**_SAE, "arch": "relu", "target_l0": 6.0, "l1_penalty_coeff": 5.0},
    "jumprelu": {
        **{**_SAE, "arch": "jumprelu", "target_l0": 6.0, "sparsity_penalty": "l0_target"},
        **{"jumprelu_bandwidth": 0.5, "dead_after_tokens": 32},
    },
    "gated": {**_SAE, "arch": "gated", "target_l0": 6.0, "l1_penalty_coeff": 5.0},
}
PARTS = ("topk", "jumprelu")  # trained with grad_acc_steps


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an op, and look at what is in memory of its own."""
        found = func(*args, **(kwargs or {}))
        given = {_memory(each) for each in tree_leaves((args, kwargs))}
        for each in tree_leaves(found):
            if _memory(each) not in {*given, None}:
                self.numbers = max(self.numbers, each.numel())
        return found


def _memory(value: object) -> int | None:
    """Return where the numbers of a tensor are; None for a value that has none."""
    has_numbers = isinstance(value, torch.Tensor) and value.device.type != "meta"
    return value.untyped_storage().data_ptr() if has_numbers else None


class At(Callback):
    """Does something in this process after a step, if it has this rank, or is the last."""

    def __init__(self, step: int, do: Callable[[Trainer], object], rank: int | None = None) -> None:
        self.step, self.do = step, do
        self.rank = launched().size - 1 if rank is None else rank

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Do it."""
        if trainer.step == self.step and launched().rank == self.rank:
            self.do(trainer)


def stop(trainer: Trainer) -> None:
    """Send the signal that ends a training after its step."""
    os.kill(os.getpid(), signal.SIGTERM)


@torch.no_grad()
def spoil(trainer: Trainer) -> None:
    """Put a NaN into the latents of this process."""
    trainer.sae.W_enc[0, 0] = torch.nan


def hang(trainer: Trainer) -> None:
    """Let this process do nothing until it is killed."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fill_disk(trainer: Trainer) -> None:
    """Let this process write small files only."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def trainer_of(
    case: str, directory: Path | None, callbacks: Sequence[Callback] = (), **settings: Any
) -> Trainer:
    """Return the training of a case, by one process or by two that divide its latents."""
    given = {"lr": 1e-2, "batch_size": 16, "max_steps": STEPS, "log_every": 1, "eval_every": 4}
    given["grad_acc_steps"] = 2 if case in PARTS else 1
    given["checkpoint_dir"] = None if directory is None else str(directory)
    if launched().size > 1:
        given |= {"mesh": "latents=2", "mesh_timeout": 0.4}
    sae = CASES[case] | settings.pop("sae", {})
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    config = SAEConfig(**sae), TrainConfig(**given | settings)
    return Trainer(*config, x, heldout=x[:100], callbacks=callbacks, show_progress=False)


def main(directory: Path) -> None:
    """Do what the test looks at, as one of two processes."""
    run_directory.plot_run = lambda rows, path, title: path  # it takes longer than the trainings
    found: dict[str, Any] = {"history": {}, "shapes": {}}
    ranks = None
    for case in CASES:
        trainer = trainer_of(case, directory / "two" / case)
        trainer.train()
        found["history"][case] = trainer.history
        found["shapes"][case] = tuple(trainer.sae.W_enc.shape)
        found["checkpoint"] = trainer.summary.get("checkpoint")
        ranks = trainer.ranks
    assert ranks is not None
    x = torch.randn(2, 5001, 3, generator=torch.Generator().manual_seed(1))  # no even parts
    found["sums"] = x[0] + x[1], ranks.sum_in_order(x[ranks.rank])
    trainer_of("topk", directory / "stopped", [At(4, stop)]).train()
    ranks.values(None)  # the test looks at what the first has written
    again = trainer_of("topk", directory / "stopped", resume_from="latest")
    found["continues"] = again.step
    again.train()
    half = str(directory / "half" / "checkpoints" / "latest")
    trainer_of("topk", directory / "from one", resume_from=half).train()
    trainer_of("topk", directory / "two started", start_from=half).train()
    found["largest"] = {}
    for name, settings in {"new": {}, "started": {"start_from": str(directory / "many")}}.items():
        with Largest() as largest:
            trainer_of("topk", None, sae={"d_sae": MANY}, grad_acc_steps=1, **settings)
        found["largest"][name] = largest.numbers
    found["refused"] = {
        name: error_of(lambda settings=settings: trainer_of("topk", None, **settings))
        for name, settings in {
            "amp": {"amp": "bf16"},
            "average_decay": {"average_decay": 0.9},
            "than there are latents, 1": {"sae": {"d_sae": 1, "k": 1}},
            "does not divide a training with activation": {"sae": {"activation": "abs_topk"}},
        }.items()
    }
    found["spoilt"] = error_of(trainer_of("topk", None, [At(3, spoil)]).train)
    full = trainer_of("topk", directory / "full", [At(3, fill_disk)], checkpoint_every=2)
    found["full disk"] = error_of(full.train)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    torch.save(found, directory / f"rank-{ranks.rank}.pt")
    hung = trainer_of("topk", None, [At(3, hang)])
    numbers = hung.ranks.values(os.getpid())
    found["hung"] = error_of(hung.train)
    torch.save(found, directory / f"rank-{ranks.rank}.pt")
    os.kill(numbers[1], signal.SIGKILL)
