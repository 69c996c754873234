"""`Source`, the interface of all that a training reads: shards, tensors, a model, a caller's own.

Rows come for ever, in batches of exactly `batch_size`: a batch that begins at the end of one epoch
is completed with the first rows of the next, so no row is lost and no short batch is served. When
to stop is the caller's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sae_fast.activations.columns import Column
from sae_fast.activations.targets import TARGETS
from sae_fast.json_files import is_integer, shown
from sae_fast.ops import gather_rows_

Batch = TypeVar("Batch", covariant=True)


class Transform(NamedTuple):
    """x -> (x - mean) * scale, applied to every row before it is served."""

    mean: Tensor  # [D]
    scale: float


def checked_transform(transform: Transform | None, d_in: int) -> Transform | None:
    """Return a transform as it is applied: mean [D] float32 on the CPU, scale rounded to float32.

    Raises ValueError for a mean of another width.
    """
    if transform is None:
        return None
    mean, scale = transform
    if mean.shape != (d_in,):
        raise ValueError(f"transform: mean must have shape ({d_in},), got {tuple(mean.shape)}")
    mean = mean.detach().to("cpu", torch.float32, copy=True)
    return Transform(mean, torch.tensor(float(scale), dtype=torch.float32).item())


def placed(transform: Transform | None, device: torch.device | None) -> Transform | None:
    """Return a transform for rows that are on a device; None: on the CPU."""
    return transform and transform._replace(mean=transform.mean.to(device))


class Rows(NamedTuple):
    """A batch with what is known of each of its rows."""

    x: Tensor  # [N, D] float32
    columns: dict[str, Tensor]  # each [N], by name; the targets [N, d_out]

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Return the batch with every tensor changed by a function."""
        return Rows(change(self.x), {name: change(column) for name, column in self.columns.items()})


class StoredRows(NamedTuple):
    """A batch as it is stored, and what makes of it the batch that a training takes.

    Attributes:
        rows: x [N, D] and targets [N, d_out] float32, bfloat16 or float16; columns as in `Rows`.
        transform: of x; None: as it is.
        target_transform: of the targets; None: as they are.
    """

    rows: Rows
    transform: Transform | None = None
    target_transform: Transform | None = None

    def widened(self, make: Callable[[str, Tensor], Tensor] | None = None) -> Rows:
        """Return the batch with x and targets in float32 and transformed, on its own device.

        Args:
            make: returns the memory for the float32 rows, by "x" or the name of the targets and the
                rows as they are stored; None: new memory.
        """
        x, columns = self.rows
        wide = partial(_widened, make or _new_float32)
        columns = dict(columns)
        if TARGETS in columns and columns[TARGETS].ndim == 2:
            columns[TARGETS] = wide(TARGETS, columns[TARGETS], self.target_transform)
        return Rows(wide("x", x, self.transform), columns)


def _new_float32(name: str, stored: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=torch.float32)


def _widened(
    make: Callable[[str, Tensor], Tensor], name: str, stored: Tensor, transform: Transform | None
) -> Tensor:
    if stored.dtype == torch.float32 and transform is None:
        return stored
    out = make(name, stored)
    every = torch.arange(len(stored), device=stored.device)
    gather(stored, every, out, slice(0, len(stored)), placed(transform, stored.device))
    return out


def empty_rows(
    count: int,
    d_in: int,
    columns: Mapping[str, Column],
    device: torch.device | None = None,
    pin_memory: bool = False,
    stored: Mapping[str, torch.dtype] | None = None,
) -> Rows:
    """Allocate a batch of `count` rows [count, d_in] with its columns.

    Args:
        count: number of rows.
        d_in: their width.
        columns: the columns by name.
        device: where the batch is.
        pin_memory: whether it is in page-locked memory.
        stored: type of the rows, by the name "x", and of targets, where it is not float32.
    """
    types = stored or {}
    kind: dict[str, Any] = {"device": device, "pin_memory": pin_memory}
    return Rows(
        torch.empty(count, d_in, dtype=types.get("x", torch.float32), **kind),
        {
            name: torch.empty(count, *column.row_shape, dtype=types.get(name, column.dtype), **kind)
            for name, column in columns.items()
        },
    )


def gather(
    memory: Tensor,  # [capacity, D], as stored
    order: Tensor,  # [N] int64
    out: Tensor,  # [M, D]
    places: slice | Tensor,  # N rows of `out`
    transform: Transform | None,
) -> None:
    """Copy these rows to these places, widened to float32 and transformed.

    Where `out` is not float32 it has the type of `memory`, and the rows are copied as they are.
    """
    if out.dtype != torch.float32:
        if isinstance(places, slice):
            torch.index_select(memory, 0, order, out=out[places])
        else:
            out[places.to(out.device)] = torch.index_select(memory, 0, order)
        return
    mean, scale = (None, 1.0) if transform is None else transform
    if isinstance(places, slice):
        gather_rows_(out[places], memory, order, mean=mean, scale=scale)
    else:
        gather_rows_(out, memory, order, places=places.to(out.device), mean=mean, scale=scale)


def take(
    stored: Rows,  # as stored: x [capacity, D], the columns [capacity]
    order: Tensor,  # [N] int64
    out: Rows,
    places: slice | Tensor,  # N rows of `out`
    transform: Transform | None,
    target_transform: Transform | None,
) -> None:
    """Copy these rows with their columns to these places; targets are widened and transformed."""
    for name, column in out.columns.items():
        if name == TARGETS and column.ndim == 2:
            gather(stored.columns[name], order, column, places, target_transform)
        else:
            column[places] = torch.index_select(stored.columns[name], 0, order)
    gather(stored.x, order, out.x, places, transform)


