"""The source that a run reads, shards, a tensor or a caller's own, and its held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations import (
    TARGETS,
    ActivationSource,
    ActivationStream,
    HeldOut,
    Rows,
    ShardMix,
    ShardSet,
    Source,
    TensorStream,
    Transform,
    estimate_normalization,
    full_origin,
    read_labels,
)
from sae_fast.activations.cutting import cut_tensors
from sae_fast.activations.given_arrays import Given, as_given_tensor
from sae_fast.activations.given_source import GivenSource
from sae_fast.activations.passing_source import PassingSource, stated_rows
from sae_fast.activations.pool import check_lockable
from sae_fast.activations.scanning import RECORD_NAME, ScanRecord
from sae_fast.activations.shard import Shard
from sae_fast.activations.shard_identity import check_same_shards, identity_of
from sae_fast.activations.shared import SharedReader, SharedSource
from sae_fast.activations.tensor_shards import open_shard
from sae_fast.activations.tensor_stream import digest_of, finite_rows
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.setting import rules_of
from sae_fast.training.device import checked_device
from sae_fast.training.fitted_batch import with_fitted_batch
from sae_fast.training.labels import check_columns, label_columns, needs_sequences
from sae_fast.training.shard_files import open_heldout_shards, open_training_shards

logger = logging.getLogger(__name__)

SAMPLED_BATCHES = 16  # at whose rows a new training looks, of a source that cannot be sampled


class SharedShards(NamedTuple):
    """Shards whose batches, of `batch_size` rows, several trainings take."""

    shards: ShardMix
    source: SharedSource[Rows]
    scans: ScanRecord
    batch_size: int


class OpenedSource(NamedTuple):
    """The source of a run, and what the mean and scale of its rows are estimated from.

    `config` is the configuration of the run with the batch size of the source.
    """

    config: TrainConfig

    # "source": a caller's own; "iterator": what gives one tensor after the other.
    kind: Literal["shards", "tensor", "source", "iterator", "model"]
    source: Source
    rows: ShardMix | Tensor | None = None  # None: the first batches
    targets: ShardMix | Tensor | None = None


def check_one_heldout(config: TrainConfig, *, is_given: bool) -> None:
    """Raise ValueError where held-out rows are given beside held-out shards."""
    for name in ("heldout", "heldout_fraction"):
        if is_given and (value := getattr(config, name)):
            raise ValueError(f"{name} = {value!r}, and a tensor: give one of the two")


def open_source(
    config: TrainConfig,
    sae: SAEConfig,
    data: Tensor | ActivationSource | Iterable[Any] | SharedShards | None,
    columns: Mapping[str, Tensor] | None,
    device: torch.device,
    scans: ScanRecord,
) -> OpenedSource:
    """Open the source that a run reads; it serves rows and targets as they are stored.

    Args:
        config: says where the shards are, and the sizes of batch and pool.
        sae: the model, which may need labels, sequences or targets.
        data: see `TrainingData`.
        columns: see `TrainingData`.
        device: what the batches are for.
        scans: what is known of the shards; what reading them finds is noted there.

    Raises:
        ShardError: naming the shard that cannot be trained on.
        ValueError: when there is nothing to train on, or not what the model needs.
    """
    if columns is not None and not isinstance(data, Tensor):
        raise ValueError("columns go with a tensor of activations, and none is given")
    if data is None:
        is_scaled = sae.has_scale and config.resume_from is None
        shards = open_training_shards(config, [sae], scans, sample=is_scaled)
        config = with_fitted_batch(config, shards.rows)
        stream = open_stream(config, shards, device)
        return OpenedSource(config, "shards", stream, shards, shards.targets)
    if isinstance(data, SharedShards):
        shards = data.shards
        reader = data.source.reader(_all, shards.d_in, shards.columns, full_origin(shards))
        config = replace(config, batch_size=data.batch_size)
        return OpenedSource(config, "shards", reader, shards, shards.targets)
    _refuse_settings_of_files(config)
    if isinstance(data, SharedReader):
        return OpenedSource(config, "model", data)
    if isinstance(data, Tensor):
        labels, targets = _split_targets("columns", columns, sae)
        config = with_fitted_batch(config, data.shape[:-1].numel())
        rows = TensorStream(
            data,
            batch_size=config.kept_batch_size,
            seed=config.order_seed,
            skip_nonfinite=config.skip_nonfinite,
            device=device,
            columns=labels,
            whole_sequences=needs_sequences(sae),
            targets=targets,
            max_norm_multiple=config.max_norm_multiple,
        )
        if config.max_norm_multiple is not None:  # mean and scale of the rows that are left
            return OpenedSource(config, "tensor", rows, rows.kept, rows.kept_targets)
        return OpenedSource(config, "tensor", rows, data, targets)
    if _gives_parts(data):
        config = with_fitted_batch(config, stated_rows(data))
        return OpenedSource(config, "iterator", _open_parts(config, data))
    if not hasattr(data, "next_batch"):
        as_given_tensor("data", data)  # says that it is neither a tensor nor a source
    given: Any = data
    config = replace(config, batch_size=config.kept_batch_size)
    return OpenedSource(config, "source", GivenSource(given, config.kept_batch_size))


class TrainingData:
    """The activations of a run, opened and checked but not yet read.

    Args:
        config: says where the shards are, and the sizes of batch and pool.
        data: rows [n, D] in a tensor or an array, what gives one such tensor after the other, a
            source of raw rows, or shards that other trainings read too; None: the shards of
            `config`.
        heldout: rows [n, D] for evaluation; None: the held-out shards of `config`, if any.
        device: what the batches are for.
        sae: the model, which may need labels or sequences.
        columns: labels [n] beside rows that are a tensor, and the targets [n, d_out] of a
            transcoder, named "targets".
        heldout_columns: labels beside `heldout`, which arch slots is evaluated with, and targets.

    Attributes:
        config: with the batch size, where it was left open.
        kind: where the rows come from; "source": a caller's own, "iterator": what gives one tensor
            after the other, "model": its forward passes.
        source: the batches to train on, as they are stored until it is told a transform.
        d_out: width of the targets of a transcoder; 0: there are none.
        heldout: the rows for evaluation, if any, batch by batch.
        heldout_targets: the targets of `heldout` for a transcoder, batch by batch.
        scans: what was found in the shards, which a resumed run need not read again.

    Raises:
        ShardError: naming the shard that cannot be trained on.
        ValueError: when there is nothing to train on, or not what the model needs.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Given | ActivationSource | Iterable[Any] | SharedShards | None,
        heldout: Given | None,
        device: torch.device,
        sae: SAEConfig,
        columns: Mapping[str, Given] | None = None,
        heldout_columns: Mapping[str, Given] | None = None,
    ) -> None:
        if heldout_columns is not None and heldout is None:
            raise ValueError("heldout_columns go with heldout, and none is given")
        check_one_heldout(config, is_given=heldout is not None)
        self._sae = sae
        self.scans = data.scans if isinstance(data, SharedShards) else known_scans(config)
        if isinstance(data, np.ndarray):
            data = as_given_tensor("data", data)
        labels = _as_tensors("columns", columns)
        cut: Tensor | None = None
        cut_labels = _as_tensors("heldout_columns", heldout_columns)
        if config.heldout_fraction and isinstance(data, Tensor):
            data, cut, labels, cut_labels = cut_tensors(data, labels, config.heldout_fraction)
        opened = open_source(config, sae, data, labels, device, self.scans)
        if isinstance(opened.source, PassingSource):
            cut = opened.source.held
        if cut is not None:
            cut, cut_labels = _finite_heldout(config, sae, cut, cut_labels or {})
        self.config, self.kind, self.source, self._rows, self._targets = opened
        self._shards = self._rows if isinstance(self._rows, ShardMix) else None
        if config.pin:
            check_lockable(self.source.memory_bytes)
        check_columns(sae, self.source.columns)
        self.d_out = self.source.columns[TARGETS].width if sae.transcoder else 0
        self.heldout_labels: Mapping[str, Tensor]
        self.heldout_targets: Iterable[Tensor] | None = None
        self.heldout_labels, targets = _split_targets("heldout_columns", cut_labels, sae)
        self._heldout_identity: dict[str, Any] | None = None
        self._heldout_parts: ShardSet | dict[str, Tensor] = {}
        rows = cut if heldout is None else as_given_tensor("heldout", heldout)
        self.heldout = self._open_heldout(rows, targets)
        self.scans.save_beside_manifests()

    def normalization(self) -> Transform:
        """Estimate the mean of the rows, and the scale that brings their norm to sqrt(D)."""
        if self._rows is None:
            return estimate_normalization(torch.cat([x for x, _ in self._sampled()]))
        result = estimate_normalization(self._rows)
        if self._shards is not None:
            for shards in self._shards.sets:
                shards.forget_kept()
        return result

    def target_normalization(self) -> Transform:
        """Estimate mean and scale of the transcoder targets."""
        if self._rows is None:
            parts = [columns[TARGETS] for _, columns in self._sampled()]
            return estimate_normalization(torch.cat(parts))
        assert self._targets is not None
        return estimate_normalization(self._targets)

    def _sampled(self) -> list[Rows]:
        """Return the first batches of the source as they are, which are served again."""
        self.source.set_transform(None)
        return self.source.peek(SAMPLED_BATCHES)

    def has_names(self, *, of_targets: bool = False) -> bool:
        """Return whether any file has a name for its data, as a bare tensor or array has not."""
        return self._shards is not None and have_names(self._shards, of_targets=of_targets)

    @property
    def heldout_shards(self) -> ShardSet | None:
        """The shards of the held-out rows; None: there are none, or they are a tensor."""
        return self._heldout_parts if isinstance(self._heldout_parts, ShardSet) else None

    @property
    def heldout_identity(self) -> dict[str, Any] | None:
        """Identity of the held-out rows as JSON values, compared when a run is resumed.

        None without such rows, and for the rows of a model, which the identity of its source
        covers.
        """
        if self._heldout_identity is None and self._heldout_parts:
            if isinstance(self._heldout_parts, ShardSet):
                self._heldout_identity = identity_of(self._heldout_parts)
            else:
                self._heldout_identity = {"tensor": digest_of(self._heldout_parts)}
        return self._heldout_identity

    def check_heldout(self, before: dict[str, Any] | None) -> None:
        """Raise ValueError if the held-out rows are not the ones that `before` identifies."""
        now = self.heldout_identity
        if before is None or now is None:
            return
        if "shards" in before and "shards" in now:
            check_same_shards(before, now, "the held-out shards")
        elif before != now:
            raise ValueError(
                "the held-out rows differ from the ones that the checkpoint was made with"
            )

    def _open_heldout(
        self, heldout: Tensor | None, targets: Tensor | None
    ) -> Iterable[Tensor] | None:
        config = self.config
        if heldout is not None:
            if heldout.shape[-1] != self.source.d_in:
                width = heldout.shape[-1]
                raise ValueError(
                    f"heldout: rows are {width} wide, those to train on {self.source.d_in}"
                )
            if heldout.numel() == 0:
                raise ValueError(f"heldout has no rows: shape {tuple(heldout.shape)}")
            rows = heldout.reshape(-1, self.source.d_in).float()
            for name, labels in self.heldout_labels.items():
                if labels.shape != (len(rows),):
                    raise ValueError(
                        f"heldout_columns: {name} must have shape ({len(rows)},), one a row, "
                        f"got {tuple(labels.shape)}"
                    )
            if self._sae.transcoder:
                targets = self._checked_heldout(targets, len(rows))
                self.heldout_targets = torch.split(targets, config.kept_batch_size)
            if self.kind != "model":
                self._heldout_parts = {"rows": rows, **self.heldout_labels}
                if targets is not None:
                    self._heldout_parts[TARGETS] = targets
            return torch.split(rows, config.kept_batch_size)
        if self._shards is None:
            return None
        shards = open_heldout_shards(config, self._sae, self._shards, self.scans)
        if shards is None:
            return None
        self._heldout_parts = shards
        self.heldout_labels = read_labels(shards)
        if shards.targets is not None:
            self.heldout_targets = HeldOut(shards.targets, batch_size=config.kept_batch_size)
        return HeldOut(shards, batch_size=config.kept_batch_size)

    def _checked_heldout(self, targets: Tensor | None, rows: int) -> Tensor:
        """Return the targets [rows, d_out] of the rows to evaluate on, checked."""
        if targets is None:
            raise ValueError(
                f"heldout_columns: {TARGETS!r} must be given beside heldout: "
                "the model is a transcoder"
            )
        if targets.shape[-1] != self.d_out or targets.numel() != rows * self.d_out:
            raise ValueError(
                f"heldout_columns: {TARGETS} must have shape {(rows, self.d_out)}, "
                f"got {tuple(targets.shape)}"
            )
        return targets.reshape(rows, self.d_out).float()


