"""Configuration of a model (`SAEConfig`), of its training (`TrainConfig`), of both (`RunConfig`).

Field names are the flags of the command line and the keys of the JSON files. The text under a field
is its help; its unit stands in brackets.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sae_fast.config_file import ConfigFile, with_aliases

DEFAULT_EXPANSION_FACTOR = 8


@with_aliases(input_dim="d_in", num_latents="d_sae")
@dataclass(frozen=True, kw_only=True)
class SAEConfig(ConfigFile):
    """The model: architecture, sizes, the terms of its loss, normalisation and initialisation.

    `d_in=0` leaves the sizes open until the data are known (`with_d_in`); a model needs them.
    """

    section: ClassVar[str] = "sae"

    arch: Literal["topk", "batch_topk"] = "topk"
    """Architecture: the k largest latents of every token, or k a token on average over a batch."""
    d_in: int = 0
    """Width of an activation, also accepted as input_dim; 0: taken from the data. [numbers]"""
    d_sae: int = 0
    """Number of latents, also accepted as num_latents; 0: expansion_factor times d_in. [latents]"""
    expansion_factor: float | None = None
    """d_sae / d_in, in place of d_sae; 8 when neither is given. [ratio]"""
    k: int = 32
    """Latents active per token; with batch_topk on average. [latents]"""
    use_relu: bool = True
    """ReLU on the selected values, so that codes are never negative; must be true."""

    reconstruction_coeff: float = 1.0
    """Weight of the squared error, summed over d_in and averaged over tokens."""
    l1_penalty_coeff: float = 0.0
    """Weight of the sum of a token's code values, averaged over tokens."""
    decorrelation_coeff: float = 0.0
    """Weight of the squared cosine of two decoder rows, averaged over all pairs."""
    probe_loss_coeff: float = 0.0
    """Weight of the probe-guided loss; must be 0, this version has none."""
    temporal_smoothness_coeff: float = 0.0
    """Weight of the temporal smoothness loss; must be 0, this version has none."""
    aux_k_coeff: float = 1 / 32
    """Weight of AuxK, in which dead latents model the error left by the others; 0: off."""
    aux_k: int | None = None
    """Dead latents per token in AuxK, at most as many as are dead; default: d_in / 2. [latents]"""
    dead_after_tokens: int = 10_000_000
    """A latent that has not fired for so long counts as dead. [tokens]"""

    normalize_activations: Literal["mean_scale", "none"] = "mean_scale"
    """mean_scale: subtract the mean, scale to an expected norm of sqrt(d_in); none: as they are."""
    decoder_init: Literal["random", "orthogonal"] = "random"
    """Unit decoder rows, random or orthogonal in blocks of d_in; W_enc starts equal to W_dec."""
    b_dec_init: Literal["zero", "mean", "geometric_median"] = "zero"
    """Start of b_dec: zero (right for centred data), or the centre of the first activations."""

    def __post_init__(self) -> None:
        """Check every field and complete d_sae; raises ValueError naming field and value."""
        self._check_types()
        self._require("d_in", self.d_in >= 0, "at least 1, or 0 to take it from the data")
        self._require("d_sae", self.d_sae >= 0, "at least 1, or 0 for expansion_factor * d_in")
        if self.expansion_factor is not None:
            self._require("expansion_factor", self.expansion_factor > 0, "greater than 0")
        self._require("k", self.k >= 1, "at least 1")
        if self.d_in > 0:
            self._complete_d_sae()
        if self.d_sae > 0:
            self._require("k", self.k <= self.d_sae, f"at most d_sae = {self.d_sae}")
        self._check_objective()

    def _complete_d_sae(self) -> None:
        factor = self.expansion_factor
        derived = round(self.d_in * (DEFAULT_EXPANSION_FACTOR if factor is None else factor))
        if self.d_sae == 0:
            self._require(
                "expansion_factor", derived >= 1, f"large enough for a latent at d_in = {self.d_in}"
            )
            object.__setattr__(self, "d_sae", derived)
        elif factor is not None and derived != self.d_sae:
            raise ValueError(
                f"expansion_factor must agree with d_sae = {self.d_sae} at d_in = {self.d_in} "
                f"(give one of the two), got {factor:g}"
            )

    def _check_objective(self) -> None:
        if not self.use_relu:
            raise ValueError(
                f"use_relu must be true for arch {self.arch!r}, got False: latents fire above 0"
            )
        for name in ("probe_loss_coeff", "temporal_smoothness_coeff"):
            self._require(name, getattr(self, name) == 0, "0 (this version has no such term)")
        for name in (
            "reconstruction_coeff",
            "l1_penalty_coeff",
            "decorrelation_coeff",
            "aux_k_coeff",
        ):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        if self.aux_k is not None:
            self._require(
                "aux_k", self.aux_k >= 1, "at least 1 (aux_k_coeff = 0 switches AuxK off)"
            )
        self._require("dead_after_tokens", self.dead_after_tokens >= 1, "at least 1")

    @property
    def is_complete(self) -> bool:
        """Whether the sizes are known, as a model needs them."""
        return self.d_in > 0 and self.d_sae > 0

    def with_d_in(self, d_in: int) -> SAEConfig:
        """The same for activations of width `d_in`; raises ValueError if made for another width."""
        if self.d_in not in (0, d_in):
            raise ValueError(f"d_in must be {d_in}, the width of the activations, got {self.d_in}")
        return dataclasses.replace(self, d_in=d_in)


