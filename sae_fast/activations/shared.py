"""One source of activations for several trainings: each batch is read once and handed to all.

The trainings have to take the same batches, one step each in turn. Between two of them a reader may
be ahead by the batches that are kept for the others; going back to one of these, as the start of a
training does that looks at the first activations, costs nothing.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from sae_fast.activations.columns import Column
from sae_fast.activations.source import BatchSource, Rows, Source, Transform
from sae_fast.activations.targets import TARGETS

Item = TypeVar("Item")


class _Position(NamedTuple):
    """The position of the source."""

    state: dict[str, Any]
    tokens: int  # served before
    passes: float | None


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

    def __init__(self, source: BatchSource[Item], n_readers: int) -> None:
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
        origin: Mapping[str, Any] | None = None,
    ) -> SharedReader[Item]:
        """Return a source of what `select` takes from each batch: rows `d_in` wide with columns."""
        reader = SharedReader(self, select, d_in, columns, origin or {})
        self._readers.append(reader)
        return reader

    def take(self, number: int, sets: int) -> _Kept[Item]:
        """Return the batch of a number, counted since the source was set the `sets`-th time."""
        self._check(sets)
        while number >= self._first + len(self._kept):
            item = self.source.next_rows()
            self._kept.append(_Kept(item, self._here()))
        return self._kept[number - self._first]

    def read_ahead(self, count: int) -> None:
        """Take so many batches from the source, where the readers will find them."""
        if count > 0:
            self.take(self._first + count - 1, self._sets)

    def forget(self) -> None:
        """Drop what all readers have taken."""
        if len(self._readers) + self._closed < self._n_readers or not self._readers:
            return
        needed = min(reader.number if reader.sets == self._sets else 0 for reader in self._readers)
        while self._kept and self._first < needed:
            self._before = self._kept.popleft().after
            self._first += 1

    def position(self, number: int, sets: int) -> _Position:
        """Return the position before the batch of a number."""
        self._check(sets)
        if number == self._first:
            return self._before
        return self._kept[number - 1 - self._first].after

    def find(self, state: dict[str, Any]) -> tuple[int, int]:
        """Return the number of the batch after a position, and of the setting it counts from.

        Where no batch that is kept follows that position, the source is set to it, for all readers.
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
        state = copy.deepcopy(self.source.state_dict())
        return _Position(state, self.source.tokens_served, self.source.passes)

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


class SharedReader(Source, Generic[Item]):
    """One of the readers of a shared source.

    What it serves may be in the hands of other readers and must not be changed.
    """

    def __init__(
        self,
        shared: SharedSource[Item],
        select: Callable[[Item], Rows],
        d_in: int,
        columns: Mapping[str, Column],
        origin: Mapping[str, Any],
    ) -> None:
        self._shared = shared
        self._select = select
        self._d_in, self._columns, self._origin = d_in, columns, origin
        self.set_transform(None)
        self.number, self.sets = shared.beginning

    @property
    def source(self) -> BatchSource[Item]:
        """The source that is shared."""
        return self._shared.source

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self._d_in

    @property
    def columns(self) -> Mapping[str, Column]:
        """Name, type and range of each column that `next_rows` serves beside the rows."""
        return self._columns

    @property
    def origin(self) -> Mapping[str, Any]:
        """Model, hook, layer and the like of the activations, as far as they are known."""
        return self._origin

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the data."""
        return self._shared.source.rows_per_epoch

    @property
    def counts_rows(self) -> bool:
        """Whether `tokens_served` counts every row of a step."""
        return self._shared.source.counts_rows

    @property
    def tokens_served(self) -> int:
        """Rows served since the very beginning, over resumes."""
        return self._position().tokens

    @property
    def passes(self) -> float | None:
        """Passes over the documents that the rows are computed from; None: rows are stored."""
        return self._position().passes

    @property
    def nonfinite_rows(self) -> int:
        """Rows of the source that are left out."""
        return self._shared.source.nonfinite_rows

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the source takes, for all readers."""
        return self._shared.source.memory_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes that the rows of the source take on a GPU, for all readers."""
        return self._shared.source.device_bytes

    @property
    def stall_seconds(self) -> float:
        """Seconds for which the source has kept all readers together waiting."""
        return self._shared.source.stall_seconds

    def start(self, rank: int = 0, size: int = 1) -> None:
        """Begin to read ahead, all batches for the readers together."""
        self._shared.source.start()

    def set_transform(
        self, transform: Transform | None, target_transform: Transform | None = None
    ) -> None:
        """Serve rows and targets transformed from the next batch on; None: as they are."""
        self._transforms = transform, target_transform
        self._made_by = (self._select, *map(_identity, self._transforms))

    def next_rows(self) -> Rows:
        """Return the next rows; readers with equal transforms get the same tensors."""
        return self.next_share(0, 1)

    def next_share(self, rank: int, size: int) -> Rows:
        """Return the batch of one rank among the next `size`; no other is transformed."""
        self._shared.take(self.number + size - 1, self.sets)
        rows = self._rows_of(self.number + rank)
        self.number += size
        self._shared.forget()
        return rows

    def peek(self, count: int) -> list[Rows]:
        """Return the next `count` batches, which are kept and need not be made again."""
        return [self._rows_of(self.number + place) for place in range(count)]

    def _rows_of(self, number: int) -> Rows:
        """Return what this reader takes from the batch of a number."""
        kept = self._shared.take(number, self.sets)
        if self._made_by not in kept.made:
            kept.made[self._made_by] = _transformed(self._select(kept.item), *self._transforms)
        return kept.made[self._made_by]

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch served, as the source itself has it."""
        return self._position().state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; raise ValueError if the data is not the same."""
        self.number, self.sets = self._shared.find(state)

    def current_shards(self) -> list[Path]:
        """Return the shards that the rows last read may come from."""
        return self._shared.source.current_shards()

    def close(self) -> None:
        """Take no more batches."""
        self._shared.leave(self)

    def _position(self) -> _Position:
        return self._shared.position(self.number, self.sets)


def _identity(transform: Transform | None) -> Any:
    if transform is None:
        return None
    mean = transform.mean.detach().to("cpu").contiguous()
    return mean.numpy().tobytes(), float(transform.scale)


def _transformed(
    rows: Rows, transform: Transform | None, target_transform: Transform | None
) -> Rows:
    """Return the rows as a training takes them, in new tensors where anything is changed."""
    columns = rows.columns
    if target_transform is not None:
        columns = {**columns, TARGETS: _applied(columns[TARGETS], target_transform)}
    return Rows(rows.x if transform is None else _applied(rows.x, transform), columns)


def _applied(batch: Tensor, transform: Transform) -> Tensor:
    return (batch - transform.mean.to(batch.device)).mul_(transform.scale)
