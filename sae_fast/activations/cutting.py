"""The last rows of activations cut off, to evaluate with: of a set of shards, and of a tensor.

The rows at the end are cut, and not rows from everywhere: neighbours in a text are alike, and a
held-out row should have no neighbour among the rows to train on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from sae_fast.activations.columns import RowNumbers, ShardColumns, without_dropped
from sae_fast.activations.shard_set import ShardSet


def count_held(rows: int, fraction: float, what: str = "rows") -> int:
    """Return how many of `rows` a fraction of them is, at least one.

    Raises ValueError where none would be left to train on.
    """
    held = max(1, round(fraction * rows))
    if held >= rows:
        raise ValueError(
            f"heldout_fraction = {fraction:g} of {rows:,} {what} leaves none to train on"
        )
    return held


def cut_tensors(
    data: Tensor, columns: Mapping[str, Tensor] | None, fraction: float
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return rows [n, D] and columns without the last ones, and the last ones.

    Of [sequences, tokens, D] whole sequences are cut. Nothing is copied.

    Returns the rows to train on, the rows held out, and the columns of each.
    """
    if data.ndim not in (2, 3) or len(data) == 0:
        return data, data, dict(columns or {}), {}  # refused by its shape later
    kept = len(data) - count_held(len(data), fraction, "rows" if data.ndim == 2 else "sequences")
    rows = data.shape[1] if data.ndim == 3 else 1
    before, after = {}, {}
    for name, column in (columns or {}).items():
        # One number a row, in one dimension or in the dimensions of the rows.
        place = kept * rows if len(column) == len(data) * rows else kept
        before[name], after[name] = column[:place], column[place:]
    return data[:kept], data[kept:], before, after


def cut_shards(shards: ShardSet, fraction: float) -> tuple[ShardSet, ShardSet]:
    """Return a set of shards without its last rows, and the set of these rows.

    Args:
        shards: the set; its dropped rows are counted in neither part.
        fraction: the share of the served rows that is cut, at least one row.

    Raises ValueError where no row would be left to train on.
    """
    held = count_held(shards.rows, fraction)
    number, left = len(shards.shards) - 1, held
    while left >= shards.served_rows(number):
        left -= shards.served_rows(number)
        number -= 1
    served = np.delete(np.arange(shards.shards[number].rows), shards.dropped[number])
    border = int(served[len(served) - left]) if left else shards.shards[number].rows
    first = number if left else number + 1
    train = _part(shards, 0, number + 1, number, (border, shards.shards[number].rows))
    return train, _part(shards, first, len(shards.shards), number, (0, border))


def joined(parts: list[ShardSet]) -> ShardSet:
    """Return several sets of the same columns as one."""
    targets = [part.targets for part in parts if part.targets is not None]
    return ShardSet(
        tuple(shard for part in parts for shard in part.shards),
        tuple(numbers for part in parts for numbers in part.dropped),
        tuple(columns for part in parts for columns in part.shard_columns),
        joined(targets) if targets else None,
        digests=tuple(digest for part in parts for digest in part.digests),
        elsewhere=sum(part.elsewhere for part in parts),
        first_reads=parts[0].first_reads if len(parts) == 1 else None,
    )


def _part(shards: ShardSet, first: int, stop: int, cut: int, span: tuple[int, int]) -> ShardSet:
    """Return the shards first..stop, of shard `cut` without the rows of a span."""
    place = slice(first, stop)
    dropped, columns = list(shards.dropped), list(shards.shard_columns)
    begin, end = span
    gone = end - begin - int(np.diff(np.searchsorted(dropped[cut], span))[0])
    dropped[cut] = np.union1d(dropped[cut], np.arange(begin, end))
    if columns:
        columns[cut] = _without(columns[cut], dropped[cut], shards.shards[cut].rows)
    return replace(
        shards,
        shards=shards.shards[place],
        dropped=tuple(dropped[place]),
        shard_columns=tuple(columns[place]),
        targets=shards.targets and _part(shards.targets, first, stop, cut, span),
        digests=shards.digests[place],
        kept=shards.kept[place],
        first_reads=shards.first_reads and shards.first_reads.after(first),
        elsewhere=shards.elsewhere + (gone if first <= cut < stop else 0),
    )


def _without(columns: ShardColumns, dropped: RowNumbers, rows: int) -> ShardColumns:
    if columns.starts is None:
        return columns
    return replace(columns, starts=without_dropped(columns.starts, dropped, rows))
