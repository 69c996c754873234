"""`TrainConfig`: how a model is trained. Part of sae_fast.config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sae_fast.config.effects import Run, check_effects
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.mesh import parsed_mesh
from sae_fast.config.setting import MOST_THREADS, Effect, require, setting

_OF_MODEL = "MODEL computes the activations while it reads DATASET"
_TARGETS = "a transcoder trains on shards: capture its two hook points first"
_KEPT = "the rows are computed, cache_dir keeps them as shards"
_OWN_TEXT = "eval_metrics takes the model and its held-out text"
_EVAL_METRICS = Effect("eval_metrics, above 0", lambda train: train.eval_metrics > 0)
_AVERAGES_GRADIENTS = ("sgd", "signum", "schedule_free_signum")
_A_SHUFFLE = Effect(
    "loss_fn mse or fvu, where rows are shuffled", lambda run: not run.sae.is_end_to_end
)
_ADAM = Effect(
    "optimizer = 'adam' or 'adamw'; the others have momentum",
    lambda train: train.optimizer not in _AVERAGES_GRADIENTS,
)

_WANDB = Effect(
    "logger wandb, or wandb_project",
    lambda train: train.wandb_project is not None or "wandb" in train.logger,
)
_MESH = Effect("mesh, of several processes", lambda train: train.mesh is not None)
LARGEST_BATCH = 4096  # tokens, by default
DEFAULT_PROJECT = "sae_fast"  # of Weights & Biases


def _has_sparsity(run: Run) -> bool:
    weights = run.sae.term_coefficients
    return weights["l1_loss"] > 0 or weights["sparsity_loss"] > 0


def _has_more_terms(run: Run) -> bool:
    return any(
        weight > 0 for name, weight in run.sae.term_coefficients.items() if name != "recon_loss"
    )


@configuration(lr="learning_rate", use_amp="amp", batch_tokens="batch_size", init_from="start_from")
@dataclass(frozen=True, kw_only=True)
class TrainConfig(ConfigFile):
    """The training run: data, optimiser, schedule, precision, logging and checkpoints."""

    title: ClassVar[str] = "Training"
    section: ClassVar[str] = "train"

    if TYPE_CHECKING:  # the other names of settings, which `configuration` adds
        lr: float = 0.0
        use_amp: bool | Literal["off", "bf16", "fp16"] = "off"
        batch_tokens: int | None = None
        init_from: str | None = None

    shard_dir: str | None = setting(
        None,
        nonempty=True,
        on_resume="free",
        shards_only=_OF_MODEL,
        of_files=True,
        metavar="DIR",
        heading="Data",
        brief="directory of shards with the activations to train on",
        elsewhere=("data_dir", "data", "activations", "shards"),
    )
    """Directory of HDF5 shards with the activations to train on; one that holds a folder of shards
    for each hook point, as a capture writes, trains a dictionary on each of them."""
    mix: tuple[str, ...] | None = setting(
        None,
        on_resume="free",
        shards_only=_OF_MODEL,
        of_files=True,
        metavar="DIR:WEIGHT",
        brief="several directories in place of --shard-dir, with weights",
    )
    """Several such directories in place of shard_dir, each with the weight that it has among the
    rows, DIR:WEIGHT; an epoch lasts until each was served whole, smaller ones begin again."""
    activations_key: str = setting(
        "activations",
        nonempty=True,
        shards_only=_OF_MODEL,
        of_files=True,
        run_needs=Effect("shards whose data sets have names", lambda run: run.has_names()),
    )
    """Name of the data set inside a shard."""
    heldout: str | None = setting(
        None,
        nonempty=True,
        on_resume="free",
        shards_only="heldout_tokens holds back the last documents",
        of_files=True,
    )
    """Held-out shards, a directory or a glob; default: the files heldout*.h5 in shard_dir."""
    heldout_fraction: float = setting(
        0.0,
        at_least=0,
        below=1,
        must="a share, from 0 to below 1",
        shards_only="heldout_tokens holds back the last documents",
        run_needs=Effect(
            "shards, a tensor or an iterator; give the held-out rows themselves beside a source",
            lambda run: run.data in ("shards", "tensor", "iterator"),
        ),
        elsewhere=("val_fraction", "validation_fraction", "test_split"),
    )
    """Share of the rows that is held out, the last ones of each directory or of a tensor, the first
    ones of an iterator, where no held-out shards are given; 0: none. [share]"""
    target_key: str | None = setting(
        None,
        nonempty=True,
        shards_only=_TARGETS,
        of_files=True,
        of_transcoder=True,
        run_needs=Effect("targets whose data sets have names", lambda run: run.has_target_names()),
    )
    """Name of the data set with a transcoder's targets; default: with target_shard_dir the name
    of the activations' data set."""
    target_shard_dir: str | None = setting(
        None,
        nonempty=True,
        on_resume="free",
        shards_only=_TARGETS,
        of_files=True,
        of_transcoder=True,
    )
    """Directory with the targets of shard_dir, in files of the same names; default: the shards
    themselves hold them."""
    target_heldout: str | None = setting(
        None,
        nonempty=True,
        on_resume="free",
        shards_only=_TARGETS,
        of_files=True,
        of_transcoder=True,
    )
    """Directory with the targets of the held-out shards; default: target_shard_dir."""
    pool_rows: int = setting(65_536, at_least=1, run_needs=_A_SHUFFLE)
    """Size of the shuffle pool. [tokens]"""
    keep_in_memory: bool = setting(
        False,
        on_resume="free",
        shards_only=_KEPT,
        of_files=True,
    )
    """Keep all rows in memory, as stored, once they were read; the order stays what it is."""
    pin: bool = setting(
        False,
        on_resume="free",
        shards_only=_KEPT,
        needs=Effect("keep_in_memory, whose rows it locks", lambda train: train.keep_in_memory),
    )
    """Lock the rows that keep_in_memory keeps, so that they are never swapped out. Batches for a
    GPU are always page-locked."""
    device_cache: bool = setting(False, on_resume="free", shards_only=_KEPT, of_files=True)
    """Keep all rows on the GPU, as stored, once they were read, and make the batches there."""
    skip_nonfinite: bool = setting(
        False,
        shards_only="no row is left out, a NaN or infinity ends the training",
        run_needs=Effect(
            "shards or a tensor; rows of a source are not left out",
            lambda run: run.data in ("shards", "tensor"),
        ),
    )
    """Drop and count rows with NaN or infinity instead of stopping at them."""
    max_norm_multiple: float | None = setting(
        None,
        above=1,
        shards_only="no row is left out, every token is trained on",
        run_needs=Effect(
            "shards or a tensor; rows of a source are not left out",
            lambda run: run.data in ("shards", "tensor"),
        ),
    )
    """Drop and count rows whose norm is more than so many times the median norm, as the norms of
    attention sinks are; mean and scale are of the rows that are left. The median is known to within
    a fifth. Default: none are dropped."""
    verify: Literal["off", "lazy", "full"] = setting(
        "full", on_resume="free", shards_only="the rows are computed, not read", of_files=True
    )
    """Checks of the shards. full: before the first step each is read once, unless it is known and
    unchanged; lazy: rows are looked at when they are first read; off: only NaN and infinity are
    noticed."""
    repeated_rows: Literal["refuse", "drop", "keep"] = setting(
        "refuse",
        shards_only="no row is left out, and all of them are computed",
        of_files=True,
    )
    """Rows of shards that are zero or equal to the row before them, as rows never written and
    padding are. refuse: more than 1 % of a shard are an error; drop: all are dropped and counted;
    keep: they are trained on."""

    batch_size: int | None = setting(
        None,
        at_least=1,
        decided_by="batch_size",
        spelt="batch_tokens",
        heading="Batches and length",
        brief="tokens in a batch; default: by the length of the run",
        instead={"batch_sequences": "a batch of shards has --batch-tokens tokens"},
    )
    """Tokens per forward pass, also --batch-size; an optimiser step takes grad_acc_steps of these.
    Default: 4096, without max_steps and grad_acc_steps in a run of fewer than 4.1 million tokens
    2048, below 2.05 million 1024, below 256,000 512, and below 128,000 256. [tokens]"""
    grad_acc_steps: int = setting(1, at_least=1)
    """Batches whose gradients are averaged into one optimiser step; the variance of fvu, target_l0
    and the selection of batch_topk are of the whole step. [batches]"""
    max_epochs: int | None = setting(
        None,
        at_least=1,
        shards_only="max_tokens says how long to train",
        brief="passes over the data; default: 1",
        elsewhere=("epochs",),
    )
    """Passes over the data; default: 1, or as many as max_steps or max_tokens takes. [epochs]"""
    max_steps: int | None = setting(
        None,
        at_least=1,
        brief="stop after this number of steps",
        elsewhere=("steps", "n_steps", "num_steps", "training_steps"),
    )
    """Stop after this number of optimiser steps. [steps]"""
    max_tokens: int | None = setting(
        None, at_least=1, decided_by="max_tokens", brief="stop after this number of tokens"
    )
    """Stop after this number of tokens. [tokens]"""

    reconstruction_epochs: float = setting(
        0.0,
        at_least=0,
        sweep=True,
        run_needs=Effect("another term of the loss than the first", _has_more_terms),
        heading="Start",
    )
    """Passes over the data, at the start, whose loss is the reconstruction alone. [epochs]"""
    start_from: str | None = setting(None, nonempty=True, sweep=True)
    """Model to start from, also --init-from: a checkpoint, a run, a directory that save wrote, a
    dictionary of another library, or owner/name[/subfolder][@revision] on the Hugging Face hub; its
    architecture and sizes are taken where none are given; default: a new one."""
    start_from_elsewhere: bool = setting(
        False,
        sweep=True,
        needs=Effect(
            "start_from, the model to start from", lambda train: train.start_from is not None
        ),
    )
    """Start also from a model of another hook, layer or model than the activations are of."""

    learning_rate: float | None = setting(
        None,
        above=0,
        sweep=True,
        heading="Learning rate and schedules",
        brief="peak learning rate, also --lr; default: by size and optimizer",
    )
    """Peak learning rate, also accepted as lr; default: of adam 2e-4 / sqrt(d_sae / 2**14), of a
    model with k in a run of less than 50,000 steps sqrt(50,000 / steps) times that, at most 0.01,
    and where a step has less than 1024 tokens times sqrt(tokens / 1024); of relu, jumprelu and
    gated half of it in all batches; of signum half as much as of adam, of schedule_free_signum 5
    times as much, 0.1 of sgd. Straight from a model, 1e-3 of the others."""
    warmup_steps: int | None = setting(
        None, at_least=0, sweep=True, within_run=True, elsewhere=("lr_warm_up_steps",)
    )
    """Linear rise of the learning rate; default: 5 % of the run. [steps]"""
    sparsity_warmup_steps: int | None = setting(
        None,
        at_least=0,
        sweep=True,
        within_run=True,
        run_needs=Effect(
            "a sparsity penalty, l1_penalty_coeff or, of jumprelu, sparsity_penalty_coeff above 0",
            _has_sparsity,
        ),
    )
    """Linear rise of the weight of the sparsity penalties; default: 5 % of the run. [steps]"""
    k_anneal_start: int | None = setting(None, at_least=1, sweep=True)
    """k of the first step, from which it falls linearly to the model's k; default: no fall. In
    between it takes at most 4 values per halving. [latents]"""
    k_anneal_steps: int | None = setting(
        None,
        at_least=0,
        sweep=True,
        within_run=True,
        needs=Effect("k_anneal_start", lambda train: train.k_anneal_start is not None),
    )
    """Length of this fall; default: 5 % of the run. [steps]"""
    decay_fraction: float | None = setting(
        None,
        at_least=0,
        at_most=1,
        sweep=True,
        elsewhere=("lr_scheduler", "lr_decay_steps", "scheduler"),
    )
    """Share of the run, at its end, in which the learning rate falls linearly; default: 0.2, with
    adam and all architectures but slots 0.4 in a run of less than 50,000 steps, of
    schedule_free_signum 0. [share]"""
    optimizer: Literal["adam", "adamw", "sgd", "signum", "schedule_free_signum"] = setting(
        "adam", sweep=True, heading="Optimiser", brief="update rule"
    )
    """Update rule. adamw: adam with weight decay; sgd: with momentum; signum: lr times a momentum's
    sign; schedule_free_signum: lr times the gradient's sign, and the average of the weights is the
    model."""
    betas: tuple[float, float] | None = setting(
        None,
        at_least=0,
        below=1,
        must="two numbers from 0 to below 1",
        sweep=True,
        needs=_ADAM,
    )
    """Adam's decay rates of the first and second moment; default: 0.9 and 0.999, of all
    architectures but slots 0.8 and 1 - 5 / steps, from 0.95 to 0.999, in a run of less than 50,000
    steps."""
    eps: float = setting(1e-8, above=0, sweep=True, needs=_ADAM)
    """Adam's term in the denominator."""
    momentum: float | None = setting(
        None,
        at_least=0,
        below=1,
        sweep=True,
        needs=Effect(
            "optimizer = 'sgd', 'signum' or 'schedule_free_signum'; 'adam' and 'adamw' have betas",
            lambda train: train.optimizer in _AVERAGES_GRADIENTS,
        ),
    )
    """Share of the momentum of sgd and signum that is kept from step to step, 0.9 by default; with
    schedule_free_signum the share of the average at the point where gradients are taken, 0.95 by
    default."""
    weight_decay: float = setting(
        0.0,
        at_least=0,
        sweep=True,
        needs=Effect(
            "optimizer = 'adamw', which decouples it from the gradient, or 'sgd', 'signum' or "
            "'schedule_free_signum'; 'adam' has none",
            lambda train: train.optimizer != "adam",
        ),
    )
    """Weight decay, per step and unit of learning rate: decoupled; of sgd part of the gradient."""
    grad_clip: float = setting(1.0, at_least=0, sweep=True)
    """Largest global norm of the gradient; 0: no clipping."""
    optimizer_states: Literal["fp32", "bf16", "8bit"] = setting("fp32", sweep=True)
    """Moments of the weights, two of adam, one of the others: 4, 2 or 1 byte each; below fp32
    rounded at random. schedule_free_signum has fp32 and bf16."""
    average_decay: float = setting(0.0, at_least=0, below=1, sweep=True)
    """Decay of a moving average of the weights, evaluated and saved beside them; 0: none."""
    fused: bool = setting(True, sweep=True)
    """Use the fused optimiser on factored gradients; false: dense gradients and an optimiser of
    torch."""

    amp: Literal["off", "bf16", "fp16"] = setting(
        "off",
        sweep=True,
        bare="bf16",
        heading="Precision and device",
        brief="precision of products and gathers",
    )
    """Low-precision products and gathers, also accepted as use_amp; off: exact fp32 results."""
    device: str = setting("cpu", nonempty=True, brief="device to train on, such as cuda")
    """Device to train on."""
    cuda_graph: bool = setting(True, on_resume="free")
    """On a GPU, launch a whole step at once, as a CUDA graph; needs fused. The result is equal."""
    num_threads: int | None = setting(None, at_least=1, at_most=MOST_THREADS, on_resume="free")
    """CPU threads; default: torch's own choice. [threads]"""
    seed: int = setting(
        0,
        at_least=0,
        sweep=True,
        decided_by="init_seeds",
        brief="seed of initialisation and of the order of the data",
    )
    """Seed of initialisation and of the order of the data."""
    shuffle_seed: int | None = setting(
        None,
        at_least=0,
        decided_by="shuffle_seed",
        run_needs=Effect(
            "shards, a tensor or a model; a source has an order of its own",
            lambda run: run.data in ("shards", "tensor", "model"),
        ),
    )
    """Seed of the order of the data; default: seed."""

    mesh: str | None = setting(
        None,
        nonempty=True,
        metavar="AXIS=SIZE",
        heading="Several processes",
        brief="what processes divide: data=2, latents=2, data=2,latents=2 or layers=2",
    )
    """What the processes that torchrun has started divide: data=R the batches of a step, R at a
    time, of one training; latents=R the latents of its model, 1/R of the memory;
    data=A,latents=B both, with A times B processes; layers=R the trainings of a sweep, of several
    seeds or hook points, a block of them each. The results equal what one process gives, with
    data=R and R times as many grad_acc_steps, to the bit, but for sums of floats with latents=R."""
    mesh_timeout: float = setting(10.0, above=0, on_resume="free", needs=_MESH)
    """How long one of these processes waits for another that does not answer. [minutes]"""

    log_every: int = setting(
        10, at_least=1, on_resume="free", heading="Logs, evaluation and checkpoints"
    )
    """Interval of the metrics. [steps]"""
    wandb_log_every: int | None = setting(
        None, at_least=1, on_resume="free", decided_by="wandb_log_frequency"
    )
    """Interval of the rows that go to W&B and TensorBoard; default: log_every. [steps]"""
    eval_every: int = setting(500, at_least=0, on_resume="free")
    """Interval of the held-out evaluation; 0: only at the end. [steps]"""
    eval_metrics: int = setting(0, at_least=0, on_resume="free", bare="1")
    """At every so many evaluations, and at the end, measure what the language model loses with the
    reconstructions in place of its activations: heldout_ce and more; 0: never. A training from
    a model reads its held-out text, a training on shards a dataset that is named for it.
    [evaluations]"""
    eval_dataset: str | None = setting(
        None, nonempty=True, on_resume="free", needs=_EVAL_METRICS, shards_only=_OWN_TEXT
    )
    """Text that the model reads for eval_metrics: a dataset on the hub, a folder, or .jsonl, .json,
    .txt, .csv or .parquet files."""
    eval_model: str | None = setting(
        None, nonempty=True, on_resume="free", needs=_EVAL_METRICS, shards_only=_OWN_TEXT
    )
    """The model of the activations, for eval_metrics: a folder, or a name on the hub; default: the
    one that the shards name."""
    eval_hook: str | None = setting(
        None, nonempty=True, on_resume="free", needs=_EVAL_METRICS, shards_only=_OWN_TEXT
    )
    """Hook point of the activations in that model, such as residual.3; default: the one that the
    shards name."""
    eval_tokens: int = setting(
        16_384, at_least=1, on_resume="free", needs=_EVAL_METRICS, shards_only=_OWN_TEXT
    )
    """Tokens of the text, about: whole batches are read. [tokens]"""
    dead_percentage_threshold: float = setting(
        0.0,
        at_least=0,
        below=1,
        must="a share, from 0 to below 1",
        on_resume="free",
        run_needs=Effect("held-out rows, of which it is a share", lambda run: run.has_heldout),
    )
    """Share of the held-out tokens below which a latent that fires on them counts as dead in
    heldout_dead_fraction; one that never fires always does. [share]"""
    checkpoint_every: int = setting(
        500,
        at_least=0,
        on_resume="free",
        decided_by="save_every",
    )
    """Interval of the checkpoints; 0: only at the end. [steps]"""
    checkpoint_minutes: float | None = setting(None, above=0, on_resume="free")
    """Write a checkpoint also when this time has passed since the last one; default: only every
    checkpoint_every steps. [minutes]"""
    max_hours: float | None = setting(None, above=0, on_resume="free")
    """Write a checkpoint and stop when this process has trained for this time; the exit code is
    then 75, and resume_from continues the run. At least one step is made. [hours]"""
    keep_checkpoints: int = setting(3, at_least=1, on_resume="free")
    """Number of the last checkpoints that are kept. [checkpoints]"""
    best_by: str | None = setting(
        None,
        nonempty=True,
        on_resume="free",
        metavar="METRIC",
        elsewhere=("metric_for_best_model", "monitor"),
    )
    """Figure of the evaluations that chooses the checkpoint best, such as heldout_ce_score. By
    default it is what the training minimises, of held-out rows where there are any: heldout_fvu;
    with a sparsity penalty objective, FVU and the penalty at full weight, or with target_l0 FVU +
    (L0 / target_l0 - 1)^2, and with batch_topk and matryoshka FVU + (L0 / k - 1)^2."""
    checkpoint_dir: str | None = setting(
        None,
        nonempty=True,
        on_resume="free",
        metavar="RUN",
        brief="directory of the run; default: a new one in runs/",
        elsewhere=("output_dir", "out", "save_path", "checkpoint_path"),
    )
    """Directory of the run: configuration, metrics, checkpoints; default: a new one in runs."""
    resume_from: str | None = setting(
        None,
        nonempty=True,
        on_resume="free",
        metavar="RUN",
        brief="continue a run: its directory, or latest of --checkpoint-dir",
        elsewhere=("resume",),
    )
    """Continue a run from latest or best of checkpoint_dir, a checkpoint, or another run."""
    logger: tuple[Literal["wandb", "tensorboard", "none"], ...] = setting((), on_resume="free")
    """Where metrics go beside metrics.jsonl: wandb, tensorboard, both, or none; default: wandb
    where wandb_project is given. TensorBoard's files lie in the directory of the run."""
    wandb_project: str | None = setting(
        None,
        on_resume="free",
        metavar="NAME",
        brief="log to this project of Weights & Biases",
        elsewhere=("wandb", "log_to_wandb", "use_wandb"),
    )
    """Weights & Biases project to log to; default: none, with logger wandb it is sae_fast."""
    wandb_entity: str | None = setting(None, on_resume="free", metavar="NAME", needs=_WANDB)
    """User or team of Weights & Biases that the project belongs to; default: your own."""
    wandb_name: str | None = setting(None, on_resume="free", metavar="NAME", needs=_WANDB)
    """Name of the run in Weights & Biases; default: the name of its directory. The trainings of a
    sweep add their own."""
    wandb_group: str | None = setting(None, on_resume="free", metavar="NAME", needs=_WANDB)
    """Group of the run in Weights & Biases; default: none, of a sweep the name of its directory."""
    wandb_tags: tuple[str, ...] = setting((), on_resume="free", metavar="TAG", needs=_WANDB)
    """Tags of the run in Weights & Biases."""
    no_wandb: bool = setting(False, on_resume="free")
    """Do not log to Weights & Biases, whatever wandb_project and logger say."""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        if not self.fused and self.optimizer_states != "fp32":
            raise ValueError(
                "optimizer_states must be 'fp32' where fused is false: optimisers of torch keep no "
                f"others, got {self.optimizer_states!r}"
            )
        if self.optimizer == "schedule_free_signum":
            self._check_schedule_free()
        if self.heldout is not None and self.heldout_fraction:
            raise ValueError(
                f"heldout = {self.heldout!r}, and heldout_fraction = {self.heldout_fraction:g}: "
                "give one of the two"
            )
        if "none" in self.logger and len(self.logger) > 1:
            raise ValueError(f"logger none stands alone, got {' '.join(self.logger)}")
        if self.verify != "full" and self.repeated_rows == "drop":
            raise ValueError(
                f"repeated_rows drop needs verify full, which finds the rows, got {self.verify!r}"
            )
        if self.verify != "full" and self.max_norm_multiple is not None:
            raise ValueError(
                f"max_norm_multiple needs verify full, which finds the norms, got {self.verify!r}"
            )
        if self.verify == "lazy" and self.skip_nonfinite:
            raise ValueError("skip_nonfinite needs verify full or off, got 'lazy'")
        self._check_mix()
        self._check_cache()
        parsed_mesh(self.mesh)
        check_effects(self)

    @classmethod
    def converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with `use_amp = true`, as other trainers write it, as the precision."""
        if isinstance(given := values.get("amp"), bool):
            return {**values, "amp": "bf16" if given else "off"}
        return values

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> TrainConfig:
        """Make the configuration of a run from the values saved with it.

        A weight decay without the name of an optimizer means adamw: such values were written before
        there was a choice.
        """
        if "optimizer" not in values and values.get("weight_decay"):
            values = {**values, "optimizer": "adamw"}
        return super().from_saved(values)

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
        require("mix", len(self.mix) > 0, "directories with their weights", self.mix)
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
    def loggers(self) -> tuple[Literal["wandb", "tensorboard"], ...]:
        """The services and files that metrics go to beside metrics.jsonl."""
        is_open = not self.logger and self.wandb_project is not None
        found: list[Literal["wandb", "tensorboard"]] = []
        if (is_open or "wandb" in self.logger) and not self.no_wandb:
            found.append("wandb")
        if "tensorboard" in self.logger:
            found.append("tensorboard")
        return tuple(found)

    @property
    def batches_per_step(self) -> int:
        """Batches of an optimiser step, of all processes."""
        return self.grad_acc_steps * parsed_mesh(self.mesh).get("data", 1)

    @property
    def mix_weights(self) -> tuple[tuple[str, Fraction], ...]:
        """Directory and weight of every part of `mix`; 0 for a weight that is no number."""
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
    def kept_batch_size(self) -> int:
        """`batch_size`, or what it is in a long run, see training/fitted_batch.py."""
        return LARGEST_BATCH if self.batch_size is None else self.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimiser step, with `kept_batch_size`."""
        return self.kept_batch_size * self.batches_per_step

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
        """Mode of the encoder's product that `amp` chooses."""
        return "screened" if self.amp == "off" else self.amp

    def describe_precision(self) -> str:
        """Return one sentence that says which numbers have which precision, and why."""
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
        """Return `learning_rate`, or its default for a dictionary of `d_sae` latents."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.optimizer == "sgd":  # its clipped steps have a norm that d_sae does not change
            return 0.1
        at_16k = {"signum": 1e-4, "schedule_free_signum": 1e-3}.get(self.optimizer, 2e-4)
        return at_16k / math.sqrt(d_sae / 2**14)
