"""The mean of the activations, and the scale that brings their norm to sqrt(D)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sae_fast.activations.mixing import ShardMix
from sae_fast.activations.order import Block, split_blocks, split_shard
from sae_fast.activations.pool import iterate_blocks
from sae_fast.activations.shard_set import ShardSet
from sae_fast.activations.source import Transform
from sae_fast.activations.storage import as_numpy, as_tensor
from sae_fast.activations.tensor_stream import checked_rows

DEFAULT_MAX_ROWS = 1 << 17
SAMPLE_BLOCK_ROWS = 256
TENSOR_SLAB_ROWS = 4096


def estimate_normalization(
    activations: ShardMix | ShardSet | Tensor, max_rows: int | None = DEFAULT_MAX_ROWS
) -> Transform:
    """Estimate the mean of rows, and the scale for which E |(x - mean) * scale| = sqrt(D).

    Of shards a fixed sample of about `max_rows` rows is read, spread evenly over all of them: the
    mean of the first shard alone would be biased towards its texts. None reads everything. In a
    mix the rows of a set count as much together as they are served. The sums are in float64.
    Raises ValueError if all rows are equal.
    """
    if isinstance(activations, Tensor):
        slabs = _tensor_slabs(activations)
    elif isinstance(activations, ShardMix):
        slabs = _mixed_slabs(activations, max_rows)
    else:
        slabs = _shard_slabs(activations, max_rows)
    norms, count = 0.0, 0.0
    total: Tensor | float = 0.0
    for rows, weight in slabs():
        total = total + weight * rows.sum(dim=0, dtype=torch.float64)
        count += weight * len(rows)
    assert isinstance(total, Tensor)
    mean = total / count
    for rows, weight in slabs():
        norms += weight * float((rows.double() - mean).norm(dim=1).sum())
    if not norms > 0:
        raise ValueError("activations: all rows are equal, there is nothing to scale")
    scale = math.sqrt(len(mean)) * count / norms
    if scale > torch.finfo(torch.float32).max or not mean.float().isfinite().all():
        raise ValueError(
            f"activations: rows are {norms / count:g} long about their mean, no float32 scales "
            "them to the length that is trained on"
        )
    return Transform(mean.float(), scale)


Slabs = Callable[[], Iterator[tuple[Tensor, float]]]  # rows, and how many each stands for


def _tensor_slabs(activations: Tensor) -> Slabs:
    rows = checked_rows(activations, skip_nonfinite=True, device=activations.device)
    return lambda: ((slab.cpu(), 1.0) for slab in torch.split(rows, TENSOR_SLAB_ROWS))


def _mixed_slabs(mix: ShardMix, max_rows: int | None) -> Slabs:
    first, share_of_first = mix.sets[0], mix.shares[0]
    parts = []
    for shards, share in zip(mix.sets, mix.shares, strict=True):
        limit = None if max_rows is None else max(1, round(max_rows * share))
        # The weight of a row, in units of a row of the first set, whose weight is exactly 1.
        parts.append(
            (_shard_slabs(shards, limit), (share * first.rows) / (share_of_first * shards.rows))
        )
    return lambda: ((rows, weight * counts) for slabs, counts in parts for rows, weight in slabs())


def _shard_slabs(shards: ShardSet, max_rows: int | None) -> Slabs:
    blocks = _chosen_blocks(shards, max_rows)
    # Each shard counts with all of its rows, however many of them its share of blocks holds.
    sampled = Counter[int]()
    for block in blocks:
        sampled[block.shard] += block.kept
    weights = [shards.served_rows(block.shard) / sampled[block.shard] for block in blocks]
    return lambda: zip(_rows_of(shards, blocks), weights, strict=True)


def sample_spans(shards: ShardSet) -> list[tuple[int, tuple[int, int]]]:
    """Return the rows that `estimate_normalization` will look at: shards, and spans of each."""
    blocks = _chosen_blocks(shards, DEFAULT_MAX_ROWS)
    return [(block.shard, (block.start, block.stop)) for block in blocks]


def _chosen_blocks(shards: ShardSet, max_rows: int | None) -> list[Block]:
    if max_rows is not None and shards.rows > max_rows:
        return _sample(shards, max_rows / shards.rows)
    return split_blocks(shards)


def _rows_of(shards: ShardSet, blocks: list[Block]) -> Iterator[Tensor]:
    """Yield the served rows of each block, read unless they were kept; memory is reused.

    Rows that are read are kept where there is room for them, as the norms need them again.
    """
    known = [_kept_rows(shards, block) for block in blocks]
    unknown = [block for block, rows in zip(blocks, known, strict=True) if rows is None]
    read = iterate_blocks(shards, unknown)
    for block, rows in zip(blocks, known, strict=True):
        if rows is None:
            rows = next(read)
            _keep(shards, block, rows)
        yield rows


def _keep(shards: ShardSet, block: Block, rows: Tensor) -> None:
    """Keep the rows of a block, if they are as stored and the set keeps its sample."""
    storage = shards.shards[block.shard].storage
    is_whole = block.kept == block.stop - block.start
    if shards.kept and is_whole and storage is shards.storage:
        shards.kept[block.shard].note(block.start, as_numpy(rows, storage))


def _kept_rows(shards: ShardSet, block: Block) -> Tensor | None:
    """Return a block as the scan kept it; None: it was not kept, or rows of it are dropped."""
    if not shards.kept or block.kept < block.stop - block.start:
        return None
    rows = shards.kept[block.shard].find(block.start, block.stop)
    if rows is None:
        return None
    return as_tensor(rows, shards.shards[block.shard].storage).to(shards.storage.torch_dtype)


def _sample(shards: ShardSet, fraction: float) -> list[Block]:
    """Choose that fraction of the rows in blocks, evenly spaced over each shard, at least one."""
    chosen = []
    for number, shard in enumerate(shards.shards):
        step = shard.block_rows(SAMPLE_BLOCK_ROWS) if shard.compressed else SAMPLE_BLOCK_ROWS
        blocks = split_shard(shards, number, step)
        count = min(len(blocks), max(1, round(fraction * shard.rows / step)))
        chosen += [blocks[int((i + 0.5) * len(blocks) / count)] for i in range(count)]
    return chosen
