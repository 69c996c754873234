"""Estimating the mean of the activations and the scale that brings their norm to sqrt(D)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sae_fast.activations.pool import iterate_blocks
from sae_fast.activations.shard_set import ShardSet
from sae_fast.activations.shuffle import Block, split_blocks
from sae_fast.activations.source import Transform
from sae_fast.activations.tensor_stream import checked_rows

DEFAULT_MAX_ROWS = 1 << 17
SAMPLE_BLOCK_ROWS = 256
TENSOR_SLAB_ROWS = 4096


def estimate_normalization(
    activations: ShardSet | Tensor, max_rows: int | None = DEFAULT_MAX_ROWS
) -> Transform:
    """Mean over the rows, and the scale for which E |(x - mean) * scale| = sqrt(D).

    Of shards a fixed sample of about `max_rows` rows is read, spread evenly over all of them: the
    mean of the first shard alone would be biased towards its texts. None reads everything. The
    sums are in float64. Raises ValueError if all rows are equal.
    """
    if isinstance(activations, Tensor):
        slabs = _tensor_slabs(activations)
    else:
        slabs = _shard_slabs(activations, max_rows)
    total, count = 0.0, 0
    summed: Tensor | float = 0.0
    for rows in slabs():
        summed = summed + rows.sum(dim=0, dtype=torch.float64)
        count += len(rows)
    assert isinstance(summed, Tensor)
    mean = summed / count
    for rows in slabs():
        total += float((rows.double() - mean).norm(dim=1).sum())
    if not total > 0:
        raise ValueError("activations: all rows are equal, there is nothing to scale")
    return Transform(mean.float(), math.sqrt(len(mean)) * count / total)


def _tensor_slabs(activations: Tensor) -> Callable[[], Iterator[Tensor]]:
    rows = checked_rows(activations, skip_nonfinite=True)
    return lambda: iter(torch.split(rows, TENSOR_SLAB_ROWS))


def _shard_slabs(shards: ShardSet, max_rows: int | None) -> Callable[[], Iterator[Tensor]]:
    blocks = split_blocks(shards)
    if max_rows is not None and shards.rows > max_rows:
        blocks = _sample(split_blocks(shards, SAMPLE_BLOCK_ROWS), max_rows / shards.rows)
    return lambda: iterate_blocks(shards, blocks)


def _sample(blocks: list[Block], fraction: float) -> list[Block]:
    """That fraction of the blocks, evenly spaced, and at least one of each shard."""
    chosen = []
    shard, due = -1, 0.0
    for block in blocks:
        due += fraction
        if due >= 1 or block.shard != shard:
            chosen.append(block)
            due -= 1
        shard = block.shard
    return chosen
