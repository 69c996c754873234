"""Training straight from a model: its forward passes feed one autoencoder for each hook point.

Nothing is written to disk but the runs. All autoencoders, of every hook point, seed and setting of
a sweep, take the rows of the same passes, see model_stream.py and sweep.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_fast.activations import Column
from sae_fast.activations.capture import Documents, Harvester, LanguageModel, TokenBatches
from sae_fast.activations.capture.cache import CachingHarvester
from sae_fast.activations.capture.directory import CaptureDirectory
from sae_fast.activations.capture.image_model import ImageModel
from sae_fast.activations.capture.images import ImageBatches
from sae_fast.activations.capture.language_model import HookedModel, check_reads_once
from sae_fast.activations.capture.plan import Capture, open_capture
from sae_fast.activations.capture.shard_series import shard_metadata
from sae_fast.activations.origin import origin_of_attributes
from sae_fast.activations.shared import SharedReader, SharedSource
from sae_fast.autoencoder.initialization import sample_rows
from sae_fast.autoencoder.loss_terms import LossTerm
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.config.mesh import divides
from sae_fast.config.model_text import TRAIN_DEFAULTS, FromModelConfig
from sae_fast.config.setting import rules_of
from sae_fast.distributed.ranks import Ranks, open_ranks
from sae_fast.evaluation.language_model import SplicedLosses
from sae_fast.evaluation.model_text import model_text
from sae_fast.json_files import is_integer
from sae_fast.training.callbacks import Callback
from sae_fast.training.checkpoint import CheckpointStore, find_checkpoint, read_newest_state
from sae_fast.training.data import SAMPLED_BATCHES
from sae_fast.training.downstream import Downstream, DownstreamModel
from sae_fast.training.from_model.divided_harvest import DividedHarvester, Division
from sae_fast.training.from_model.model_stream import HookRows, ModelStream
from sae_fast.training.from_model.sequence_stream import SequenceStream
from sae_fast.training.labels import label_columns, needs_sequences
from sae_fast.training.resume_state import check_state
from sae_fast.training.signals import StopOnSignal
from sae_fast.training.sweep import (
    MakeTrainer,
    OwnCode,
    Sweep,
    block_of,
    own_trainings,
    ranks_of_sweep,
    with_settings,
)
from sae_fast.training.trainer import Trainer

_DEAD_SHARE = TRAIN_DEFAULTS["dead_percentage_threshold"]


@torch.inference_mode(False)  # as in Trainer
def open_from_model(
    model: str | LanguageModel,
    dataset: str | Documents,
    settings: FromModelConfig,
    configs: Mapping[str, RunConfig],
    directory: Path | None = None,
    *,
    loss_terms: Sequence[LossTerm] = (),
    callbacks: Sequence[Callback] = (),
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
        loss_terms: of every training, see `Sweep`.
        callbacks: called by every training, see `Sweep`.
        stop: tells when to stop, see `Sweep`.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: in one line, for what does not fit.
    """
    first = next(iter(configs.values())).train
    ranks = open_ranks(first)
    for config in configs.values():
        _check_model(config.sae)
        _check_train(config.train)
    if first.num_threads is not None:
        torch.set_num_threads(first.num_threads)
    device = ranks.device_of(first.device)
    identity: dict[str, Any] = {}
    with ranks.agreement(lambda: {"its model and text": identity}):
        capture = _open_capture(model, dataset, settings, device)
        identity = _identity(capture)
    tokens = capture.batches.config
    of_passes: dict[str, Any] = {
        "batch_size": tokens.batch_size * tokens.ctx_len,
        "checkpoint_dir": directory and str(directory),
    }
    if capture.heldout is None and first.dead_percentage_threshold == _DEAD_SHARE:
        of_passes["dead_percentage_threshold"] = 0.0  # the default, of rows that there are not
    every = _for_every_hook(capture, settings.init_seeds, configs, of_passes)
    ranks_of_sweep(every)
    own_configs = own_trainings(every, ranks)
    division = _division(capture, every, ranks)
    ahead = 0 if division is None else _batches_looked_at(every, capture.widths)
    reads = _Reading(_with_hooks_of(capture, own_configs), identity, division, ahead)
    if ranks.size > 1 and settings.cache_dir is not None:
        raise ValueError("cache_dir must be left out with a mesh: a cache is filled by one process")
    saes = [config.sae for config in configs.values()]
    is_end_to_end = any(sae.is_end_to_end for sae in saes)
    own: OwnCode = {"loss_terms": loss_terms, "callbacks": callbacks}
    make = (_through_model if is_end_to_end else _shuffled)(reads, settings, own_configs, own)
    return Sweep(every, make, stop=stop, show_progress=show_progress)