def _refuse_settings_of_files(config: TrainConfig) -> None:
    """Raise ValueError naming a setting that given data would leave without effect."""
    defaults = TrainConfig.defaults()
    for name, rules in rules_of(TrainConfig).items():
        value = getattr(config, name)
        if rules.of_files and value != defaults[name]:
            raise ValueError(f"{name} = {value!r} is for shards, not for given data")


def _gives_parts(data: object) -> TypeGuard[Iterable[Any]]:
    """Return whether data give one tensor after the other; a source gives batches, a text none."""
    is_other = isinstance(data, str | bytes | Mapping) or hasattr(data, "next_batch")
    return isinstance(data, Iterable) and not is_other


def _open_parts(config: TrainConfig, data: Iterable[Any]) -> PassingSource:
    """Open an iterator, a DataLoader or an iterable of tensors as the batches of a run."""
    limits = [] if config.max_tokens is None else [config.max_tokens]
    if config.max_steps is not None:
        limits.append(config.max_steps * config.tokens_per_step)
    logger.info("the rows are trained on in the order in which they come")
    return PassingSource(
        data,
        config.kept_batch_size,
        seed=config.seed,
        wanted=min(limits, default=None),
        epochs=config.max_epochs,
        held_fraction=config.heldout_fraction,
    )


