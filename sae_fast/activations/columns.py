"""Columns: numbers that a shard holds for each row beside its activations, and its sequences.

A column has one number a row, in a dataset as long as the rows: labels, whole or real. (Only the
targets of a transcoder, which are served as a column too, have more: targets.py.) A label of -1
says that the token has none. A sequence is a run of rows with one `doc_id` and consecutive
`position`, as far as these datasets exist, and never continues from one entry of a 3-D dataset of
activations to the next.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_fast.activations.errors import ShardError
from sae_fast.activations.shard import OpenShard, Shard
from sae_fast.activations.storage import Array
from sae_fast.activations.tensor_shards import open_shard

RowNumbers = npt.NDArray[np.int64]

# Name of the column that whole sequences bring with them, [N] bool: the rows that do not continue
# the sequence of the row before them in the batch. The first row of a batch is always one of them.
STARTS = "starts"
SEQUENCE_COLUMNS = ("doc_id", "position")
NO_LABEL = -1
_LARGEST_LABEL = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Column:
    """Name, type and range of a column, without its numbers.

    Attributes:
        name: name of its dataset.
        dtype: in which it is served: int64, float32 or, of STARTS, bool.
        minimum: the smallest number.
        maximum: the largest number.
        place: where the largest number stands, for errors.
        width: numbers a row; 0: one, and no dimension for it.
    """

    name: str
    dtype: torch.dtype
    minimum: float = -math.inf
    maximum: float = math.inf
    place: str = ""
    width: int = 0

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the numbers of one row."""
        return (self.width,) if self.width else ()

    def joined(self, other: Column) -> Column:
        """Return the description of two parts of one column together."""
        larger = self if self.maximum >= other.maximum else other
        return replace(larger, minimum=min(self.minimum, other.minimum))


@dataclass(frozen=True)
class ShardColumns:
    """The columns of one shard.

    Attributes:
        columns: the columns asked for, by name.
        starts: ascending numbers of the rows that begin a sequence; None: not asked for.
        digest: hash of the columns and starts, for the identity of the shard.
    """

    columns: dict[str, Column]
    starts: RowNumbers | None
    digest: str


STARTS_COLUMN = Column(STARTS, torch.bool, 0, 1, "")


def inspect_columns(
    shard: Shard,
    dropped: RowNumbers,  # rows that are left out: no sequence continues over one
    names: Sequence[str],
    whole_sequences: bool,
) -> ShardColumns:
    """Read the columns of a shard once; raise ShardError, naming shard and column."""
    _refuse_reserved(names)
    digest = hashlib.sha256()
    columns, starts = {}, None
    with open_shard(shard) as file:
        for name in names:
            numbers = file.read_column(name, 0, shard.rows)
            try:
                columns[name] = described(name, numbers, str(shard.path))
            except ValueError as error:
                raise ShardError(f"{shard.path}: {error}") from None
            digest.update(repr((name, numbers.dtype.str)).encode())
            digest.update(np.ascontiguousarray(numbers).data)
        if whole_sequences:
            starts = _shard_starts(file, dropped)
            columns[STARTS] = STARTS_COLUMN
            digest.update(np.ascontiguousarray(starts, "<i8").data)
    return ShardColumns(columns, starts, digest.hexdigest()[:16])


@dataclass(frozen=True)
class TensorColumns:
    """The columns of a tensor of activations, without the dropped rows."""

    info: dict[str, Column]
    tensors: dict[str, Tensor]  # each [rows]
    starts: RowNumbers | None


def tensor_columns(
    columns: Mapping[str, Tensor],
    kept: int,  # rows that are served
    tokens: int,  # rows of one entry of a 3-D tensor, 1 for a 2-D one
    dropped: RowNumbers,
    whole_sequences: bool,
) -> TensorColumns:
    """Check columns that are tensors; raise ValueError naming the column at fault."""
    _refuse_reserved(columns)
    rows = kept + len(dropped)
    keep = np.ones(rows, bool)
    keep[dropped] = False
    numbers, info = {}, {}
    for name, column in columns.items():
        if column.numel() != rows:
            raise ValueError(
                f"columns: {name} must have {rows} numbers, one a row, "
                f"got shape {tuple(column.shape)}"
            )
        flat = column.detach().flatten().cpu()
        numbers[name] = (flat.float() if flat.is_floating_point() else flat).numpy()
        info[name] = described(name, numbers[name], "columns")
    tensors = {name: torch.from_numpy(served(array)[keep]) for name, array in numbers.items()}
    if not whole_sequences:
        return TensorColumns(info, tensors, None)
    starts = sequence_starts(rows, tokens, *map(numbers.get, SEQUENCE_COLUMNS))
    begins = np.zeros(rows, bool)
    begins[without_dropped(starts, dropped, rows)] = True
    tensors[STARTS] = torch.from_numpy(begins[keep])
    if begins.sum() == kept:
        raise ValueError("no row continues the sequence of the row before it: each is a sequence")
    return TensorColumns({**info, STARTS: STARTS_COLUMN}, tensors, np.flatnonzero(begins[keep]))


