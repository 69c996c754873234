"""The start of a training: from a checkpoint, from another model, or from its first activations."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sae_fast import interop
from sae_fast.activations import TARGETS, Source, Transform, origin_difference
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.folding import unfold_normalization_
from sae_fast.autoencoder.foreign import looks_like_hub_name
from sae_fast.autoencoder.initialization import sample_rows
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.config.setting import rules_of
from sae_fast.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    read_newest_intact,
)
from sae_fast.training.data import TrainingData
from sae_fast.training.latent_rows import LatentRows
from sae_fast.training.resume_state import FORMAT_VERSION, check_state
from sae_fast.training.run_directory import RunDirectory
from sae_fast.training.schedule import Schedule

logger = logging.getLogger(__name__)

_COUNTERS = ("tokens_since_fired",)
_NORMALIZATION = ("activation_mean", "activation_scale", "target_mean", "target_scale")
_UNIT = 1e-4  # how far the norm of a decoder row may be from 1 and be called 1
_OTHER_UNITS = 4.0  # factor of the variance


def resumed_checkpoint(config: TrainConfig, *, writes: bool = True) -> Checkpoint | None:
    """Read the checkpoint that `resume_from` names; None where the run starts from the beginning.

    Args:
        config: of the training.
        writes: whether this process will write to the run.

    Raises CheckpointError where it names none, none that is intact, or one of a run that is in use.
    """
    if config.resume_from is None:
        return None
    directory = None if config.checkpoint_dir is None else Path(config.checkpoint_dir)
    if directory is not None and writes:
        RunDirectory(directory, config.keep_checkpoints).check_free()
    path = find_checkpoint(config.resume_from, directory)
    if path is None:
        logger.warning("%s holds no checkpoint yet: starting from the beginning", directory)
        return None
    return read_newest_intact(path, check_state)


def saved_config(checkpoint: Checkpoint) -> RunConfig:
    """Return the configuration of the run that wrote a checkpoint.

    Raises CheckpointError where its format is not the one that this version reads.
    """
    version = checkpoint.state.get("format_version")
    if version != FORMAT_VERSION:
        known = f"this version reads {FORMAT_VERSION}"
        raise CheckpointError(f"{checkpoint.path}: format version {version}, {known}")
    return RunConfig.from_saved(checkpoint.state["config"])


def with_saved_batch(config: TrainConfig, checkpoint: Checkpoint | None) -> TrainConfig:
    """Return the configuration of a run with the batch size that a resumed one began with.

    A batch size that is given stays.
    """
    if checkpoint is None or config.batch_size is not None:
        return config
    return replace(config, batch_size=saved_config(checkpoint).train.batch_size)


def sized_config(
    config: SAEConfig, d_in: int, checkpoint: Checkpoint | None, d_out: int = 0
) -> SAEConfig:
    """Return the configuration with the widths of the data, checked against the checkpoint.

    Args:
        config: what was asked for.
        d_in: width of the activations.
        checkpoint: what the run is resumed from, if anything.
        d_out: width of a transcoder's targets.

    Raises:
        CheckpointError: naming the first field in which the checkpoint's model differs.
    """
    if checkpoint is None:
        return config.resolve(d_in, d_out)
    before = saved_config(checkpoint).sae
    if before.d_in != d_in:
        raise CheckpointError(
            f"{checkpoint.path} is of a model with d_in = {before.d_in}, "
            f"these activations are {d_in} wide"
        )
    # Forms that are left open stay what they were, also where their default has changed since.
    rules = rules_of(config)
    forms = {
        name: getattr(before, name)
        for name in rules
        if rules[name].on_resume == "kept" and getattr(config, name) is None
    }
    config = replace(config, **forms).resolve(d_in, d_out)
    if type(before) is not type(config):
        raise CheckpointError(
            f"{checkpoint.path} is of a model with arch = {before.arch}, "
            f"this run's has {config.arch}"
        )
    for name in rules:
        value, known = getattr(config, name), getattr(before, name)
        if rules[name].on_resume != "free" and known != value:
            raise CheckpointError(
                f"{checkpoint.path} is of a model with {name} = {known}, this run's has {value}"
            )
    return config


def warn_of_changes(
    checkpoint: Checkpoint, config: RunConfig, rate: Schedule, sae: SparseAutoencoder
) -> None:
    """Say how a resumed run differs from the run before: in its length and in its settings.

    Args:
        checkpoint: what the run was resumed from.
        config: of the run now.
        rate: the learning rate of the run now.
        sae: the model.
    """
    rules = rules_of(config.train)
    harmless = {name for name in rules if rules[name].on_resume == "free"}
    # Dense codes, and a skip connection: torch's products follow the threads.
    if sae.architecture.needs_host_sync or sae.config.skip_connection:
        harmless.remove("num_threads")
    before = checkpoint.state.get("scheduler_state")  # not in checkpoints of older versions
    if before is not None and (told := rate.told_after(before)) is not None:
        logger.info("%s", told)
    settings = checkpoint.state["config"]["train"]
    if saved_config(checkpoint).train.batches_per_step == config.train.batches_per_step:
        harmless |= {"grad_acc_steps", "mesh"}  # of one result
    changes = [
        f"{name} {settings.get(name)} -> {value}"
        for name, value in config.to_dict()["train"].items()
        if name not in harmless and _plain(settings.get(name)) != _plain(value)
    ]
    if changes:
        logger.warning("resumed with other settings than before: %s", ", ".join(changes))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def normalize_(sae: SparseAutoencoder, data: TrainingData) -> None:
    """Estimate mean and scale of a run's activations, and of its targets, for a new model."""
    if not sae.config.has_scale:
        return
    sae.set_normalization_(*data.normalization())
    if sae.config.transcoder:
        sae.set_target_normalization_(*data.target_normalization())