class BatchSource(ABC, Generic[Batch]):
    """Batches in an order that a seed decides, without end, and the position to continue from.

    The base of `Source`, and of what reads the rows of several hook points at once.
    """

    @property
    @abstractmethod
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the data; rows that are left out are not counted."""

    @property
    @abstractmethod
    def tokens_served(self) -> int:
        """Rows served since the very beginning, over resumes."""

    @property
    @abstractmethod
    def stall_seconds(self) -> float:
        """Seconds for which `next_rows` has kept its callers waiting."""

    @property
    def counts_rows(self) -> bool:
        """Whether `tokens_served` counts every row of a step, so that both can be compared."""
        return False

    @property
    def epoch(self) -> int:
        """Epoch of the next row, from 0."""
        return self.tokens_served // self.rows_per_epoch

    @property
    def passes(self) -> float | None:
        """Passes over the documents that the rows are computed from; None: rows are stored."""
        return None

    @property
    def nonfinite_rows(self) -> int:
        """Rows that are left out: those that hold NaN or Inf and, if asked for, repeated ones."""
        return 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory for rows and batches, beside what the caller holds."""
        return 0

    @property
    def device_bytes(self) -> int:
        """Bytes that rows take on the GPU for which the batches are."""
        return 0

    def start(self, rank: int = 0, size: int = 1) -> None:
        """Begin to read ahead, where that is done, so that the first batch is ready earlier.

        Args:
            rank: of this process among those that have a batch each in turn.
            size: their number.
        """
        return

    def current_shards(self) -> list[Path]:
        """Return the shards that the rows of the last batch may come from, sorted."""
        return []

    @abstractmethod
    def next_rows(self) -> Batch:
        """Return the next batch; raise ShardError if a shard cannot be read."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch served: a small dict that `json` can write."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; raise ValueError if the data has changed."""

    @abstractmethod
    def close(self) -> None:
        """Release files and threads; the source cannot be used afterwards."""


class Source(BatchSource[Rows]):
    """An endless, shuffled, resumable supply of batches [N, D] float32, N = batch_size.

    Labels, targets and the starts of sequences go with the rows as columns.
    """

    @property
    @abstractmethod
    def d_in(self) -> int:
        """Width of a row."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """Name, type and range of each column that `next_rows` serves beside the rows."""
        return {}

    @property
    def origin(self) -> Mapping[str, Any]:
        """Model, hook, layer and the like of the activations, as far as they are known."""
        return {}

    @abstractmethod
    def set_transform(
        self, transform: Transform | None, target_transform: Transform | None = None
    ) -> None:
        """Serve rows and targets transformed from the next batch on; None: as they are."""

    def next_share(self, rank: int, size: int) -> Rows:
        """Return the batch of one rank among the next `size` batches, and pass over the others."""
        for _ in range(rank):
            self.next_rows()
        batch = self.next_rows()
        for _ in range(size - rank - 1):
            self.next_rows()
        return batch

    def next_stored(self, rank: int, size: int) -> StoredRows:
        """Return what `next_share` does, to be widened by the caller where it needs the rows.

        A source whose batches are for a GPU gives them as they are stored, half of the bytes where
        that is 16 bits.
        """
        return StoredRows(self.next_share(rank, size))

    def peek(self, count: int) -> list[Rows]:
        """Return the next `count` batches, fewer where the data end; they are served again."""
        position = self.state_dict()
        found = [self.next_rows() for _ in range(count)]
        self.load_state_dict(position)
        return found

    def next_batch(self) -> Tensor:
        """Return the rows [N, D] of the next batch alone; the caller owns the tensor."""
        return self.next_rows().x


def check_state(
    state: Mapping[str, Any],
    version: int,
    settings: Mapping[str, int],
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Raise ValueError unless a saved position has this version, settings and identity.

    The identity names, where a source has one, what the rows depend on besides.
    """
    if state.get("version") != version:
        raise ValueError(f"data position has version {state.get('version')}, expected {version}")
    if not isinstance(state.get("identity", {}), dict):
        raise ValueError("data position: identity must be a JSON object")
    state = {"whole_sequences": False, **state}  # not in positions that are older than the option
    for name, value in settings.items():
        if state.get(name) != value:
            raise ValueError(
                f"{name} is {value}, but the checkpoint was made with {state.get(name)}"
            )
    if identity is None:
        return
    before = state.get("identity", {})
    changed = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
    if changed:
        raise ValueError(
            "the activations differ from the ones that the checkpoint was made with: "
            f"{', '.join(changed)} changed"
            f"{reading_difference(before.get('dataset'), identity.get('dataset'))}"
        )


def reading_difference(before: Any, now: Any) -> str:
    """Return the flag that reads a dataset as before; nothing where it is read as before.

    Both are what a recipe says of a dataset: of a stream it has no number of documents.
    """
    if not isinstance(before, dict) or not isinstance(now, dict):
        return ""
    if before.get("name") != now.get("name") or not {"documents"} <= before.keys() & now.keys():
        return ""
    was_stream, is_stream = before["documents"] is None, now["documents"] is None
    if was_stream == is_stream:
        return ""
    if is_stream:
        return ": it was not read as a stream, --streaming never continues it"
    return ": it was read as a stream, --streaming always continues it"


def saved_counts(values: Any, *names: str) -> list[int]:
    """Return numbers of a saved position by name; raise ValueError unless they are counts."""
    if not isinstance(values, dict):
        raise ValueError(f"data position: must have {', '.join(names)}, got {shown(values)}")
    for name in names:
        if not is_integer(values.get(name)):
            raise ValueError(
                f"data position: {name} must be a whole number of at least 0, "
                f"got {shown(values.get(name))}"
            )
    return [values[name] for name in names]