def described(name: str, numbers: Array, place: str) -> Column:
    """Describe a column by its numbers [n]; raise ValueError unless they are labels."""
    if numbers.dtype.kind in "biu":
        least, most = int(numbers.min()), int(numbers.max())
        if least < NO_LABEL:
            row = int(np.argmax(numbers < NO_LABEL))
            raise ValueError(
                f"{name}: row {row} holds {int(numbers[row])}; "
                "a label is at least 0, or -1 where a token has none"
            )
        if most > _LARGEST_LABEL:
            row = int(np.argmax(numbers))
            raise ValueError(f"{name}: row {row} holds {most}; a label is at most {_LARGEST_LABEL}")
        return Column(name, torch.int64, least, most, place)
    if numbers.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is told
            finite = np.isfinite(numbers.astype(np.float32))
        if not finite.all():
            row = int(np.argmin(finite))
            raise ValueError(f"{name}: row {row} holds {numbers[row]}, labels must be finite")
        return Column(name, torch.float32, float(numbers.min()), float(numbers.max()), place)
    raise ValueError(f"{name} holds {numbers.dtype}; whole or real numbers are needed")


def require_whole(name: str, numbers: Array) -> None:
    """Raise ValueError unless the numbers of a column are whole."""
    if numbers.dtype.kind not in "biu":
        raise ValueError(f"{name} holds {numbers.dtype}; whole numbers are needed")


def served(numbers: Array) -> Array:
    """Convert the numbers of a column to int64 or float32, as they are served."""
    return numbers.astype(np.int64 if numbers.dtype.kind in "biu" else np.float32)


def sequence_starts(
    rows: int,
    tokens: int,  # rows of one entry of a 3-D dataset; 1: there are no such entries
    doc_id: Array | None,  # [rows]
    position: Array | None,  # [rows]
) -> RowNumbers:
    """Return ascending numbers of the rows that begin a sequence.

    Raises ValueError, naming what is missing, where nothing says what a sequence is.
    """
    if tokens == 1 and doc_id is None and position is None:
        raise ValueError(
            "nothing tells which rows are one sequence: "
            "there is no doc_id, no position, and the activations are not 3-D"
        )
    begins = np.zeros(rows, bool)
    begins[:: tokens if tokens > 1 else rows] = True
    if doc_id is not None:
        begins[1:] |= doc_id[1:] != doc_id[:-1]
    if position is not None:
        begins[1:] |= np.diff(position.astype(np.int64)) != 1
    return np.flatnonzero(begins)


def without_dropped(starts: RowNumbers, dropped: RowNumbers, rows: int) -> RowNumbers:
    """Return the starts without the dropped rows; the row after a dropped one begins a sequence."""
    if not dropped.size:
        return starts
    after = dropped[dropped < rows - 1] + 1
    return np.setdiff1d(np.union1d(starts, after), dropped)


def _refuse_reserved(names: Iterable[str]) -> None:
    if STARTS in names:
        raise ValueError(f"columns: {STARTS!r} is the name of what whole_sequences gives")


def _shard_starts(file: OpenShard, dropped: RowNumbers) -> RowNumbers:
    rows, tokens = file.shard.rows, file.shard.tokens
    columns = {name: file.read_column(name, 0, rows) for name in SEQUENCE_COLUMNS if file.has(name)}
    try:
        starts = sequence_starts(rows, tokens, columns.get("doc_id"), columns.get("position"))
    except ValueError as error:
        raise ShardError(f"{file.shard.path}: {error}; it holds {file.contents()}") from None
    return without_dropped(starts, dropped, rows)
