"""Training straight from a model: its forward passes feed one autoencoder for each hook point.

Nothing is written to disk but the runs. All autoencoders, of every hook point, seed and setting of
a sweep, take the rows of the same passes, see model_stream.py and sweep.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sae_fast.activations import Column
from sae_fast.activations.capture import Documents, Harvester, LanguageModel
from sae_fast.activations.capture.cache import CachingHarvester
from sae_fast.activations.capture.config import CaptureConfig
from sae_fast.activations.capture.directory import CaptureDirectory
from sae_fast.activations.capture.plan import Capture, open_capture
from sae_fast.activations.shared import SharedReader, SharedSource
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.config.effects import check_effects
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import Effect, rules_of, setting
from sae_fast.json_files import is_integer
from sae_fast.training.checkpoint import find_checkpoint, read_newest_state
from sae_fast.training.downstream import Downstream, DownstreamModel
from sae_fast.training.from_model.model_stream import HookRows, ModelStream
from sae_fast.training.from_model.sequence_stream import SequenceStream
from sae_fast.training.labels import label_columns, needs_sequences
from sae_fast.training.resume_state import check_state
from sae_fast.training.signals import StopOnSignal
from sae_fast.training.sweep import MakeTrainer, Sweep, with_settings
from sae_fast.training.trainer import Trainer

# Defaults of the field's trainers of this kind that differ from a training on shards.
SAE_DEFAULTS: dict[str, Any] = {"expansion_factor": 32}
TRAIN_DEFAULTS: dict[str, Any] = {"learning_rate": 1e-3, "dead_percentage_threshold": 0.0005}
_DEAD_SHARE = TRAIN_DEFAULTS["dead_percentage_threshold"]
DEFAULT_K = 192


@configuration(checkpoint_every="save_every", wandb_log_every="wandb_log_frequency")
@dataclass(frozen=True)
class FromModelConfig(ConfigFile):
    """Train on the activations of a model while it reads a dataset: MODEL DATASET, then flags.

    The flags of a training on shards that mean something here are among them.
    """

    layers: tuple[int, ...] = setting(
        (), heading="Text and hook points", brief="blocks whose output is taken; default: 0"
    )
    """Blocks after which the residual stream is taken, from 0; default: 0."""
    hook_points: tuple[str, ...] = setting(
        (), metavar="NAME", brief="others: residual.L, attn_out.L, mlp_out.L, or a module"
    )
    """Other hook points: residual.L, attn_out.L, mlp_out.L, or the path of any module; * stands for
    all."""
    layer_stride: int | None = setting(None)
    """Every so many blocks, instead of layers, and in the patterns of hook_points."""
    max_tokens: int = setting(1_000_000, at_least=1, brief="tokens to train on")
    """Tokens to train on. [tokens]"""
    batch_size: int = setting(4, at_least=1, brief="sequences in a forward pass")
    """Sequences in a forward pass; a batch has this times ctx_len tokens. [sequences]"""
    ctx_len: int | None = setting(None, brief="tokens of a sequence; default: 512")
    """Tokens of a sequence; default: 512, or the model's context if that is shorter. [tokens]"""
    heldout_tokens: int = setting(16_384, brief="tokens kept for evaluation")
    """Tokens of the last documents, which are kept for evaluation; 0: none. [tokens]"""
    cache_dir: Path | None = setting(None, metavar="DIR", brief="keep the activations here")
    """Keep the activations as shards here, as the capture command writes them."""
    shard_tokens: int = setting(
        1 << 20,
        needs=Effect(
            "cache_dir, where the shards are kept", lambda text: text.cache_dir is not None
        ),
    )
    """Rows of a shard in cache_dir. [tokens]"""
    save_dir: Path = setting(Path("output"), metavar="DIR", brief="where runs are written")
    """Where runs are written, each in a directory of its name."""
    run_name: str | None = setting(
        None, metavar="NAME", brief="name of the run's directory; default: a new one"
    )
    """Name of the run's directory; default: a new one, such as topk-k192-1."""
    save_every: int = setting(1000, at_least=0, brief="interval of the checkpoints")
    """Interval of the checkpoints; 0: only at the end. [steps]"""
    log_to_wandb: bool = setting(False)
    """Log to Weights & Biases, to wandb_project or, without one, to sae_fast."""
    wandb_log_frequency: int = setting(100, at_least=1)
    """Interval of the rows that go to Weights & Biases. [steps]"""
    init_seeds: tuple[int, ...] = setting((42,), brief="an autoencoder is trained for each")
    """Seeds of the initialisation; an autoencoder is trained for each of them."""
    shuffle_seed: int = setting(42)
    """Seed of the order of documents and rows."""
    text_column: str | None = setting(None, heading="Reading the dataset and the model")
    """Column of the dataset with the documents; default: text, or the only one with texts."""
    dataset_config: str | None = setting(None)
    """Configuration of a dataset on the hub that has several."""
    split: str = setting("train")
    """Part of the dataset."""
    text_split: Literal["line", "paragraph", "document"] = setting("line")
    """What a document is in a .txt file; document: the whole file."""
    pack: bool = setting(True)
    """Put one document after another in a sequence; encoders have one document in each anyway."""
    exclude_special_tokens: bool = setting(False)
    """Leave out BOS, EOS, [CLS], [SEP] and the like: the model reads them, no row is made."""
    data_preprocessing_num_proc: int = setting(1)
    """Processes that tokenise; 1: the tokenizer's own threads. [processes]"""
    revision: str | None = setting(None)
    """Branch, tag or commit of a model on the hub."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto")
    """Type in which the model runs; auto: as in its checkpoint."""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        if not self.init_seeds or len(set(self.init_seeds)) < len(self.init_seeds):
            given = " ".join(map(str, self.init_seeds)) or "none"
            raise ValueError(f"init_seeds must be different numbers, got {given}")
        check_effects(self)

    def capture_config(self, model: str, dataset: str, device: str) -> CaptureConfig:
        """Return the settings of the capture: what the model reads, and where it is read."""
        names = {item.name for item in fields(CaptureConfig)} & {item.name for item in fields(self)}
        own = {name: getattr(self, name) for name in names}
        if not (self.layers or self.hook_points or self.layer_stride):
            own["layers"] = (0,)
        return CaptureConfig(
            model=model,
            dataset=dataset,
            device=device,
            num_proc=self.data_preprocessing_num_proc,
            **own,
        )


@torch.inference_mode(False)  # as in Trainer
def open_from_model(
    model: str | LanguageModel,
    dataset: str | Documents,
    settings: FromModelConfig,
    configs: Mapping[str, RunConfig],
    directory: Path | None = None,
    *,
    stop: StopOnSignal | None = None,
    show_progress: bool = True,
) -> Sweep:
    """Make the trainings on a model's activations: for each hook point all of `configs`.

    Args:
        model: a folder, or a name on the Hugging Face hub, or a model in memory.
        dataset: a name on the hub, a folder or files, or documents in memory.
        settings: what the model reads, and how.
        configs: of the trainings on a hook point; for each of `init_seeds` there is one of these.
            Their batch size is replaced by the tokens of a forward pass, `checkpoint_dir` by one
            in `directory`.
        directory: where the runs are written; None: nowhere.
        stop: tells when to stop, see `Sweep`.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: in one line, for what does not fit.
    """
    first = next(iter(configs.values())).train
    for config in configs.values():
        _check_model(config.sae)
        _check_train(config.train)
    if first.num_threads is not None:
        torch.set_num_threads(first.num_threads)
    capture = _open_capture(model, dataset, settings, first.device)
    tokens = capture.batches.config
    own: dict[str, Any] = {
        "batch_size": tokens.batch_size * tokens.ctx_len,
        "checkpoint_dir": directory and str(directory),
    }
    if capture.heldout is None and first.dead_percentage_threshold == _DEAD_SHARE:
        own["dead_percentage_threshold"] = 0.0  # the default, of rows that there are not
    every = _for_every_hook(capture, settings.init_seeds, configs, own)
    saes = [config.sae for config in configs.values()]
    is_end_to_end = any(sae.is_end_to_end for sae in saes)
    make = (_through_model if is_end_to_end else _shuffled)(capture, settings, every)
    return Sweep(every, make, stop=stop, show_progress=show_progress)


def _open_capture(
    model: str | LanguageModel, dataset: str | Documents, settings: FromModelConfig, device: str
) -> Capture:
    """Open the capture from a model and documents, each given by its name or in memory."""
    model_name, name = (
        given if isinstance(given, str) else given.name for given in (model, dataset)
    )
    return open_capture(
        settings.capture_config(model_name, name, device),
        model=None if isinstance(model, str) else model,
        documents=None if isinstance(dataset, str) else dataset,
    )


def _shuffled(
    capture: Capture, settings: FromModelConfig, configs: Mapping[str, RunConfig]
) -> MakeTrainer:
    """Return what makes trainers on rows in a random order."""
    first = next(iter(configs.values())).train
    heldout = _heldout_rows(capture)
    harvester = Harvester(capture.hooked, capture.batches, max_tokens=settings.max_tokens)
    if settings.cache_dir is not None:
        names = tuple(hook.name for hook in capture.hooked.hooks)
        harvester = CachingHarvester(capture, CaptureDirectory(settings.cache_dir, names))
    stream = ModelStream(
        harvester,
        capture.widths,
        batch_size=first.batch_size,
        pool_rows=_pool_rows(first, settings.max_tokens),
        seed=first.order_seed,
        max_tokens=settings.max_tokens,
        identity=_identity(capture),
        rows_per_pass=capture.estimated_rows()[0],
        whole_sequences=any(needs_sequences(config.sae) for config in configs.values()),
    )
    shared: SharedSource[HookRows] = SharedSource(stream, len(configs))

    def make(name: str, config: RunConfig) -> Trainer:
        hook = name.partition("/")[0]
        reader = _reader(shared, hook, capture, stream.columns)
        rows = heldout.get(hook)
        return Trainer(config.sae, config.train, reader, heldout=rows, show_progress=False)

    return make


def _pool_rows(config: TrainConfig, max_tokens: int) -> int:
    """Return how many rows are shuffled together.

    A resumed run keeps its own number, on which the order of its rows depends, also where more
    tokens than before would let it be larger. Another number that is asked for is not replaced.
    """
    pool_rows = min(config.pool_rows, max_tokens)
    if config.resume_from is None or config.checkpoint_dir is None:
        return pool_rows
    path = find_checkpoint(config.resume_from, Path(config.checkpoint_dir))
    if path is None:
        return pool_rows
    state = read_newest_state(path, check_state)
    before, used = state["config"]["train"].get("pool_rows"), state["source"].get("pool_rows")
    is_open = config.pool_rows in (TrainConfig.pool_rows, before)
    return used if is_open and is_integer(used) and used > 0 else pool_rows


def _through_model(
    capture: Capture, settings: FromModelConfig, configs: Mapping[str, RunConfig]
) -> MakeTrainer:
    """Return what makes trainers on whole sequences, whose loss is the language model's."""
    losses = {config.sae.loss_fn for config in configs.values()}
    model = capture.model
    if model.network.get_output_embeddings() is None:
        raise ValueError(
            f"loss_fn {' and '.join(sorted(losses))} needs a model that predicts tokens: "
            f"{type(model.network).__name__} has no language-model head"
        )
    if settings.cache_dir is not None:
        raise ValueError("cache_dir needs loss_fn mse or fvu")
    for config in configs.values():
        if needs_sequences(config.sae):
            raise ValueError("temporal_smoothness_coeff needs loss_fn mse or fvu")
    masked_token = None
    if "ce" in losses and not model.causal:
        masked_token = model.tokenizer.mask_token_id
        if masked_token is None:
            raise ValueError("loss_fn ce of a masked model needs a tokenizer with a mask token")
    stream = SequenceStream(
        capture.hooked,
        capture.batches,
        max_tokens=settings.max_tokens,
        identity=_identity(capture),
        seed=next(iter(configs.values())).train.order_seed,
        masked_token=masked_token,
        rows_per_pass=capture.estimated_rows()[0],
    )
    shared: SharedSource[HookRows] = SharedSource(stream, len(configs))
    heldout = [] if capture.heldout is None else [*map(stream.rows_of, capture.heldout.iterate())]
    hooks = {hook.name: hook for hook in capture.hooked.hooks}

    def make(name: str, config: RunConfig) -> Trainer:
        hook = hooks[name.partition("/")[0]]
        reader = _reader(shared, hook.name, capture, stream.columns)
        batches = [rows[hook.name] for rows in heldout]
        downstream = None
        if config.sae.is_end_to_end:
            kind = config.sae.loss_fn
            rest = DownstreamModel(model.network, hook, kind, causal=model.causal)
            downstream = Downstream(rest, batches)
        rows = torch.cat([rows.x for rows in batches]).cpu() if batches else None
        return Trainer(
            *(config.sae, config.train, reader),
            heldout=rows,
            downstream=downstream,
            show_progress=False,
        )

    return make


