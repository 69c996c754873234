"""Trains small models of every architecture, as one of several ranks or alone, and saves them.

Run by test_ranks.py: `main(DIRECTORY)`, with the variables of a launcher.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from several_ranks import error_of
from torch import Tensor

from sae_fast import Callback, SAEConfig, TrainConfig, Trainer, ops
from sae_fast.distributed.environment import launched
from sae_fast.distributed.ranks import PendingGather, Ranks

ROWS, WIDTH, PARTS = 600, 16, 2
_SAE = {"d_sae": 64}
_TOPK = {**_SAE, "k": 2, "dead_after_tokens": 32}
# The settings of the model and of the training, by the name of the case.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk": ({**_TOPK, "aux_k_coeff": 0.5, "loss_fn": "fvu"}, {"average_decay": 0.9}),
    "multi_topk": ({**_TOPK, "multi_topk": True}, {"optimizer_states": "8bit"}),
    "abs_topk": ({**_TOPK, "activation": "abs_topk"}, {"amp": "bf16"}),
    "groupmax": ({**_TOPK, "activation": "groupmax"}, {"amp": "fp16"}),
    "decorrelated": (
        {**_TOPK, "decorrelation_coeff": 0.1},
        {"optimizer": "schedule_free_signum", "grad_acc_steps": 2},
    ),
    "transcoder": ({**_TOPK, "transcoder": True, "skip_connection": True}, {}),
    "batch_topk": ({**_TOPK, "arch": "batch_topk"}, {"grad_acc_steps": 2}),
    "matryoshka": ({**_TOPK, "arch": "matryoshka", "matryoshka_prefixes": (16, 64)}, {}),
    "relu": ({**_SAE, "arch": "relu", "target_l0": 6.0, "l1_penalty_coeff": 5.0}, {}),
    "jumprelu": (
        {
            **_SAE,
            **{"arch": "jumprelu", "target_l0": 6.0, "sparsity_penalty": "l0_target"},
            **{"jumprelu_bandwidth": 0.5, "dead_after_tokens": 32},
        },
        {"grad_acc_steps": 2, "max_steps": 12},
    ),
    "gated": ({**_SAE, "arch": "gated", "target_l0": 6.0, "l1_penalty_coeff": 5.0}, {}),
    "probe": ({**_TOPK, "probe_loss_coeff": 1.0, "probe_labels": "labels"}, {}),
    "smooth": ({**_TOPK, "temporal_smoothness_coeff": 0.5}, {}),
    "dense": (_TOPK, {"fused": False}),
    "without dead latents": ({**_SAE, "k": 2, "dead_after_tokens": 1000}, {}),
    "slots": ({"d_sae": 64, "arch": "slots", "n_relations": 2, "n_answers": 3}, {}),
}


def rows() -> torch.Tensor:
    """Return the activations [ROWS, WIDTH] of all cases."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, WIDTH, generator=generator)


def trainer_of(
    case: str, *, x: Tensor | None = None, callbacks: Sequence[Callback] = (), **settings: Any
) -> Trainer:
    """Return the training of a case, by one process or by one of PARTS ranks."""
    sae, train = CASES[case]
    sae = {**sae, "d_sae": settings.pop("d_sae", sae["d_sae"])}
    given = {"lr": 1e-2, "batch_size": 16, "max_steps": 6, "log_every": 1, "eval_every": 3}
    given |= train | settings
    if launched().size == 1:
        given["grad_acc_steps"] = PARTS * given.get("grad_acc_steps", 1)
    else:
        given |= {"mesh": f"data={PARTS}", "mesh_timeout": 0.4}
    x, columns = rows() if x is None else x, {}
    if sae.get("transcoder"):
        columns["targets"] = x.roll(1, 1) * 2
    if sae.get("probe_labels"):
        columns["labels"] = torch.arange(ROWS) % 3
    if sae.get("temporal_smoothness_coeff"):
        columns["position"] = torch.arange(ROWS) % 12
    config = SAEConfig(**sae), TrainConfig(**given)
    heldout = {"heldout": x[:64]}
    if columns:
        heldout["heldout_columns"] = {name: column[:64] for name, column in columns.items()}
    beside = {"columns": columns or None, "callbacks": callbacks, "show_progress": False}
    return Trainer(*config, x, **heldout, **beside)


