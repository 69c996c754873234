"""One source of activations for several trainings: each batch is read once and handed to all.

The trainings have to take the same batches, one step each in turn (see loop.py). Between two of
them a reader may be ahead by the batches that are kept for the others; going back to one of these,
as the start of a training does that looks at the first activations, costs nothing.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from sae_fast.activations import TARGETS, Column, Rows, Transform

Item = TypeVar("Item")
Served = TypeVar("Served", covariant=True)


class ItemSource(Protocol[Served]):
    """What several readers can share: batches in some order, and the position after each."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the data."""

    @property
    def tokens_served(self) -> int:
        """Rows served since the very beginning, over resumes."""

    @property
    def stall_seconds(self) -> float:
        """Seconds for which `next_rows` has kept its callers waiting."""

    def start(self) -> None:
        """Begin to read."""

    def next_rows(self) -> Served:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""

    def close(self) -> None:
        """Release files and threads."""


class _Position(NamedTuple):
    """Where the source stood."""

    state: dict[str, Any]
    tokens: int  # served before


@dataclass
class _Kept(Generic[Item]):
    """A batch that not all readers have taken, the position after it, and what was made of it."""

    item: Item
    after: _Position
    made: dict[Any, Rows] = field(default_factory=dict)


class SharedSource(Generic[Item]):
    """Hands out the batches of `source` to `n_readers` readers.

    Batches are kept until all of them have taken them; a reader that is closed takes no more.
    """

    def __init__(self, source: ItemSource[Item], n_readers: int) -> None:
        self.source = source
        self._n_readers = n_readers
        self._readers: list[SharedReader[Item]] = []
        self._closed = 0
        self._kept: deque[_Kept[Item]] = deque()
        self._first = 0  # number of the first batch kept, counted from where the source was set
        self._before = self._here()  # position before that batch
        self._sets = 0  # how often the source was set to another position

    @property
    def beginning(self) -> tuple[int, int]:
        """The number of the first batch kept, and of the setting that it counts from."""
        return self._first, self._sets

    def reader(
        self,
        select: Callable[[Item], Rows],
        d_in: int,
        columns: Mapping[str, Column],
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> SharedReader[Item]:
        """A source of what `select` takes from each batch, transformed."""
        reader = SharedReader(self, select, d_in, columns, (transform, target_transform))
        self._readers.append(reader)
        return reader

    def take(self, number: int, sets: int) -> _Kept[Item]:
        """The batch of a number, counted since the source was set for the `sets`-th time."""
        self._check(sets)
        while number >= self._first + len(self._kept):
            item = self.source.next_rows()
            self._kept.append(_Kept(item, self._here()))
        return self._kept[number - self._first]

    def forget(self) -> None:
        """Drop what all readers have taken."""
        if len(self._readers) + self._closed < self._n_readers or not self._readers:
            return
        needed = min(reader.number if reader.sets == self._sets else 0 for reader in self._readers)
        while self._kept and self._first < needed:
            self._before = self._kept.popleft().after
            self._first += 1

    def position(self, number: int, sets: int) -> _Position:
        """The position before the batch of a number."""
        self._check(sets)
        if number == self._first:
            return self._before
        return self._kept[number - 1 - self._first].after

    def find(self, state: dict[str, Any]) -> tuple[int, int]:
        """The number of the batch after a position, and of the setting that it counts from.

        Where it is none of those kept the source is set to it, for all readers.
        """
        positions = [self._before, *(kept.after for kept in self._kept)]
        for number, position in enumerate(positions, self._first):
            if position.state == state:
                return number, self._sets
        self.source.load_state_dict(state)
        self._kept.clear()
        self._first, self._before, self._sets = 0, self._here(), self._sets + 1
        return 0, self._sets

    def _here(self) -> _Position:
        return _Position(copy.deepcopy(self.source.state_dict()), self.source.tokens_served)

    def _check(self, sets: int) -> None:
        if sets != self._sets:
            raise ValueError("trainings that share their activations must be at the same step")

    def leave(self, reader: SharedReader[Item]) -> None:
        """Count a reader that takes no more; the last one closes the source."""
        if reader in self._readers:
            self._readers.remove(reader)
            self._closed += 1
            self.forget()
        if self._closed >= self._n_readers:
            self.source.close()


class SharedReader(Generic[Item]):
    """One of the readers of a shared source, an `ActivationSource` with columns.

    What it serves may be in the hands of other readers and must not be changed.
    """

    def __init__(
        self,
        shared: SharedSource[Item],
        select: Callable[[Item], Rows],
        d_in: int,
        columns: Mapping[str, Column],
        transforms: tuple[Transform | None, Transform | None],
    ) -> None:
        self._shared = shared
        self._select = select
        self._transforms = transforms
        self._made_by = (select, *map(_identity, transforms))
        self.d_in = d_in
        self.columns = columns
        self.origin: dict[str, str] = {}  # of which activations its rows are, if it is known
        self.number, self.sets = shared.beginning

    def transformed(
        self, transform: Transform | None, target_transform: Transform | None
    ) -> SharedReader[Item]:
        """This reader, with these transforms from now on."""
        self._transforms = transform, target_transform
        self._made_by = (self._select, *map(_identity, self._transforms))
        return self

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the data."""
        return self._shared.source.rows_per_epoch

    @property
    def counts_rows(self) -> bool:
        """True where `tokens_served` counts every row that a step takes."""
        return bool(getattr(self._shared.source, "counts_rows", False))

    @property
    def tokens_served(self) -> int:
        """Rows served since the very beginning, over resumes."""
        return self._shared.position(self.number, self.sets).tokens

    @property
    def memory_bytes(self) -> int:
        """What the source keeps in memory, for all readers."""
        return int(getattr(self._shared.source, "memory_bytes", 0))

    @property
    def epoch(self) -> int:
        """Epoch of the next row, from 0."""
        return self.tokens_served // self.rows_per_epoch

    @property
    def stall_seconds(self) -> float:
        """Seconds for which the source has kept all readers together waiting."""
        return self._shared.source.stall_seconds

    def start(self) -> None:
        """Begin to read."""
        self._shared.source.start()

    def next_batch(self) -> Tensor:
        """The next rows [N, D]."""
        return self.next_rows().x

    def next_rows(self) -> Rows:
        """The next rows with their columns; readers with the same transforms get the same ones."""
        kept = self._shared.take(self.number, self.sets)
        if self._made_by not in kept.made:
            kept.made[self._made_by] = _transformed(self._select(kept.item), *self._transforms)
        rows = kept.made[self._made_by]
        self.number += 1
        self._shared.forget()
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch served, as the source itself has it."""
        return self._shared.position(self.number, self.sets).state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; ValueError if the data is not the same."""
        self.number, self.sets = self._shared.find(state)

    def passes_at(self, state: dict[str, Any]) -> float | None:
        """Passes over the data at a position, where the source counts them."""
        count = getattr(self._shared.source, "passes_at", None)
        return None if count is None else float(count(state))

    def current_shards(self) -> list[Path]:
        """Shards that the rows last read may come from, where the source knows them."""
        shards: list[Path] = getattr(self._shared.source, "current_shards", list)()
        return shards

    def close(self) -> None:
        """Take no more batches."""
        self._shared.leave(self)


def _identity(transform: Transform | None) -> Any:
    if transform is None:
        return None
    mean = transform.mean.detach().to("cpu").contiguous()
    return mean.numpy().tobytes(), float(transform.scale)


def _transformed(
    rows: Rows, transform: Transform | None, target_transform: Transform | None
) -> Rows:
    """The rows as a training takes them, in tensors of their own where anything is changed."""
    columns = rows.columns
    if target_transform is not None:
        columns = {**columns, TARGETS: _applied(columns[TARGETS], target_transform)}
    return Rows(rows.x if transform is None else _applied(rows.x, transform), columns)


def _applied(batch: Tensor, transform: Transform) -> Tensor:
    return (batch - transform.mean.to(batch.device)).mul_(transform.scale)
