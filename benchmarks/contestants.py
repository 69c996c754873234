"""Who takes part in `train_step.py`, by name.

Local contestants run in the benchmark's own process; peers run their own loop in a process of
their own, because their dependencies clash. A name that ends in `_bf16` asks for `--amp bf16` of
sae_fast and for bf16 autocast of everybody else.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from benchmarks.baselines.eager import EagerTrainer
from benchmarks.baselines.tuned import GatherTrainer, TunedTrainer
from benchmarks.support.problem import Weights

EAGER_CLASSES = {"eager": EagerTrainer, "tuned": TunedTrainer, "gather": GatherTrainer}
OURS = ("sae_fast", "sae_fast_bf16")
BASELINES = (
    *("eager", "tuned", "gather", "compile"),
    *("eager_bf16", "tuned_bf16", "gather_bf16"),
)
PEER_MODULES = {
    "sparsify": "sparsify",
    "saelens": "sae_lens",
    "saelens_bf16": "sae_lens",
    "dictionary_learning": "dictionary_learning",
}
DESCRIPTIONS = {
    "sae_fast": "sae_fast, default (`screened`: exact fp32 result)",
    "sae_fast_bf16": "sae_fast, `--amp bf16`",
    "eager": "PyTorch eager, dense, fp32",
    "eager_bf16": "PyTorch eager, dense, bf16 autocast",
    "tuned": "PyTorch eager, embedding_bag decode + fused Adam, fp32",
    "tuned_bf16": "PyTorch eager, embedding_bag decode + fused Adam, bf16 autocast",
    "gather": "PyTorch eager, also sparse encoder backward, fp32",
    "gather_bf16": "PyTorch eager, also sparse encoder backward, bf16 autocast",
    "compile": "torch.compile of the fastest fp32 one above",
    "sparsify": "sparsify, its Trainer, fp32",
    "saelens": "SAELens, its SAETrainer, fp32",
    "saelens_bf16": "SAELens, bf16 autocast",
    "dictionary_learning": "dictionary_learning, its trainSAE, fp32",
}


class StepTrainer(Protocol):
    """What a local contestant offers."""

    def step(self, x: Tensor) -> Tensor:
        """One whole training step; returns the loss."""


def make_local(name: str, weights: Weights, k: int, lr: float) -> StepTrainer:
    """Build a local contestant; `compile:NAME` compiles a baseline."""
    if name in OURS:
        from benchmarks.baselines.sae_fast_trainer import SaeFastTrainer

        precision = "bf16" if name.endswith("_bf16") else "screened"
        return SaeFastTrainer(weights, k, lr, precision=precision)
    base = name.removeprefix("compile:")
    cls = EAGER_CLASSES[base.removesuffix("_bf16")]
    return cls(weights, k, lr, autocast=base.endswith("_bf16"), compiled=base != name)


def adapter_module(name: str) -> str:
    """The module whose `train` runs a contestant inside `benchmarks/worker.py`."""
    if name in PEER_MODULES:
        return f"benchmarks.baselines.peer_{name.removesuffix('_bf16')}"
    return "benchmarks.baselines.local_loop"


def choose_contestants(
    names: list[str], interpreters: Mapping[str, str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """Split names into local ones, peers with their interpreters, and peers not to be found."""
    local: list[str] = []
    peers: dict[str, str] = {}
    missing: list[str] = []
    for name in names:
        if name in BASELINES:
            local.append(name)
            continue
        if name not in PEER_MODULES:
            known = ", ".join([*BASELINES, *PEER_MODULES])
            raise ValueError(f"peers must be among {known}, got {name!r}")
        python = interpreters.get(name.removesuffix("_bf16"))
        if python is None and importlib.util.find_spec(PEER_MODULES[name]) is not None:
            python = sys.executable
        if python is None:
            missing.append(name)
        else:
            peers[name] = python
    return local, peers, missing
