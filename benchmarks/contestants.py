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
OURS_ON_CUDA = (*OURS, "sae_fast_graph", "sae_fast_graph_bf16")
# The precision of each of ours, whose floor is another.
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
# Never found: a repository pinned to torch 2.1, in no package index. The table says so.
UNPACKAGED = ("openai",)
# Who is compared where nobody is named. compile comes last: it takes a minute to begin.
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
# Where the same contestant does something else than on a CPU.
DESCRIPTIONS_ON_CUDA = {
    "eager": "PyTorch eager, dense, fused Adam, fp32",
    "eager_bf16": "PyTorch eager, dense, fused Adam, bf16 autocast",
    "sparsify": "sparsify, its Trainer and Triton kernels, bf16 autocast",
}


class StepTrainer(Protocol):
    """What a local contestant offers."""

    def step(self, x: Tensor) -> Tensor:
        """One whole training step; returns the loss."""


def describe(name: str, device_type: str) -> str:
    """What a contestant is, in words."""
    if device_type == "cuda" and name in DESCRIPTIONS_ON_CUDA:
        return DESCRIPTIONS_ON_CUDA[name]
    return DESCRIPTIONS[name]


def in_bf16(name: str, device_type: str) -> bool:
    """Whether a contestant's loss is that of rounded operands."""
    return name.endswith("_bf16") or (name == "sparsify" and device_type == "cuda")


def make_local(name: str, weights: Weights, k: int, lr: float) -> StepTrainer:
    """Build a local contestant; `compile:NAME` compiles a baseline."""
    if name in OURS_ON_CUDA:
        from benchmarks.baselines.sae_fast_trainer import CapturedTrainer, SaeFastTrainer

        trainer = SaeFastTrainer(weights, k, lr, precision=PRECISIONS[name])
        return trainer if name in OURS else CapturedTrainer(trainer)
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
