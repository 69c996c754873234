"""Trains small models by processes that divide batches and latents: 1, 2, 4 or 16 of them.

Run by test_ranks_mesh.py: `main(DIRECTORY)`, with the variables of a launcher.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import latents_worker
import torch
from latents_worker import At
from several_ranks import error_of
from torch import Tensor

from sae_fast import Callback, Trainer
from sae_fast.activations import ShardError
from sae_fast.config.mesh import parsed_mesh
from sae_fast.distributed.environment import launched
from sae_fast.distributed.ranks import Ranks
from sae_fast.training import run_directory

CASES = ("topk", "batch_topk", "jumprelu")
BOTH = "data=2,latents=2"
SIXTEEN = "data=4,latents=4"
# Meshes by which one run is made, with the step after which each ends.
CHAIN = (("data=2", 2), ("latents=2", 3), ("data=2", 4), (None, 6), (BOTH, 8))


def trainer_of(
    case: str,
    directory: Path | None,
    mesh: str | None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Trainer:
    """Return a training with two batches a step, by the processes of a mesh."""
    given = {"mesh": mesh, "grad_acc_steps": 2 // parsed_mesh(mesh).get("data", 1), **settings}
    return latents_worker.trainer_of(case, directory, callbacks, **given)


def continued(directory: Path) -> list[int]:
    """Make the steps of the chain that this number of processes makes; return where they began."""
    began = []
    for mesh, last in CHAIN:
        if launched().size == torch.tensor(list(parsed_mesh(mesh).values())).prod():
            stop = [At(last, Trainer.stop)]
            trainer = trainer_of("topk", directory, mesh, stop, resume_from="latest")
            began.append(trainer.step)
            trainer.train()
    return began


def swapped_on_machine(ranks: Ranks) -> tuple[list[int], list[Tensor]]:
    """Give neighbours bytes, as if two machines had two processes each; return who has which."""
    with patch.object(ranks, "_local_rank", ranks.rank % 2):
        machine = ranks.on_machine()
    parts = [torch.full((number + 1,), ranks.rank, dtype=torch.uint8) for number in range(2)]
    return machine.numbers, machine.swap(parts, [machine.rank + 1] * 2)


@torch.no_grad()
def disturb(trainer: Trainer) -> None:
    """Change one number of a latent."""
    trainer.sae.W_enc[0, 0] += 1e-6


def lose_shard(trainer: Trainer) -> None:
    """Let this process read no more rows."""
    lost = ShardError("shard_00003.h5: No such file or directory")
    trainer.source.next_share = Mock(side_effect=lost)  # type: ignore[method-assign]


def main(directory: Path) -> None:
    """Do what the test looks at, as one of 2, 4 or 16 processes."""
    run_directory.plot_run = lambda rows, path, title: path  # it takes longer than the trainings
    place = launched()
    if place.size == 16:
        small = {"grad_acc_steps": 1, "max_steps": 2, "mesh_timeout": 10.0}
        trainer_of("topk", directory / "sixteen", SIXTEEN, **small).train()
        return
    found: dict[str, Any] = {"began": continued(directory / "chain")}
    if place.size == 4:
        found["history"] = {}
        for case in CASES:
            trainer = trainer_of(case, directory / "four" / case, BOTH)
            trainer.train()
            found["history"][case] = trainer.history
        found["swapped"] = swapped_on_machine(trainer.ranks)
        found["shape"] = tuple(trainer.sae.W_enc.shape)
        stop = [At(4, latents_worker.stop)]
        trainer_of("topk", directory / "stopped", BOTH, stop).train()
        again = trainer_of("topk", directory / "stopped", BOTH, resume_from="latest")
        found["continues"] = again.step
        again.train()
        disturbed = trainer_of("topk", None, BOTH, [At(3, disturb)], checkpoint_every=4)
        found["disturbed"] = error_of(disturbed.train)
        spoilt = [At(3, latents_worker.spoil)]
        found["spoilt"] = error_of(trainer_of("topk", None, BOTH, spoilt).train)
        full = [At(3, latents_worker.fill_disk, rank=1)]
        found["full disk"] = error_of(trainer_of("topk", directory / "full", BOTH, full).train)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        torch.save(found, directory / f"rank-{place.rank}.pt")
        kill = [At(3, lambda _: os.kill(os.getpid(), signal.SIGKILL))]
        found["killed"] = error_of(trainer_of("topk", None, BOTH, kill).train)
    else:
        lost = [At(3, lose_shard)]
        found["lost shard"] = error_of(trainer_of("topk", None, "data=2", lost).train)
        found["afterwards"] = error_of(lambda: trainer_of("topk", None, "data=2"))
    torch.save(found, directory / f"{place.size}-rank-{place.rank}.pt")