def result(trainer: Trainer) -> dict[str, Any]:
    """Return what a training leaves: its model, its state and its metrics."""
    state = trainer.state_dict()
    left_out = ("versions", "seconds", "stalled_seconds", "config", "random", "heldout")
    kept = {name: value for name, value in state.items() if name not in left_out}
    return {"model": trainer.sae.state_dict(), "state": kept, "history": trainer.history}


class Kill(Callback):
    """Sends a signal to this process after a step, if it is rank 1."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Send it."""
        if trainer.step == self.step and trainer.ranks.rank == 1:
            os.kill(os.getpid(), self.number)


class Disturb(Callback):
    """Changes one number of the model of rank 1 after a step."""

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Change it."""
        if trainer.step == 2 and trainer.ranks.rank == 1:
            with torch.no_grad():
                trainer.sae.b_dec[0] += 1e-6


class Order:
    """Notes in which order a training sends tensors ahead, waits for them and measures gradients.

    Attributes:
        events: the names of the events.
    """

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note them in this context."""
        begin, measure = Ranks.begin_gather, ops.row_gradient_norm

        def begun(ranks: Ranks, own: Tensor) -> PendingGather:
            self.events.append("begin")
            pending = begin(ranks, own)

            def wait() -> None:
                self.events.append("wait")
                pending.wait()

            return PendingGather(pending.parts, wait)

        def measured(*given: Any) -> Any:
            self.events.append("measure")
            return measure(*given)

        with (
            patch.object(Ranks, "begin_gather", begun),
            patch.object(ops, "row_gradient_norm", measured),
        ):
            yield


def scenarios(directory: Path, rank: int) -> dict[str, Any]:
    """Return what happens in runs that stop, continue, are refused, or differ between ranks."""
    run = {"checkpoint_dir": str(directory / "run"), "checkpoint_every": 3}
    found: dict[str, Any] = {}
    stopped = trainer_of("topk", callbacks=[Kill(4, signal.SIGTERM)], **run)
    stopped.train()
    found["stopped"] = stopped.step
    shutil.copytree(directory / "run", directory / f"stopped-{rank}")
    continued = trainer_of("topk", resume_from="latest", **run)
    found["continues"] = continued.step
    continued.train()
    found["result"] = result(continued)
    found["settings"] = error_of(lambda: trainer_of("topk", lr=1e-2 + rank * 1e-3))
    found["rows"] = error_of(lambda: trainer_of("topk", x=rows() + rank))
    found["one fails"] = error_of(lambda: trainer_of("topk", device="cpu" if rank == 0 else "tpu"))
    found["slots"] = error_of(lambda: trainer_of("slots"))
    found["bytes"] = {}
    for d_sae in (64, 512):
        trainer = trainer_of("without dead latents", d_sae=d_sae)
        trainer.train()
        found["bytes"][d_sae] = trainer.history[-2]["exchanged_bytes"]
    found["order"] = {}
    for case in ("without dead latents", "dense", "batch_topk"):
        order = Order()
        with order.noted():
            trainer_of(case, max_steps=2).train()
        found["order"][case] = order.events
    mine = torch.arange(6).view(2, 3).t().bfloat16() + 10 * rank  # not contiguous
    pending = trainer.ranks.begin_gather(mine)
    found["meanwhile"] = trainer.ranks.values(rank)
    pending.wait()
    found["gathered"] = pending.parts
    disturbed = trainer_of("topk", callbacks=[Disturb()], checkpoint_every=3)
    found["disturbed"] = error_of(disturbed.train)
    found["disturbed at"] = disturbed.step
    return found


def main(directory: Path) -> None:
    """Do what the test looks at, as one of two processes."""
    place = launched()
    found: dict[str, Any] = {}
    for case in CASES:
        if case != "slots":
            trainer = trainer_of(case)
            trainer.train()
            found[case] = result(trainer)
    found["scenarios"] = scenarios(directory, place.rank)
    torch.save(found, directory / f"rank-{place.rank}.pt")
    hung = trainer_of("topk", callbacks=[Kill(3, signal.SIGSTOP)])
    numbers = hung.ranks.values(os.getpid())
    found["hung"] = error_of(hung.train)
    torch.save(found, directory / f"rank-{place.rank}.pt")
    os.kill(numbers[1], signal.SIGKILL)