class _Reading(NamedTuple):
    """The text and hook points that a process reads.

    Attributes:
        capture: with the hook points of this process.
        identity: of the rows of all processes.
        division: how processes divide the forward passes; None: they do not.
        ahead: batches of a divided text that are made before the first trainer.
    """

    capture: Capture
    identity: dict[str, Any]
    division: Division | None
    ahead: int

    def harvester(self, batches: TokenBatches | ImageBatches, max_tokens: int) -> Harvester:
        """Return what runs the model on batches."""
        if self.division is None:
            return Harvester(self.capture.hooked, batches, max_tokens=max_tokens)
        return DividedHarvester(self.division, batches, max_tokens=max_tokens)


def _division(capture: Capture, configs: Mapping[str, RunConfig], ranks: Ranks) -> Division | None:
    """Return how the processes of this machine divide the forward passes; None: they do not.

    Each runs the whole model by itself where that takes less time, and where the training does.
    """
    machine = ranks.on_machine()
    if machine.size == 1 or any(config.sae.is_end_to_end for config in configs.values()):
        return None
    blocks = [list(configs)] * machine.size
    if divides(next(iter(configs.values())).train.mesh, "layers"):
        blocks = [block_of(configs, number, ranks.size) for number in machine.numbers]
    wanted = [{name.partition("/")[0] for name in names} for names in blocks]
    hooks = [hook for hook in capture.hooked.hooks if any(hook.name in names for names in wanted)]
    found = Division(
        machine,
        HookedModel(capture.hooked.network, hooks),
        capture.widths,
        [[hook.name for hook in hooks if hook.name in names] for names in wanted],
    )
    return found if found.is_cheaper else None


def _batches_looked_at(configs: Mapping[str, RunConfig], widths: Mapping[str, int]) -> int:
    """Return how many batches any of the trainings looks at before its first step, at most."""
    most = 0
    for name, config in configs.items():
        sae = config.sae.resolve(widths[name.partition("/")[0]], 0)
        rows = sample_rows(sae)
        most = max(most, math.ceil(rows / config.train.kept_batch_size))
        if sae.has_scale or config.train.start_from is not None:
            most = max(most, SAMPLED_BATCHES)
    return most


def _with_hooks_of(capture: Capture, configs: Mapping[str, RunConfig]) -> Capture:
    """Return a capture with the hook points of these trainings only."""
    names = {name.partition("/")[0] for name in configs}
    hooks = [hook for hook in capture.hooked.hooks if hook.name in names]
    if len(hooks) == len(capture.hooked.hooks):
        return capture
    widths = {hook.name: capture.widths[hook.name] for hook in hooks}
    return replace(capture, hooked=HookedModel(capture.hooked.network, hooks), widths=widths)


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
    reading: _Reading, settings: FromModelConfig, configs: Mapping[str, RunConfig], own: OwnCode
) -> MakeTrainer:
    """Return what makes trainers on rows in a random order."""
    capture = reading.capture
    first = next(iter(configs.values())).train
    heldout = _heldout_rows(reading)
    harvester = reading.harvester(capture.batches, settings.max_tokens)
    if settings.cache_dir is not None:
        names = tuple(hook.name for hook in capture.hooked.hooks)
        harvester = CachingHarvester(capture, CaptureDirectory(settings.cache_dir, names))
    stream = ModelStream(
        harvester,
        capture.widths,
        batch_size=first.kept_batch_size,
        pool_rows=_pool_rows(first, settings.max_tokens),
        seed=first.order_seed,
        max_tokens=settings.max_tokens,
        identity=reading.identity,
        rows_per_pass=capture.estimated_rows()[0],
        whole_sequences=any(needs_sequences(config.sae) for config in configs.values()),
    )
    shared: SharedSource[HookRows] = SharedSource(stream, len(configs))

    def make(name: str, config: RunConfig) -> Trainer:
        resumed = config.train.resume_from
        # Trainings that begin look at the first batches, resumed ones do not. All processes take as
        # many, because they wait for each other; of several trainings the first takes them.
        if resumed is None or CheckpointStore.is_first(resumed):
            shared.read_ahead(reading.ahead)
        hook = name.partition("/")[0]
        reader = _reader(shared, hook, capture, stream.columns)
        return Trainer(
            *(config.sae, config.train, reader),
            heldout=heldout.get(hook),
            downstream=Downstream(losses=_losses(capture, hook, config)),
            **own,
            show_progress=False,
        )

    return make


