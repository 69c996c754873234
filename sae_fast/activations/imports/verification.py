"""A shard read again and compared with the source that it was made from, row for row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae_fast.activations.errors import ShardError
from sae_fast.activations.imports.blocks import SourceBlock
from sae_fast.activations.shard import ShardFile, inspect_shard
from sae_fast.activations.storage import Array, as_numpy, as_tensor

PIECE_ROWS = 256  # that are in float64 at a time
Report = Callable[[int], None]  # is told how many more rows of the source have been through


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        rows: rows in the shards, each equal to the source's in the stored type.
        padding: rows of the source that are padding.
        nonfinite: rows of the source that hold NaN or Inf.
        squares: Σ x² of the source.
        changes: Σ (stored − x)².
    """

    rows: int = 0
    padding: int = 0
    nonfinite: int = 0
    squares: float = 0.0
    changes: float = 0.0

    @property
    def change(self) -> float:
        """Relative change of the rows by storing, ‖stored − x‖ / ‖x‖."""
        return math.sqrt(self.changes / self.squares) if self.squares else 0.0

    def joined(self, other: Comparison) -> Comparison:
        """Return the sums of two comparisons."""
        return Comparison(
            self.rows + other.rows,
            self.padding + other.padding,
            self.nonfinite + other.nonfinite,
            self.squares + other.squares,
            self.changes + other.changes,
        )


def compare(path: Path, blocks: Iterator[SourceBlock], report: Report) -> Comparison:
    """Compare a shard with the rows it should have; raise ShardError for the first that differs.

    A path that is not there stands for a shard of which every row was left out.
    """
    total = Comparison()
    with ExitStack() as stack:
        file = stack.enter_context(ShardFile(inspect_shard(path))) if path.exists() else None
        for block in blocks:
            if len(block.rows):
                if file is None:
                    raise ShardError(f"{path}: is gone")
                total = total.joined(_compare_block(file, block, total.rows))
            total = total.joined(Comparison(0, block.padding, block.nonfinite))
            report(block.source_rows)
        if file is not None and file.shard.rows != total.rows:
            raise ShardError(f"{path}: has {file.shard.rows} rows, the source {total.rows}")
    return total


def _compare_block(file: ShardFile, block: SourceBlock, start: int) -> Comparison:
    """Compare a block that begins at row `start` of its shard."""
    shard, stop = file.shard, start + len(block.rows)
    expected = as_numpy(block.rows.contiguous(), shard.storage)
    if shard.d_in != expected.shape[1] or shard.rows < stop:
        raise ShardError(f"{shard.path}: [{shard.rows}, {shard.d_in}] is not what was converted")
    there = np.empty_like(expected)
    file.read(start, stop, there)
    bits = shard.storage.bits_dtype
    _check_equal(file, "activations", there.view(bits), expected.view(bits), start)
    for name, column in block.columns.items():
        _check_equal(file, name, file.read_column(name, start, stop), column, start)
    if block.source.dtype == block.rows.dtype:
        return Comparison(len(there))
    squares = changes = 0.0
    stored = as_tensor(there, shard.storage)
    for first in range(0, len(stored), PIECE_ROWS):
        exact = block.source[first : first + PIECE_ROWS].double()
        squares += exact.square().sum().item()
        changes += (stored[first : first + PIECE_ROWS].double() - exact).square_().sum().item()
    return Comparison(len(there), squares=squares, changes=changes)


def _check_equal(file: ShardFile, name: str, there: Array, expected: Array, start: int) -> None:
    same = there == expected
    if not same.all():
        row = start + int(np.argmin(same.reshape(len(same), -1).all(axis=1)))
        raise ShardError(
            f"{file.shard.path}: row {row} of {name} is not what the source holds; delete the "
            "file and convert again"
        )