_NAMES = ("shard_dir", "activations_key", "heldout", "device", "checkpoint_dir", "resume_from")
_COUNTS = (
    *("pool_rows", "batch_size", "grad_acc_steps", "max_epochs", "max_steps", "max_tokens"),
    *("num_threads", "log_every", "keep_checkpoints"),
)
_NOT_NEGATIVE = (
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "seed",
    "eval_every",
    "checkpoint_every",
)


@with_aliases(lr="learning_rate", use_amp="amp")
@dataclass(frozen=True, kw_only=True)
class TrainConfig(ConfigFile):
    """The training run: data, optimiser, schedule, precision, logging and checkpoints."""

    section: ClassVar[str] = "train"

    shard_dir: str | None = None
    """Directory of HDF5 shards with the activations to train on."""
    activations_key: str = "activations"
    """Name of the data set inside a shard."""
    heldout: str | None = None
    """Held-out shards, a directory or a glob; default: the files heldout*.h5 in shard_dir."""
    pool_rows: int = 65_536
    """Size of the shuffle pool. [tokens]"""
    skip_nonfinite: bool = False
    """Drop and count rows with NaN or infinity instead of stopping at them."""

    batch_size: int = 4096
    """Tokens per forward pass; an optimiser step takes grad_acc_steps of these. [tokens]"""
    grad_acc_steps: int = 1
    """Batches whose gradients are averaged into one optimiser step. [batches]"""
    max_epochs: int | None = None
    """Passes over the data; default: 1, or as many as max_steps or max_tokens takes. [epochs]"""
    max_steps: int | None = None
    """Stop after so many optimiser steps. [steps]"""
    max_tokens: int | None = None
    """Stop after so many tokens. [tokens]"""

    learning_rate: float | None = None
    """Peak learning rate, also accepted as lr; default: 2e-4 / sqrt(d_sae / 2**14)."""
    warmup_steps: int | None = None
    """Linear rise of the learning rate; default: 5 % of the run. [steps]"""
    decay_fraction: float = 0.2
    """Share of the run, at its end, in which the learning rate falls linearly. [share]"""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: float = 1e-8
    """Adam's term in the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay, per step and unit of learning rate."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    fused: bool = True
    """Fused optimiser on factored gradients; false: dense gradients and torch.optim.AdamW."""

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

    log_every: int = 10
    """Interval of the metrics. [steps]"""
    eval_every: int = 500
    """Interval of the held-out evaluation; 0: only at the end. [steps]"""
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
        self._require("decay_fraction", 0 <= self.decay_fraction <= 1, "between 0 and 1")
        betas_hold = all(0 <= beta < 1 for beta in self.betas)
        self._require("betas", betas_hold, "two numbers from 0 to below 1")

    @property
    def precision(self) -> Literal["screened", "bf16", "fp16"]:
        """Mode of the encoder's product that `amp` asks for."""
        return "screened" if self.amp == "off" else self.amp

    def peak_learning_rate(self, d_sae: int) -> float:
        """`learning_rate`, or its default for a dictionary of `d_sae` latents."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 / math.sqrt(d_sae / 2**14)


@dataclass(frozen=True, kw_only=True)
class RunConfig(ConfigFile):
    """Model and training together: the `config.json` of a run.

    In a file the fields stand in the sections "sae" and "train", or all at the top level.
    """

    sae: SAEConfig = field(default_factory=SAEConfig)
    """The model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Its training."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Make the configuration from JSON values; raises ValueError naming unknown keys."""
        return cls(**cls._read_sections(values, sae=SAEConfig, train=TrainConfig))
