"""Rows in the order they are stored, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.columns import STARTS, require_whole, served
from sae_fast.activations.errors import ShardError
from sae_fast.activations.files import find_shards
from sae_fast.activations.order import split_blocks
from sae_fast.activations.pool import iterate_blocks
from sae_fast.activations.row_scan import RepeatedRows
from sae_fast.activations.scanning import ScanRecord
from sae_fast.activations.shard import DEFAULT_KEY
from sae_fast.activations.shard_set import ShardSet, check_same_width, open_shards
from sae_fast.activations.source import Transform, checked_transform
from sae_fast.activations.targets import TargetFiles
from sae_fast.activations.tensor_shards import open_shard


class HeldOut:
    """Iterates over batches [<= batch_size, D] float32 in stored order, each time from the start.

    All batches but the last are full. `max_rows` stops early, at the first rows.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        batch_size: int,
        max_rows: int | None = None,
        transform: Transform | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.shards = shards
        self.batch_size = batch_size
        self.rows = shards.rows if max_rows is None else min(shards.rows, max_rows)
        self._transform = checked_transform(transform, shards.d_in)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.shards.d_in

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        batch, have, left = self._new_batch(self.rows), 0, self.rows
        for rows in iterate_blocks(self.shards, split_blocks(self.shards)):
            position = 0
            while position < len(rows) and left:
                count = min(len(batch) - have, len(rows) - position)
                batch[have : have + count] = rows[position : position + count]
                have, position, left = have + count, position + count, left - count
                if have == len(batch):
                    if self._transform is not None:
                        batch.sub_(self._transform.mean).mul_(self._transform.scale)
                    yield batch
                    batch, have = self._new_batch(left), 0
            if not left:
                return

    def _new_batch(self, left: int) -> Tensor:
        return torch.empty(min(self.batch_size, left), self.d_in, dtype=torch.float32)


def read_labels(shards: ShardSet) -> dict[str, Tensor]:
    """Read the labels [rows] of a set by column name, in the order of `HeldOut`.

    Raises ShardError where a file cannot be read.
    """
    labels = [c.name for c in shards.columns.values() if c.name != STARTS and not c.width]
    return {name: read_column(shards, name) for name in labels}


def read_column(shards: ShardSet, name: str, *, whole: bool = False) -> Tensor:
    """Read one number for each served row of a set, [rows] int64 or float32, as `HeldOut` has them.

    Raises ShardError where a shard has no such column, or with `whole` one of other numbers.
    """
    parts = []
    for shard, dropped in zip(shards.shards, shards.dropped, strict=True):
        with open_shard(shard) as file:
            numbers = file.read_column(name, 0, shard.rows)
        if whole:
            try:
                require_whole(name, numbers)
            except ValueError as error:
                raise ShardError(f"{shard.path}: {error}") from None
        parts.append(torch.from_numpy(np.delete(served(numbers), dropped)))
    return torch.cat(parts)


def open_heldout(
    shard_dir: str | Path,
    heldout: str | Path | None = None,
    *,
    train: ShardSet | None = None,
    key: str = DEFAULT_KEY,
    verify: bool = True,
    skip_nonfinite: bool = False,
    columns: Sequence[str] = (),
    targets: TargetFiles | None = None,
    repeated_rows: RepeatedRows = "refuse",
    record: ScanRecord | None = None,
) -> ShardSet | None:
    """Check and describe the held-out shards of a run; None if it has none (see `find_shards`)."""
    paths = find_shards(shard_dir, heldout)[1]
    if not paths:
        return None
    shards = open_shards(
        paths,
        key=key,
        verify=verify,
        skip_nonfinite=skip_nonfinite,
        columns=columns,
        targets=targets,
        repeated_rows=repeated_rows,
        record=record,
    )
    if train is not None:
        check_same_width(train, shards)
    return shards
