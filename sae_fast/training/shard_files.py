"""The shards that a configuration names: to train on, to evaluate with, and their targets.

They are checked, and described by a `ShardMix` of one set, or of the sets that `mix` names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from sae_fast.activations import (
    ShardError,
    ShardMix,
    ShardSet,
    TargetFiles,
    check_same_origin,
    check_same_width,
    find_shards,
    find_targets,
    mix_shards,
    open_shards,
)
from sae_fast.activations.cutting import cut_shards, joined
from sae_fast.activations.normalization import sample_spans
from sae_fast.activations.remote import local_place
from sae_fast.activations.scanning import ScanRecord
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.setting import rules_of
from sae_fast.training.labels import label_columns, needs_sequences

logger = logging.getLogger(__name__)


def describe_training_shards(config: TrainConfig, sae: SAEConfig) -> ShardMix:
    """Open the shards to train on without reading a row, and without labels and sequences."""
    parts = _parts(config)
    sets = []
    for name, _ in parts:
        paths, held = _find_shards(config, name)
        targets = _target_files(config, sae, paths, config.target_shard_dir, held)
        described = open_shards(paths, key=config.activations_key, verify=False, targets=targets)
        sets.append(_without_held(config, described))
    return mix_shards(sets, [weight for _, weight in parts])


def has_heldout_shards(config: TrainConfig) -> bool:
    """Return whether there are shards to evaluate with."""
    if config.heldout_fraction:
        return True
    return any(find_shards(name, config.heldout)[1] for name, _ in _parts(config))


def open_training_shards(
    config: TrainConfig, saes: Sequence[SAEConfig], record: ScanRecord, *, sample: bool = False
) -> ShardMix:
    """Open the shards to train on, with the labels, sequences and targets that models need.

    A shard that `record` knows is not read, and what reading finds is noted there. With `sample`
    the rows of a single set from which its normalisation is estimated are kept.

    Raises:
        ShardError: naming the shard that cannot be trained on, or not with the others.
        ValueError: naming the setting that is missing or wrong.
    """
    parts = _parts(config)
    labels = dict.fromkeys(name for sae in saes for name in label_columns(sae))
    whole_sequences = any(needs_sequences(sae) for sae in saes)
    sets = []
    for name, _ in parts:
        paths, held = _find_shards(config, name)
        targets = [
            _target_files(config, sae, paths, config.target_shard_dir, held)
            for sae in saes
            if sae.transcoder or not any(other.transcoder for other in saes)
        ]
        shards = open_shards(
            paths,
            key=config.activations_key,
            verify=config.verify != "off",
            lazy=config.verify == "lazy",
            skip_nonfinite=config.skip_nonfinite,
            columns=tuple(labels),
            whole_sequences=whole_sequences,
            targets=targets[0],
            repeated_rows=config.repeated_rows,
            record=record,
            sample=sample_spans if sample and len(parts) == 1 else None,
            max_norm_multiple=config.max_norm_multiple,
        )
        if shards.is_zero:
            raise ShardError(f"{name}: all rows are zero, there is nothing to train on")
        sets.append(_without_held(config, shards))
    mix = mix_shards(sets, [weight for _, weight in parts])
    if len(sets) > 1:
        for (name, _), shards, share in zip(parts, sets, mix.shares, strict=True):
            passes = share * mix.rows / shards.rows
            described = f"{shards.rows:,} rows, {passes:.1f} passes an epoch"
            logger.info("mixing %.4g %% from %s (%s)", 100 * share, name, described)
    return mix


def open_heldout_shards(
    config: TrainConfig, sae: SAEConfig, train: ShardMix, record: ScanRecord
) -> ShardSet | None:
    """Open the shards to evaluate with, of every directory of a mix; None: there are none.

    With `heldout_fraction` they are the rows that were cut from those to train on.

    Raises ShardError and ValueError as `open_training_shards` does.
    """
    if cut := [shards.held for shards in train.sets if shards.held is not None]:
        return joined(cut)
    held: list[Path] = []
    for name, _ in _parts(config):
        held += [path for path in find_shards(name, config.heldout)[1] if path not in held]
    if not held:
        return None
    shards = open_shards(
        held,
        key=config.activations_key,
        verify=config.verify != "off",
        lazy=config.verify == "lazy",
        skip_nonfinite=config.skip_nonfinite,
        columns=label_columns(sae) if sae.arch == "slots" else (),
        targets=_heldout_target_files(config, sae, held),
        repeated_rows=config.repeated_rows,
        record=record,
        max_norm_multiple=config.max_norm_multiple,
    )
    check_same_width(train.sets[0], shards)
    check_same_origin(*train.sets, shards)
    return shards


def _find_shards(config: TrainConfig, name: str) -> tuple[list[Path], list[Path]]:
    """Return the shards of a directory to train on, and to evaluate with.

    Raises ValueError where there are shards to evaluate with and a fraction of the others too.
    """
    paths, held = find_shards(name, config.heldout)
    if held and config.heldout_fraction:
        raise ValueError(
            f"heldout_fraction = {config.heldout_fraction:g} needs a directory without held-out "
            f"shards, and there is {held[0]}"
        )
    return paths, held


def _without_held(config: TrainConfig, shards: ShardSet) -> ShardSet:
    """Return a set without its last rows, which are its `held`, where a fraction is held out."""
    if not config.heldout_fraction:
        return shards
    train, held = cut_shards(shards, config.heldout_fraction)
    return replace(train, held=held)


def _parts(config: TrainConfig) -> tuple[tuple[str, Fraction], ...]:
    """Return every directory to train on with its weight."""
    if config.shard_dir is not None:
        return ((config.shard_dir, Fraction(1)),)
    if not config.mix:
        raise ValueError("shard_dir is missing: name a directory of shards with --shard-dir")
    known: dict[str, str] = {}
    for name, _ in config.mix_weights:
        if (first := known.setdefault(os.path.realpath(name), name)) is not name:
            raise ValueError(f"mix: {name} is named twice, the first time as {first}")
    return config.mix_weights


def _target_files(
    config: TrainConfig,
    sae: SAEConfig,
    shards: Sequence[Path],
    place: str | None,
    others: Iterable[Path] = (),
) -> TargetFiles | None:
    """Find the targets of shards; None: the model has none."""
    if not sae.transcoder:
        for name, rules in rules_of(TrainConfig).items():
            if rules.of_transcoder and (value := getattr(config, name)) is not None:
                raise ValueError(
                    f"{name} belongs to a transcoder and must be left out without --transcoder, "
                    f"got {value!r}"
                )
        return None
    if place is None and config.target_key is None:
        raise ValueError(
            "a transcoder needs targets: name their data set in the shards with --target-key, "
            "or the directory with their files with --target-shard-dir"
        )
    return find_targets(shards, place, config.target_key or config.activations_key, others)


def _heldout_target_files(
    config: TrainConfig, sae: SAEConfig, held: Sequence[Path]
) -> TargetFiles | None:
    if config.target_heldout is not None:
        return _target_files(config, sae, held, config.target_heldout)
    place = config.target_shard_dir
    if place is None:
        return _target_files(config, sae, held, place)
    if local_place(place).is_file():
        raise ValueError(
            f"target_heldout is missing: {place} is one file, with the targets to train on"
        )
    assert config.shard_dir is not None  # target_shard_dir needs it
    train = find_shards(config.shard_dir, config.heldout)[0]
    return _target_files(config, sae, held, place, train)