def _check_model(sae: SAEConfig) -> None:
    """Raise ValueError for a model that needs more than the activations of one hook point."""
    if sae.transcoder:
        raise ValueError("a transcoder trains on shards: capture its two hook points first")
    for name in label_columns(sae):
        raise ValueError(f"the labels {name!r} lie in shards: capture first, then add them")


def _check_train(train: TrainConfig) -> None:
    """Raise ValueError for settings of shards, which would be ignored here."""
    defaults = TrainConfig.defaults()
    for name, rules in rules_of(train).items():
        value = getattr(train, name)
        if rules.shards_only and value != defaults[name]:
            raise ValueError(f"{name} = {value!r} is for training on shards: {rules.shards_only}")


def _reader(
    shared: SharedSource[HookRows], hook: str, capture: Capture, columns: Mapping[str, Column]
) -> SharedReader[HookRows]:
    model = capture.recipe(1)["model"]
    layer = next((item.layer for item in capture.hooked.hooks if item.name == hook), None)
    told = {"model": model["name"], "hook": hook, "layer": layer, "revision": model["revision"]}
    told["dataset"] = capture.config.dataset
    origin = {name: str(value) for name, value in told.items() if value is not None}
    return shared.reader(lambda rows: rows[hook], capture.widths[hook], columns, origin)


