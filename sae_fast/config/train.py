"""`TrainConfig`: how a model is trained. Part of sae_fast.config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from sae_fast.config.effects import TRAINING, Effect
from sae_fast.config.fields import ConfigFile, with_aliases

_NAMES = (
    *("shard_dir", "activations_key", "heldout", "device"),
    *("target_key", "target_shard_dir", "target_heldout"),
    *("checkpoint_dir", "resume_from", "start_from"),
)
_COUNTS = (
    *("pool_rows", "batch_size", "grad_acc_steps", "max_epochs", "max_steps", "max_tokens"),
    *("num_threads", "log_every", "wandb_log_every", "keep_checkpoints", "k_anneal_start"),
)
_NOT_NEGATIVE = (
    "warmup_steps",
    "sparsity_warmup_steps",
    "k_anneal_steps",
    "weight_decay",
    "grad_clip",
    "seed",
    "shuffle_seed",
    "eval_every",
    "checkpoint_every",
    "reconstruction_epochs",
)


@with_aliases(lr="learning_rate", use_amp="amp")
@dataclass(frozen=True, kw_only=True)
class TrainConfig(ConfigFile):
    """The training run: data, optimiser, schedule, precision, logging and checkpoints."""

    section: ClassVar[str] = "train"
    effects: ClassVar[Mapping[str, Effect]] = TRAINING

    shard_dir: str | None = None
    """Directory of HDF5 shards with the activations to train on; one that holds a folder of shards
    for each hook point, as a capture writes, trains a dictionary on each of them."""
    mix: tuple[str, ...] | None = None
    """Several such directories in place of shard_dir, each with the weight that it has among the
    rows, DIR:WEIGHT; an epoch lasts until each was served whole, smaller ones begin again."""
    activations_key: str = "activations"
    """Name of the data set inside a shard."""
    heldout: str | None = None
    """Held-out shards, a directory or a glob; default: the files heldout*.h5 in shard_dir."""
    target_key: str | None = None
    """Name of the data set with a transcoder's targets; default: with target_shard_dir that of the
    activations."""
    target_shard_dir: str | None = None
    """Directory with the targets of shard_dir, in files of the same names; default: the shards
    themselves hold them."""
    target_heldout: str | None = None
    """Directory with the targets of the held-out shards; default: target_shard_dir."""
    pool_rows: int = 65_536
    """Size of the shuffle pool. [tokens]"""
    keep_in_memory: bool = False
    """Keep all rows in memory, as stored, once they were read; the order stays what it is."""
    pin: bool = False
    """Lock the rows that keep_in_memory keeps, so that they are never swapped out. Batches for a
    GPU are always page-locked."""
    device_cache: bool = False
    """Keep all rows on the GPU, as stored, once they were read, and make the batches there."""
    skip_nonfinite: bool = False
    """Drop and count rows with NaN or infinity instead of stopping at them."""
    repeated_rows: Literal["refuse", "drop", "keep"] = "refuse"
    """Rows of shards that are zero or equal to the row before them, as rows never written and
    padding are: refuse more than 1 % of a shard, drop and count all of them, or keep them."""

    batch_size: int = 4096
    """Tokens per forward pass; an optimiser step takes grad_acc_steps of these. [tokens]"""
    grad_acc_steps: int = 1
    """Batches whose gradients are averaged into one optimiser step; the variance of fvu, target_l0
    and the selection of batch_topk are of the whole step. [batches]"""
    max_epochs: int | None = None
    """Passes over the data; default: 1, or as many as max_steps or max_tokens takes. [epochs]"""
    max_steps: int | None = None
    """Stop after so many optimiser steps. [steps]"""
    max_tokens: int | None = None
    """Stop after so many tokens. [tokens]"""

    reconstruction_epochs: float = 0.0
    """Passes over the data, at the start, whose loss is the reconstruction alone. [epochs]"""
    start_from: str | None = None
    """Model to start from, a checkpoint or what save wrote; default: a new one."""
    start_from_elsewhere: bool = False
    """Start also from a model of another hook, layer or model than the activations are of."""

    learning_rate: float | None = None
    """Peak learning rate, also accepted as lr; default: of adam 2e-4 / sqrt(d_sae / 2**14), half as
    much of signum, 5 times as much of schedule_free_signum, 0.1 of sgd."""
    warmup_steps: int | None = None
    """Linear rise of the learning rate; default: 5 % of the run. [steps]"""
    sparsity_warmup_steps: int | None = None
    """Linear rise of the weight of the sparsity penalties; default: 5 % of the run. [steps]"""
    k_anneal_start: int | None = None
    """k of the first step, from which it falls linearly to that of the model; default: no fall. In
    between it takes at most 4 values per halving. [latents]"""
    k_anneal_steps: int | None = None
    """Length of this fall; default: 5 % of the run. [steps]"""
    decay_fraction: float | None = None
    """Share of the run, at its end, in which the learning rate falls linearly; default: 0.2, of
    schedule_free_signum 0. [share]"""
    optimizer: Literal["adam", "adamw", "sgd", "signum", "schedule_free_signum"] = "adam"
    """adamw: adam with weight decay; sgd: with momentum; signum: lr times a momentum's sign;
    schedule_free_signum: lr times the gradient's sign, and the average of the weights is the
    model."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: float = 1e-8
    """Adam's term in the denominator."""
    momentum: float | None = None
    """What sgd and signum keep of their momentum from step to step, 0.9 by default; of
    schedule_free_signum the share of the average where gradients are taken, 0.95 by default."""
    weight_decay: float = 0.0
    """Weight decay, per step and unit of learning rate: decoupled, but of sgd in the gradient."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    optimizer_states: Literal["fp32", "bf16", "8bit"] = "fp32"
    """Moments of the weights, two of adam, one of the others: 4, 2 or 1 byte each; below fp32
    rounded at random. schedule_free_signum has fp32 and bf16."""
    average_decay: float = 0.0
    """Decay of a moving average of the weights, evaluated and saved beside them; 0: none."""
    fused: bool = True
    """Fused optimiser on factored gradients; false: dense gradients and an optimiser of torch."""

    amp: Literal["off", "bf16", "fp16"] = "off"
    """Low-precision products and gathers, also accepted as use_amp; off: exact fp32 results."""
    device: str = "cpu"
    """Device to train on."""
    cuda_graph: bool = True
    """On a GPU, launch a whole step at once, as a CUDA graph; needs fused. The result is equal."""
    num_threads: int | None = None
    """CPU threads; default: torch's own choice. [threads]"""
    seed: int = 0
    """Seed of initialisation and of the order of the data."""
    shuffle_seed: int | None = None
    """Seed of the order of the data; default: seed."""

    log_every: int = 10
    """Interval of the metrics. [steps]"""
    wandb_log_every: int | None = None
    """Interval of what goes to W&B; default: log_every. [steps]"""
    eval_every: int = 500
    """Interval of the held-out evaluation; 0: only at the end. [steps]"""
    dead_percentage_threshold: float = 0.0
    """Share of the held-out tokens below which a latent that fires on them counts as dead in
    heldout_dead_fraction; one that never fires always does. [share]"""
    checkpoint_every: int = 500
    """Interval of the checkpoints; 0: only at the end. [steps]"""
    keep_checkpoints: int = 3
    """How many of the last checkpoints are kept. [checkpoints]"""
    checkpoint_dir: str | None = None
    """Directory of the run: configuration, metrics, checkpoints; default: a new one in runs."""
    resume_from: str | None = None
    """Where to go on from: latest or best of checkpoint_dir, or a checkpoint, or another run."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; default: none."""
    no_wandb: bool = False
    """Do not log to Weights & Biases, whatever wandb_project says."""

    def __post_init__(self) -> None:
        """Check every field; raises ValueError naming field and value."""
        given: object = self.amp
        if isinstance(given, bool):  # use_amp = true, as other trainers write it
            object.__setattr__(self, "amp", "bf16" if given else "off")
        self._check_types()
        for name in _NAMES:
            self._require(name, getattr(self, name) != "", "a name, not an empty string")
        for name in _COUNTS:
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        for name in ("eps", "learning_rate"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "greater than 0")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "at least 0")
        self._require("decay_fraction", 0 <= self.kept_decay_fraction <= 1, "between 0 and 1")
        if not self.fused and self.optimizer_states != "fp32":
            raise ValueError(
                "optimizer_states must be 'fp32' where fused is false: optimisers of torch keep no "
                f"others, got {self.optimizer_states!r}"
            )
        self._check_optimizer()
        is_share = 0 <= self.dead_percentage_threshold < 1
        self._require("dead_percentage_threshold", is_share, "a share, from 0 to below 1")
        self._check_mix()
        self._check_cache()
        self._require("average_decay", 0 <= self.average_decay < 1, "from 0 to below 1")
        betas_hold = all(0 <= beta < 1 for beta in self.betas)
        self._require("betas", betas_hold, "two numbers from 0 to below 1")
        self._check_effects()

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> TrainConfig:
        """As `ConfigFile.from_saved`; values that name no optimizer may have a weight decay.

        They were written before there was a choice, when adam's was that of adamw.
        """
        if "optimizer" not in values and values.get("weight_decay"):
            values = {**values, "optimizer": "adamw"}
        return super().from_saved(values)

    def _check_optimizer(self) -> None:
        momentum = self.momentum
        self._require("momentum", momentum is None or 0 <= momentum < 1, "from 0 to below 1")
        if self.optimizer == "schedule_free_signum":
            self._check_schedule_free()

    def _check_schedule_free(self) -> None:
        if self.momentum == 0:
            raise ValueError(
                "momentum must be above 0 where optimizer is 'schedule_free_signum': at 0 no trace "
                "of the average is kept, got 0"
            )
        if self.optimizer_states == "8bit":
            raise ValueError(
                "optimizer_states must be 'fp32' or 'bf16' where optimizer is "
                "'schedule_free_signum', got '8bit': what rounding adds to its average stays there"
            )
        if self.average_decay > 0:
            raise ValueError(
                f"average_decay = {self.average_decay} needs another optimizer than "
                "'schedule_free_signum', which averages the weights itself"
            )

    def _check_mix(self) -> None:
        if self.mix is None:
            return
        for name in ("shard_dir", "target_shard_dir", "target_heldout"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} must be left out where mix is given, got {value!r}")
        self._require("mix", len(self.mix) > 0, "directories with their weights")
        for entry, (name, weight) in zip(self.mix, self.mix_weights, strict=True):
            if not name or weight <= 0:
                raise ValueError(
                    f"mix must name directories as DIR:WEIGHT, each weight a number greater than "
                    f"0, got {entry!r}"
                )

    def _check_cache(self) -> None:
        if not self.device_cache:
            return
        if self.keep_in_memory:
            raise ValueError("keep_in_memory and device_cache: give one of the two")
        if not self.device.startswith("cuda"):
            raise ValueError(
                f"device_cache needs a GPU, got device = {self.device!r}: "
                "keep_in_memory keeps the rows in memory"
            )

    @property
    def mix_weights(self) -> tuple[tuple[str, Fraction], ...]:
        """Directory and weight of every part of `mix`; 0 for what is no weight."""
        found = []
        for entry in self.mix or ():
            name, _, weight = entry.rpartition(":")
            try:
                found.append((name, Fraction(weight)))
            except (ValueError, ZeroDivisionError):
                found.append((entry, Fraction(0)))
        return tuple(found)

    @property
    def order_seed(self) -> int:
        """`shuffle_seed`, or its default."""
        return self.seed if self.shuffle_seed is None else self.shuffle_seed

    @property
    def kept_decay_fraction(self) -> float:
        """`decay_fraction`, or its default: an average of the weights needs no decay."""
        if self.decay_fraction is not None:
            return self.decay_fraction
        return 0.0 if self.optimizer == "schedule_free_signum" else 0.2

    @property
    def kept_momentum(self) -> float:
        """`momentum`, or its default."""
        if self.momentum is not None:
            return self.momentum
        return 0.95 if self.optimizer == "schedule_free_signum" else 0.9

    @property
    def precision(self) -> Literal["screened", "bf16", "fp16"]:
        """Mode of the encoder's product that `amp` asks for."""
        return "screened" if self.amp == "off" else self.amp

    def describe_precision(self) -> str:
        """Return one sentence on which numbers are computed in which precision, and why."""
        if self.amp == "off":
            return (
                "precision: exact float32 (amp is off, the default; --amp bf16 halves what gathers "
                "read)"
            )
        name = {"bf16": "bfloat16", "fp16": "float16"}[self.amp]
        scaled = ", with loss scaling" if self.amp == "fp16" else ""
        return (
            f"precision: products and gathers in {name}{scaled}, as amp = {self.amp} asks; sums, "
            "losses, master weights and the optimiser in float32"
        )

    def peak_learning_rate(self, d_sae: int) -> float:
        """`learning_rate`, or its default for a dictionary of `d_sae` latents."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.optimizer == "sgd":  # whose clipped steps have a norm that d_sae does not change
            return 0.1
        at_16k = {"signum": 1e-4, "schedule_free_signum": 1e-3}.get(self.optimizer, 2e-4)
        return at_16k / math.sqrt(d_sae / 2**14)