def serve_in_units_of(sae: SparseAutoencoder, source: Source) -> None:
    """Let a source serve its rows, and targets, with the mean and scale of the model."""
    if not sae.config.has_scale:
        return
    transform, of_targets = Transform(sae.activation_mean, float(sae.activation_scale)), None
    if sae.config.transcoder:
        of_targets = Transform(sae.target_mean, float(sae.target_scale))
    source.set_transform(transform, of_targets)


def initialize_(
    sae: SparseAutoencoder, source: Source, rows_per_epoch: int, config: TrainConfig
) -> None:
    """Start a model from the seed and, where it asks for some, the first activations.

    These are served again.
    """
    generator = torch.Generator().manual_seed(config.seed)
    wanted = min(sample_rows(sae.config), rows_per_epoch)
    if wanted == 0:
        return sae.initialize_(generator)
    batches = source.peek(math.ceil(wanted / config.kept_batch_size))
    sample = torch.cat([x for x, _ in batches])
    if sae.config.normalizes_tokens:  # which sources do not
        sample = sae.normalize(sample)
    if not sae.config.transcoder:
        return sae.initialize_(generator, sample)
    targets = torch.cat([columns[TARGETS] for _, columns in batches])
    return sae.initialize_(generator, sample, targets)


def model_to_start_from(config: TrainConfig) -> SparseAutoencoder | None:
    """Read the model that `start_from` names, also of another library; None: it names none.

    Raises ValueError, naming the setting, where it names no model.
    """
    if config.start_from is None:
        if config.start_from_elsewhere:
            raise ValueError("start_from_elsewhere needs start_from, the model to start from")
        return None
    place = config.start_from
    if looks_like_hub_name(place):
        return _read_start(place)
    path = Path(place)
    try:
        if not (path / "sae.safetensors").exists() and interop.recognise(path) is None:
            path = find_checkpoint(place, None) or path
    except CheckpointError:
        if not (path.is_dir() and interop.dictionaries_in(path)):
            raise ValueError(f"start_from: {path} is no model, no checkpoint and no run") from None
    except ValueError as error:
        raise ValueError(f"start_from: {error}") from None
    return _read_start(path)


def _read_start(place: str | Path) -> SparseAutoencoder:
    try:
        return SparseAutoencoder.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"start_from: {error}") from error


def taken_from(known: SparseAutoencoder | None, sae: SAEConfig) -> SAEConfig:
    """Return the configuration with what a model to start from decides, where that was left open.

    That is the architecture, its sizes and its selection of latents.
    """
    if known is None:
        return sae
    before, given = known.config, dict(sae.given)
    if given.get("arch", before.arch) != before.arch:
        return sae  # which `check_start` refuses
    rules = rules_of(before)
    left = [name for name in rules if rules[name].of_start and name not in ("d_in", "d_out")]
    left += [name for name in rules if rules[name].at_start and before.takes(name)]
    if "expansion_factor" in given:
        left.remove("d_sae")
    if before.normalize_activations == "none":
        left.remove("normalize_activations")  # raw parameters fit any normalisation
    taken = {name: getattr(before, name) for name in left if name not in given}
    return type(before)(**{**taken, **given})


