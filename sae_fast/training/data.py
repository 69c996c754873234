"""What a run reads: shards, a tensor or a caller's own source, all served normalised."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from sae_fast.activations import (
    ActivationSource,
    ActivationStream,
    Column,
    HeldOut,
    LabelledSource,
    Rows,
    ShardSet,
    TensorStream,
    Transform,
    estimate_normalization,
    find_shards,
    open_heldout,
    open_shards,
    read_labels,
)
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.guidance import check_columns, label_columns, needs_sequences

_SAMPLED_BATCHES = 16


class TrainingData:
    """The activations of a run, opened and checked but not yet read.

    Args:
        config: says where the shards are, and the sizes of batch and pool.
        data: rows [n, D], or a source of raw rows; None: the shards of `config`.
        heldout: rows [n, D] for evaluation; None: the held-out shards of `config`, if any.
        device: what the batches are for.
        sae: the model, which may need labels or sequences.
        columns: labels [n] beside rows that are a tensor.
        heldout_columns: labels beside `heldout`, which arch slots is evaluated with.

    Raises:
        ShardError: naming the shard that cannot be trained on.
        ValueError: when there is nothing to train on, or not what the model needs.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Tensor | ActivationSource | None,
        heldout: Tensor | None,
        device: torch.device,
        sae: SAEConfig,
        columns: Mapping[str, Tensor] | None = None,
        heldout_columns: Mapping[str, Tensor] | None = None,
    ) -> None:
        if heldout_columns is not None and heldout is None:
            raise ValueError("heldout_columns go with heldout, and none is given")
        if columns is not None and not isinstance(data, Tensor):
            raise ValueError("columns go with a tensor of activations, and none is given")
        self._config = config
        self._sae = sae
        self._given_columns = columns or {}
        self._device = device
        self._rows: Tensor | None = None
        self._shards: ShardSet | None = None
        self._given: ActivationSource | None = None
        if data is None:
            self._shards = _open_training_shards(config, sae)
        elif isinstance(data, Tensor):
            self._rows = data
        else:
            self._given = data
            served = getattr(data, "batch_size", config.batch_size)
            if served != config.batch_size:
                raise ValueError(
                    f"batch_size must be {config.batch_size}, got a source that serves {served}"
                )
        first = self._given or self.open(None)
        self.d_in = first.d_in
        self.rows_per_epoch = first.rows_per_epoch
        self.memory_bytes = int(getattr(first, "memory_bytes", 0))
        self.skipped_rows = int(getattr(first, "nonfinite_rows", 0))
        self.columns: Mapping[str, Column] = getattr(first, "columns", {})
        check_columns(sae, self.columns)
        self.heldout_labels: Mapping[str, Tensor] = heldout_columns or {}
        self.heldout = self._open_heldout(heldout)

    def open(self, transform: Transform | None) -> ActivationSource:
        """The source of the batches, each row x served as (x - mean) * scale."""
        config = self._config
        settings: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed}
        settings |= {"transform": transform, "device": self._device}
        if self._rows is not None:
            skip = config.skip_nonfinite
            return TensorStream(
                self._rows,
                skip_nonfinite=skip,
                columns=self._given_columns,
                whole_sequences=needs_sequences(self._sae),
                **settings,
            )
        if self._shards is not None:
            pool = config.pool_rows
            return ActivationStream(self._shards, pool_rows=pool, **settings)
        assert self._given is not None
        return _Given(self._given, transform)

    def normalization(self) -> Transform:
        """The mean of the rows, and the scale that brings their norm to sqrt(D)."""
        if self._given is None:
            known = self._shards if self._rows is None else self._rows
            assert known is not None
            return estimate_normalization(known)
        position = self._given.state_dict()
        sample = torch.cat([self._given.next_batch() for _ in range(_SAMPLED_BATCHES)])
        self._given.load_state_dict(position)
        return estimate_normalization(sample)

    def _open_heldout(self, heldout: Tensor | None) -> Iterable[Tensor] | None:
        config = self._config
        if heldout is not None:
            if heldout.shape[-1] != self.d_in:
                width = heldout.shape[-1]
                raise ValueError(f"heldout: rows are {width} wide, those to train on {self.d_in}")
            rows = heldout.reshape(-1, self.d_in).float()
            for name, labels in self.heldout_labels.items():
                if labels.shape != (len(rows),):
                    raise ValueError(
                        f"heldout_columns: {name} must have shape ({len(rows)},), one a row, "
                        f"got {tuple(labels.shape)}"
                    )
            return torch.split(rows, config.batch_size)
        if self._shards is None or config.shard_dir is None:
            return None
        shards = open_heldout(
            config.shard_dir,
            config.heldout,
            train=self._shards,
            key=config.activations_key,
            skip_nonfinite=config.skip_nonfinite,
            columns=label_columns(self._sae) if self._sae.arch == "slots" else (),
        )
        if shards is None:
            return None
        self.heldout_labels = read_labels(shards)
        return HeldOut(shards, batch_size=config.batch_size)


class _Given:
    """A caller's source with a transform applied to what it serves."""

    def __init__(self, source: ActivationSource, transform: Transform | None) -> None:
        self._source = source
        self._transform = transform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def next_batch(self) -> Tensor:
        """The source's next rows, normalised."""
        return self._normalized(self._source.next_batch())

    def next_rows(self) -> Rows:
        """The same with their columns, where the source has any."""
        x, columns = cast(LabelledSource, self._source).next_rows()
        return Rows(self._normalized(x), columns)

    def _normalized(self, batch: Tensor) -> Tensor:
        if self._transform is None:
            return batch
        if batch.device != self._transform.mean.device:
            self._transform = self._transform._replace(mean=self._transform.mean.to(batch.device))
        return batch.sub_(self._transform.mean).mul_(self._transform.scale)

    def state_dict(self) -> dict[str, Any]:
        """The source's position; a copy, as the source may go on before it is saved."""
        return copy.deepcopy(self._source.state_dict())


def _open_training_shards(config: TrainConfig, sae: SAEConfig) -> ShardSet:
    if config.shard_dir is None:
        raise ValueError("shard_dir is missing: name a directory of shards with --shard-dir")
    paths, _ = find_shards(config.shard_dir, config.heldout)
    return open_shards(
        paths,
        key=config.activations_key,
        skip_nonfinite=config.skip_nonfinite,
        columns=label_columns(sae),
        whole_sequences=needs_sequences(sae),
    )
