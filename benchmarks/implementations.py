"""The implementations of a training step that `train_step.py` compares, by name.

Local implementations run in the benchmark's own process. Each peer runs its own training loop in a
process of its own, because the peers' dependencies clash. A name that ends in `_bf16` means
`--amp bf16` for sae_fast and bf16 autocast for every other implementation.
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
OURS_ON_CUDA = (*OURS, "sae_fast_graph", "sae_fast_graph_bf16")
ALL_DEAD = "sae_fast_dead"
# The precision of each mode of sae_fast; every precision has a floor of its own.
PRECISIONS = {name: "bf16" if name.endswith("_bf16") else "screened" for name in OURS_ON_CUDA}
BASELINES = (
    *("eager", "tuned", "gather", "compile"),
    *("eager_bf16", "tuned_bf16", "gather_bf16", "compile_bf16"),
)
PEER_MODULES = {
    "sparsify": "sparsify",
    "saelens": "sae_lens",
    "saelens_bf16": "sae_lens",
    "dictionary_learning": "dictionary_learning",
}
# A repository pinned to torch 2.1 and in no package index; the table lists it as not installed.
UNPACKAGED = ("openai",)
# The defaults of --peers. compile comes last: it takes a minute to begin.
DEFAULT_PEERS = {
    "cpu": (
        *("eager", "tuned", "gather", "compile", "eager_bf16", "tuned_bf16", "gather_bf16"),
        *("sparsify", "saelens", "saelens_bf16", "dictionary_learning"),
    ),
    "cuda": ("eager_bf16", "gather_bf16", "eager", "sparsify", "openai", "compile_bf16"),
}
DEFAULT_OURS = {"cpu": OURS, "cuda": OURS_ON_CUDA}
DESCRIPTIONS = {
    "sae_fast": "sae_fast, default (`screened`: exact fp32 result)",
    "sae_fast_bf16": "sae_fast, `--amp bf16`",
    ALL_DEAD: "sae_fast, default, AuxK with every latent dead",
    "eager": "PyTorch eager, dense, fp32",
    "eager_bf16": "PyTorch eager, dense, bf16 autocast",
    "tuned": "PyTorch eager, embedding_bag decode + fused Adam, fp32",
    "tuned_bf16": "PyTorch eager, embedding_bag decode + fused Adam, bf16 autocast",
    "gather": "PyTorch eager, also sparse encoder backward, fp32",
    "gather_bf16": "PyTorch eager, also sparse encoder backward, bf16 autocast",
    "compile": "torch.compile of the fastest fp32 one above",
    "compile_bf16": "torch.compile of the fastest bf16 one above",
    "sae_fast_graph": "sae_fast, default, CUDA graph",
    "sae_fast_graph_bf16": "sae_fast, `--amp bf16`, CUDA graph",
    "sparsify": "sparsify, its Trainer, fp32",
    "saelens": "SAELens, its SAETrainer, fp32",
    "saelens_bf16": "SAELens, bf16 autocast",
    "dictionary_learning": "dictionary_learning, its trainSAE, fp32",
    "openai": "openai/sparse_autoencoder, its kernels",
}
# Descriptions of the implementations that differ from their form on a CPU.
DESCRIPTIONS_ON_CUDA = {
    "eager": "PyTorch eager, dense, fused Adam, fp32",
    "eager_bf16": "PyTorch eager, dense, fused Adam, bf16 autocast",
    "sparsify": "sparsify, its Trainer and Triton kernels, bf16 autocast",
}


class StepTrainer(Protocol):
    """The interface of a local implementation."""

    def step(self, x: Tensor) -> Tensor:
        """Take one whole training step on x [N, D]; return the loss."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction [N, D] of x [N, D]."""


def describe(name: str, device_type: str) -> str:
    """Return an implementation's description for a table."""
    if device_type == "cuda" and name in DESCRIPTIONS_ON_CUDA:
        return DESCRIPTIONS_ON_CUDA[name]
    return DESCRIPTIONS[name]


def in_bf16(name: str, device_type: str) -> bool:
    """Return whether an implementation computes its loss from operands rounded to bf16."""
    return name.endswith("_bf16") or (name == "sparsify" and device_type == "cuda")


def make_local(name: str, weights: Weights, k: int, lr: float) -> StepTrainer:
    """Build a local implementation; `compile:NAME` compiles a baseline."""
    if name in OURS_ON_CUDA or name == ALL_DEAD:
        from benchmarks.baselines.sae_fast_trainer import CapturedTrainer, SaeFastTrainer

        precision, all_dead = PRECISIONS.get(name, "screened"), name == ALL_DEAD
        trainer = SaeFastTrainer(weights, k, lr, precision=precision, all_dead=all_dead)
        return CapturedTrainer(trainer) if "graph" in name else trainer
    base = name.removeprefix("compile:")
    cls = EAGER_CLASSES[base.removesuffix("_bf16")]
    return cls(weights, k, lr, autocast=base.endswith("_bf16"), compiled=base != name)


def adapter_module(name: str) -> str:
    """Return the module whose `train` runs an implementation inside `benchmarks/worker.py`."""
    if name in PEER_MODULES:
        return f"benchmarks.baselines.peer_{name.removesuffix('_bf16')}"
    return "benchmarks.baselines.local_loop"


def choose_implementations(
    names: list[str], interpreters: Mapping[str, str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """Split names into local implementations, peers with their interpreters, and missing peers.

    Raises ValueError for an unknown name.
    """
    local: list[str] = []
    peers: dict[str, str] = {}
    missing: list[str] = []
    for name in names:
        if name in BASELINES:
            local.append(name)
            continue
        if name in UNPACKAGED:
            missing.append(name)
            continue
        if name not in PEER_MODULES:
            known = ", ".join([*BASELINES, *PEER_MODULES, *UNPACKAGED])
            raise ValueError(f"peers must be among {known}, got {name!r}")
        python = interpreters.get(name.removesuffix("_bf16"))
        if python is None and importlib.util.find_spec(PEER_MODULES[name]) is not None:
            python = sys.executable
        if python is None:
            missing.append(name)
        else:
            peers[name] = python
    return local, peers, missing
