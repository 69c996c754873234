"""Starts trainings that two processes must refuse, each in its own way, and saves what they said.

Run by test_ranks_refusals.py: `main(DIRECTORY)`, with the variables of a launcher.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from several_ranks import error_of
from torch.distributed import rendezvous

from sae_fast import SAEConfig, TrainConfig, Trainer
from sae_fast.activations import write_shard
from sae_fast.distributed import ranks
from sae_fast.distributed.environment import launched
from sae_fast.train import main as main_of_train
from sae_fast.training import trainer

_SIZES = "--shard-dir shards --d-sae 32 --k 2 --batch-size 16 --quiet "
_DATA, _LATENTS = "--mesh data=2", "--mesh latents=2"
# The flags of both processes, or of each, and a part of the line that process 0 must print.
FLAGS: dict[str, tuple[str | tuple[str, str], str]] = {
    "no mesh": ("", "2 processes were started (WORLD_SIZE = 2)"),
    "no mesh in one": ((_DATA, ""), "rank 1: 2 processes were started"),
    "product": ("--mesh data=3", "needs 3 processes, and the launcher has started 2"),
    "product in one": ((_DATA, "--mesh data=4"), "rank 1: mesh = 'data=4' needs 4 processes"),
    "mesh": ((_DATA, _LATENTS), "rank 1 differs from rank 0 in its settings (mesh)"),
    "axis": ("--mesh rows=2", "the axes are data, latents, layers, got 'rows'"),
    "settings": ((_DATA, f"{_DATA} --lr 0.1"), "rank 1 differs from rank 0 in its settings (lear"),
    "settings of latents": ((_LATENTS, f"{_LATENTS} --k 3"), "in its settings (k): 3 and not 2"),
    "rows": (f"{_DATA} --batch-size 4096", "no full step"),
    "k": (f"{_DATA} --k 0", "k must be at least 1"),
    "no sweep": (f"{_DATA} --sweep none.json", "none.json"),
    "latents": (f"{_LATENTS} --d-sae 1 --k 1", "more processes than there are latents, 1"),
    "layers": ("--mesh layers=2", "divides several trainings, and this is one"),
    "data slots": (f"{_DATA} --arch slots --n-relations 2 --n-answers 2", "with arch slots"),
    "latents slots": (f"{_LATENTS} --arch slots --n-relations 2 --n-answers 2", "with arch slots"),
    "data ce": (f"{_DATA} --loss-fn ce", "mesh must be left out with loss_fn ce"),
    "latents kl": (f"{_LATENTS} --loss-fn kl", "mesh must be left out with loss_fn kl"),
    "latents sequences": (
        f"{_LATENTS} --temporal-smoothness-coeff 0.1",
        "does not divide a training with temporal_smoothness_coeff",
    ),
    "latents amp": (f"{_LATENTS} --amp bf16", "does not divide a training with amp bf16"),
    "live": (f"{_DATA} --live pages", "--live is for one training, by one process"),
    "sweep": (f"{_DATA} --sweep ../sweep.json", "divides one training, and these are several"),
    "few trainings": (
        "--mesh layers=2 --sweep ../one.json",
        "more processes than there are trainings, 1",
    ),
    "no checkpoint": (f"{_LATENTS} --resume-from ../nothing", "nothing"),
}
# Shards that only process 0 has, and the part of its line.
GONE = {
    "data gone": (_DATA, "rank 1: "),
    "latents gone": (_LATENTS, "rank 1: "),
}


def command(flags: str) -> tuple[int, str]:
    """Run the command of training; return its exit code and what it printed as errors."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        code = main_of_train([*_SIZES.split(), "--checkpoint-dir", "run", *flags.split()])
    return code, printed.getvalue()


@contextlib.contextmanager
def changed(target: object, name: str, value: Any) -> Iterator[None]:
    """Let something have another value in process 1."""
    with patch.object(target, name, value) if launched().rank == 1 else contextlib.nullcontext():
        yield


def main(directory: Path) -> None:
    """Do what the test looks at, as one of two processes."""
    rank = launched().rank
    own = directory / f"machine-{rank}"  # the current directory of the process
    (own / "shards").mkdir(parents=True)
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    for number in range(2):
        write_shard(own / f"shards/train_{number}.h5", x + number)
    os.chdir(own)
    _store = next(rendezvous("env://"))  # which lives on when the processes part
    found: dict[str, Any] = {}
    # Before the processes have met.
    with changed(ranks.sae_fast, "__version__", "0.0.1"):
        found["version"] = command(_DATA)
    with changed(ranks.torch, "__version__", "1.13.0"):
        found["torch"] = command(_LATENTS)
    with (
        patch.object(torch.cuda, "device_count", lambda: 2),
        changed(ranks.dist, "is_nccl_available", lambda: False),
    ):
        found["NCCL"] = command(f"{_DATA} --device cuda")
    for name, (flags, _) in FLAGS.items():
        found[name] = command(flags if isinstance(flags, str) else flags[rank])
    with changed(trainer, "checked_device", lambda name: torch.device("meta")):
        found["device"] = command(_DATA)
    if rank == 1:
        Path("shards/train_1.h5").unlink()
    found["one shard gone"] = command(_DATA)
    if rank == 1:
        shutil.rmtree("shards")
    for name, (flags, _) in GONE.items():
        found[name] = command(flags)
    found["few rows"] = error_of(lambda: _trainer(x[:1]))
    torch.save(found, directory / f"rank-{rank}.pt")


def _trainer(x: torch.Tensor) -> Trainer:
    config = SAEConfig(d_sae=32, k=2), TrainConfig(batch_size=16, max_steps=2, mesh="data=2")
    return Trainer(*config, x, show_progress=False)