def check_start(
    known: SparseAutoencoder | None,
    sae: SAEConfig,
    config: TrainConfig,
    origin: Mapping[str, Any],
) -> None:
    """Check that a training may start from a model.

    Args:
        known: the model; None where the run starts from a new one.
        sae: the configuration of the model to train.
        config: names the model to start from.
        origin: the origin of the training's activations, as far as it is known.

    Raises:
        ValueError: naming the setting, where it cannot be what this training starts from, or is of
            other activations and the settings do not ask for that.
    """
    if known is None:
        if sae.slots_mode == "separate_value":
            raise ValueError(
                "slots_mode separate_value trains the value heads alone: "
                "name the model with trained slots by --start-from"
            )
        return
    path = config.start_from
    names = [name for name, rules in rules_of(sae).items() if rules.of_start]
    if sae.slots_mode == "separate_value":
        # The heads read slots in units of the target that these were trained to.
        names.append("slot_target")
    if known.config.normalize_activations == "none" and not sae.normalizes_tokens:
        names.remove("normalize_activations")
    for name in names:
        before, now = getattr(known.config, name), getattr(sae, name)
        if before != now:
            raise ValueError(
                f"start_from: {path} is of a model with {name} = {before}, this one has {now}"
            )
    difference = origin_difference(known.origin, origin)
    if difference is not None and not config.start_from_elsewhere:
        raise ValueError(
            f"start_from: {path} is of {difference}, which these activations are of; "
            "--start-from-elsewhere starts from it on purpose"
        )


def warn_of_other_units(sae: SparseAutoencoder, data: TrainingData) -> None:
    """Warn where a model's mean and scale are far from what the rows have.

    Plain tensors and files do not say from which model and hook they come.
    """
    if not sae.config.has_scale:
        return
    found = data.normalization()
    variance = float(sae.activation_scale**2) / found.scale**2
    moved = (found.mean.cpu() - sae.activation_mean.cpu()).square().sum()
    offset = float(sae.activation_scale**2 * moved) / sae.config.d_in
    if not 1 / _OTHER_UNITS <= variance <= _OTHER_UNITS or offset > 1:
        logger.warning(
            "start_from: these rows have %.3g times the variance of those that the model was "
            "trained on, and a mean %.3g times their norm away; its mean and scale are kept: they "
            "may be of another model, layer or hook",
            variance,
            math.sqrt(offset),
        )


@torch.no_grad()
def start_from_(
    sae: SparseAutoencoder, known: SparseAutoencoder, data: TrainingData, rows: LatentRows
) -> None:
    """Copy what both models have, normalisation included; the dead-latent counters start anew.

    Of the known model, which is whole, `sae` gets the rows of this process. A model of raw
    activations starts one with a normalisation, of this data, as the same function.

    Raises ValueError where a tensor has another shape.
    """
    is_raw = known.config.normalize_activations == "none"
    unfolds = is_raw and sae.config.has_scale
    if unfolds:
        normalize_(sae, data)
    else:
        warn_of_other_units(known, data)
    state, kept = rows.of(known.state_dict()), (*_COUNTERS, *(_NORMALIZATION if unfolds else ()))
    for name, tensor in sae.state_dict().items():
        if name not in state or name in kept:
            continue
        if state[name].shape != tensor.shape:
            shapes = tuple(state[name].shape), tuple(tensor.shape)
            raise ValueError(f"start_from: {name} has shape {shapes[0]}, this model's {shapes[1]}")
        tensor.copy_(state[name])
    if unfolds:
        unfold_normalization_(sae)
    _fit_norms_(sae)


def _fit_norms_(sae: SparseAutoencoder) -> None:
    """Put decoder rows to unit length where training will keep them so."""
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    others = ~((norms - 1).abs() <= _UNIT)
    if not sae.architecture.unit_norm or int(sae.engine.count_latents(others)) == 0:
        return
    if sae.architecture.compares_latents:
        logger.warning(
            "start_from: decoder rows have norms from %.3g to %.3g, and training puts them to 1, "
            "which changes the reconstructions",
            float(norms.min()),
            float(norms.max()),
        )
    else:
        sae.fold_decoder_norms()