def _for_every_hook(
    capture: Capture,
    seeds: Sequence[int],
    configs: Mapping[str, RunConfig],
    changes: Mapping[str, Any],
) -> dict[str, RunConfig]:
    """Return the trainings by hook point, setting and seed, each in a directory of these names."""
    found = {}
    for hook in capture.hooked.hooks:
        for own, config in configs.items():
            base = RunConfig(sae=config.sae, train=replace(config.train, **changes))
            for seed in seeds:
                parts = [hook.name, own, f"seed_{seed}" if len(seeds) > 1 else ""]
                name = "/".join(filter(None, parts))
                found[name] = with_settings(base, name, {"seed": seed})
    return found


def _heldout_rows(capture: Capture) -> dict[str, Tensor]:
    """Compute the rows [n, D] float32 that are kept for evaluation, by hook point."""
    if capture.heldout is None:
        return {}
    limit = capture.config.heldout_tokens
    parts: dict[str, list[Tensor]] = {hook.name: [] for hook in capture.hooked.hooks}
    for harvest in Harvester(capture.hooked, capture.heldout, max_tokens=limit):
        for name, rows in harvest.activations.items():
            parts[name].append(rows.float().cpu())
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _identity(capture: Capture) -> dict[str, Any]:
    """Return what rows and their order depend on, which a resumed run must have again."""
    recipe = capture.recipe(1)
    settings = recipe["settings"]
    names = ("heldout_tokens", "batch_size", "ctx_len", "pack", "exclude_special_tokens")
    own = {name: settings[name] for name in (*names, "shuffle_seed", "model_dtype")}
    # The column as it was asked for, by which runs begun before it was always recorded go on.
    dataset = {**recipe["dataset"], "text_column": capture.config.text_column}
    return {"model": recipe["model"], "dataset": dataset, "hooks": recipe["hooks"], **own}