def _finite_heldout(
    config: TrainConfig, sae: SAEConfig, held: Tensor, columns: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return rows [n, D] that were cut off, and their columns, without rows that are dropped.

    Raises ValueError for a row that is not finite, unless such rows are dropped.
    """
    parts = {"held-out rows": held}
    if sae.transcoder and TARGETS in columns:
        parts[TARGETS] = columns[TARGETS]
    limits = (config.skip_nonfinite, held.device, config.max_norm_multiple)
    (rows, *_), dropped = finite_rows(parts, *limits)
    keep = torch.ones(len(rows) + len(dropped), dtype=torch.bool)
    keep[torch.from_numpy(dropped)] = False
    beside = {}
    for name, column in columns.items():
        shape = (len(keep), -1) if name in parts else (len(keep),)
        beside[name] = column.reshape(shape)[keep.to(column.device)]
    return rows, beside


def _as_tensors(what: str, columns: Mapping[str, Given] | None) -> dict[str, Tensor] | None:
    """Return columns by name as tensors; None where none are given."""
    if columns is None:
        return None
    return {name: as_given_tensor(f"{what}: {name}", part) for name, part in columns.items()}


def have_names(shards: ShardMix, *, of_targets: bool = False) -> bool:
    """Return whether any file has a name for its data, as a bare tensor or array has not."""
    known = [part.targets if of_targets else part for part in shards.sets]
    return any(_is_named(shard) for part in known if part for shard in part.shards)


def _is_named(shard: Shard) -> bool:
    with open_shard(shard) as file:
        return file.has(shard.key)


def _split_targets(
    what: str, columns: Mapping[str, Tensor] | None, sae: SAEConfig
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Split columns into labels and targets; raise ValueError for targets without use."""
    labels = dict(columns or {})
    if sae.transcoder:
        targets = labels.pop(TARGETS, None)
        return labels, targets
    if TARGETS in labels and TARGETS not in label_columns(sae):
        raise ValueError(f"{what}: {TARGETS!r} belong to a transcoder (transcoder = True)")
    return labels, None


def share_shards(config: TrainConfig, saes: Sequence[SAEConfig]) -> SharedShards:
    """Open the shards of a run for a training of each model, on the same batches."""
    scans = known_scans(config)
    shards = open_training_shards(config, saes, scans)
    scans.save_beside_manifests()
    config = with_fitted_batch(config, shards.rows)
    stream = open_stream(config, shards, checked_device(config.device), is_shared=True)
    return SharedShards(shards, SharedSource(stream, len(saes)), scans, config.kept_batch_size)


def known_scans(config: TrainConfig) -> ScanRecord:
    """Load what the run in `checkpoint_dir`, if there is one, has found in its shards."""
    if config.checkpoint_dir is None:
        return ScanRecord()
    return ScanRecord.load(Path(config.checkpoint_dir) / RECORD_NAME)


def open_stream(
    config: TrainConfig, shards: ShardMix, device: torch.device, *, is_shared: bool = False
) -> ActivationStream:
    """Open the batches of shards, for a device.

    For a GPU they are widened there, unless they are shared: then they are widened once for all.
    """
    keep_on = torch.device("cpu") if config.keep_in_memory else None
    return ActivationStream(
        shards,
        batch_size=config.kept_batch_size,
        seed=config.order_seed,
        pool_rows=config.pool_rows,
        device=device,
        keep_on=device if config.device_cache else keep_on,
        lock=config.pin,
        background=not config.device_cache,
        as_stored=device.type == "cuda" and not config.device_cache and not is_shared,
    )


def _all(rows: Rows) -> Rows:
    return rows