def _losses(capture: Capture, hook: str, config: RunConfig) -> SplicedLosses | None:
    """Return what eval_metrics measures at a hook point, on the held-out text; None: nothing."""
    every = config.train.eval_metrics
    if not every:
        return None
    if capture.heldout is None:
        raise ValueError(f"eval_metrics = {every} needs held-out text, heldout_tokens above 0")
    hooks = tuple(item for item in capture.hooked.hooks if item.name == hook)
    text = model_text(
        *(capture, capture.heldout, hooks, (capture.widths[hook],)),
        seed=config.train.order_seed,
        max_tokens=capture.config.heldout_tokens,
    )
    return SplicedLosses(text)


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
    reading: _Reading, settings: FromModelConfig, configs: Mapping[str, RunConfig], own: OwnCode
) -> MakeTrainer:
    """Return what makes trainers on whole sequences, whose loss is the language model's."""
    capture, identity, *_ = reading
    losses = {config.sae.loss_fn for config in configs.values()}
    model = capture.model
    if isinstance(model, ImageModel) or model.network.get_output_embeddings() is None:
        raise ValueError(
            f"loss_fn {' and '.join(sorted(losses))} needs a model that predicts tokens: "
            f"{type(model.network).__name__} has no language-model head"
        )
    check_reads_once(model.network)
    assert isinstance(capture.batches, TokenBatches)  # which a language model reads
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
        identity=identity,
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
        losses = _losses(capture, hook.name, config)
        downstream = Downstream(losses=losses)
        if config.sae.is_end_to_end:
            kind = config.sae.loss_fn
            rest = DownstreamModel(model.network, hook, kind, causal=model.causal)
            downstream = Downstream(rest, batches, losses)
        rows = torch.cat([rows.x for rows in batches]).cpu() if batches else None
        return Trainer(
            *(config.sae, config.train, reader),
            heldout=rows,
            downstream=downstream,
            **own,
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
    layer = next((item.layer for item in capture.hooked.hooks if item.name == hook), None)
    shard = replace(shard_metadata(capture.recipe(1)), hook=hook, layer=layer)
    origin = origin_of_attributes(shard.attributes())
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
        for training, config in configs.items():
            base = RunConfig(sae=config.sae, train=replace(config.train, **changes))
            for seed in seeds:
                parts = [hook.name, training, f"seed_{seed}" if len(seeds) > 1 else ""]
                name = "/".join(filter(None, parts))
                found[name] = with_settings(base, name, {"seed": seed})
    return found


def _heldout_rows(reading: _Reading) -> dict[str, Tensor]:
    """Compute the rows [n, D] float32 that are kept for evaluation, by hook point."""
    capture = reading.capture
    if capture.heldout is None:
        return {}
    limit = capture.config.heldout_tokens
    parts: dict[str, list[Tensor]] = {hook.name: [] for hook in capture.hooked.hooks}
    for harvest in reading.harvester(capture.heldout, limit):
        for name, rows in harvest.activations.items():
            parts[name].append(rows.float().cpu())
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _identity(capture: Capture) -> dict[str, Any]:
    """Return the values that rows and their order depend on; a resumed run must have the same."""
    recipe = capture.recipe(1)
    settings = recipe["settings"]
    of_rows = {
        name: settings[name]
        for name, rules in rules_of(capture.config).items()
        if rules.recipe == "rows"
    }
    # The column as it was asked for: older runs recorded nothing else, and they can be resumed.
    dataset = {**recipe["dataset"], "text_column": capture.config.text_column}
    return {"model": recipe["model"], "dataset": dataset, "hooks": recipe["hooks"], **of_rows}
