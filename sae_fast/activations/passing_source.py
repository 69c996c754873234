"""Batches from an iterator, a DataLoader or another iterable of tensors, in the order they come.

Nothing is shuffled here and nothing is kept: rows pass by once. What is begun anew for every epoch,
a DataLoader or a list, is read from its start each time; an iterator is read once. A position is a
number of rows, so a resumed run reads these rows again and passes over them. The last of them is
compared with the checkpoint, which shows another order.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from sae_fast.activations.cutting import count_held
from sae_fast.activations.given_arrays import as_given_tensor
from sae_fast.activations.source import (
    Rows,
    Source,
    Transform,
    check_state,
    checked_transform,
    placed,
    saved_counts,
)
from sae_fast.activations.storage import storage_of

STATE_VERSION = 1


@dataclass(frozen=True)
class _Position:
    """A position after `row` rows of an epoch, of which the last one has a digest."""

    epoch: int = 0
    row: int = 0
    tokens: int = 0
    digest: str = ""


class PassingSource(Source):
    """Rows of tensors or arrays [n, D] that an iterator or an iterable gives, in its order.

    Args:
        given: the iterator, or an iterable that begins anew for each epoch.
        batch_size: rows of a batch; parts are joined and divided as needed.
        seed: of the order of a DataLoader that shuffles and has no generator of its own.
        wanted: the rows that the run trains on, by max_steps or max_tokens; None: neither is given.
        epochs: the epochs that the run asks for; None: it does not say.
        held_fraction: the share of the rows that is held out, the first ones.

    Attributes:
        held: the held-out rows [n, D] as they were given; None where none are held out.

    Raises:
        ValueError: in one line, for parts that are no rows, where the data do not say how many rows
            they have and the run does not either, and where an iterator would be read twice.
    """

    counts_rows = True

    def __init__(
        self,
        given: Iterable[Any],
        batch_size: int,
        *,
        seed: int = 0,
        wanted: int | None = None,
        epochs: int | None = None,
        held_fraction: float = 0.0,
    ) -> None:
        self._given = given
        self._is_iterator = isinstance(given, Iterator)
        self._batch_size, self._seed = batch_size, seed
        rows = None if self._is_iterator else stated_rows(given)
        if epochs is not None and (self._is_iterator or rows is None):
            reason = (
                "an iterator is read once" if self._is_iterator else "no number of rows is known"
            )
            raise ValueError(f"max_epochs = {epochs} is for other data: {reason}, give max_tokens")
        if rows is None and wanted is None:
            raise ValueError(
                f"max_tokens or max_steps is missing: {_kind(given)} does not state its rows"
            )
        self._held_rows = 0
        if held_fraction and rows is not None:
            self._held_rows = count_held(rows, held_fraction)
        elif held_fraction and wanted is not None:
            self._held_rows = max(1, round(held_fraction / (1 - held_fraction) * wanted))
        self._rows = rows - self._held_rows if rows is not None else wanted or 0
        limits = [] if epochs is None else [epochs * self._rows]
        limits += [] if wanted is None else [wanted]
        if self._held_rows and _is_shuffled(given) and min(limits, default=0) > self._rows:
            raise ValueError(
                "heldout_fraction: the DataLoader shuffles, so the next epoch would train on rows "
                "that were held out: give heldout, or train for one epoch"
            )
        self.held: Tensor | None = None
        self._parts: Iterator[Any] | None = None
        self._part: Tensor = torch.empty(0)
        self._used = 0  # rows of the part
        self._read = self._served = _Position()
        self._ahead: deque[tuple[Tensor, _Position]] = deque()
        self._transform: Transform | None = None
        self._seconds = 0.0
        self._d_in: int | None = None
        self._begin_epoch()

    @property
    def d_in(self) -> int:
        """Width of a row."""
        assert self._d_in is not None
        return self._d_in

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the data; where that is unknown, the rows of the whole run."""
        return self._rows

    @property
    def tokens_served(self) -> int:
        """Rows served since the very beginning, over resumes."""
        return self._served.tokens

    @property
    def stall_seconds(self) -> float:
        """Seconds for which the data have kept `next_rows` waiting."""
        return self._seconds

    @property
    def memory_bytes(self) -> int:
        """Bytes of the held-out rows and of a batch."""
        held = 0 if self.held is None else self.held.numel() * self.held.element_size()
        return held + 8 * self._batch_size * self.d_in

    def set_transform(
        self, transform: Transform | None, target_transform: Transform | None = None
    ) -> None:
        """Serve rows transformed from the next batch on; None: as they are."""
        transform = checked_transform(transform, self.d_in)
        self._transform = placed(transform, self._device)

    def next_rows(self) -> Rows:
        """Return the next rows; raise ValueError where the data have ended."""
        begin = time.perf_counter()
        batch, self._served = self._ahead.popleft() if self._ahead else self._read_batch()
        self._seconds += time.perf_counter() - begin
        return self._transformed(batch)

    def peek(self, count: int) -> list[Rows]:
        """Return the next batches, which are served again: `count`, or as many as an epoch has."""
        whole = max(1, self._rows // self._batch_size)
        while len(self._ahead) < min(count, whole):
            try:
                self._ahead.append(self._read_batch())
            except _DataEnded:
                if not self._ahead:
                    raise
                break
        return [self._transformed(batch) for batch, _ in list(self._ahead)[:count]]

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch served."""
        position = self._served
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "held_rows": self._held_rows,
            "epoch": position.epoch,
            "row": position.row,
            "tokens": position.tokens,
            "digest": position.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read up to where `state` was taken.

        Raises ValueError if the data have changed, and where an iterator has been read already.
        """
        check_state(state, STATE_VERSION, {"seed": self._seed, "held_rows": self._held_rows})
        epoch, row, tokens = saved_counts(state, "epoch", "row", "tokens")
        if epoch > tokens or row > tokens:
            raise ValueError(f"data position: row {row} of epoch {epoch} after {tokens} rows")
        position = _Position(epoch, row, tokens, str(state.get("digest")))
        if position == self._served:
            return
        if self._read != _Position():
            if self._is_iterator:
                raise ValueError(
                    "an iterator cannot be read again: make a new one, and a new Trainer"
                )
            self._ahead.clear()
            self._read = _Position()
            self._begin_epoch()
        while self._read.epoch < epoch:
            while not _begins_anywhere(self._given) and self._next_part():
                pass  # the order of an epoch may depend on those before it
            self._read = _Position(self._read.epoch + 1)
            self._begin_epoch()
        found = ""
        while self._read.row < row:
            rows = self._take(min(self._batch_size, row - self._read.row), f"{tokens:,} rows")
            found = _digest(rows[-1])
        if self._read.epoch != epoch or found != position.digest:
            raise ValueError(
                "the rows differ from the ones that the checkpoint was made with, or come in "
                "another order: a resumed run needs all of them from the start, as they were"
            )
        self._read = self._served = position

    def close(self) -> None:
        """Stop the workers of a DataLoader; the data are the caller's."""
        self._parts = None

    def _transformed(self, batch: Tensor) -> Rows:
        if self._transform is None:
            return Rows(batch.clone(), {})
        mean, scale = self._transform
        return Rows((batch - mean).mul_(scale), {})

    def _read_batch(self) -> tuple[Tensor, _Position]:
        """Read a batch [batch_size, D] float32, and return it with the position after it."""
        tokens = self._read.tokens + self._batch_size
        parts, missing = [], self._batch_size
        while missing:
            rows = self._take(missing, "more")
            parts.append(rows)
            missing -= len(rows)
        batch = torch.cat(parts)
        self._read = _Position(self._read.epoch, self._read.row, tokens, _digest(batch[-1]))
        return batch, self._read

    def _take(self, count: int, wanted: str) -> Tensor:
        """Read up to `count` rows [n, D] float32 of one part; n is at least 1.

        Raises _DataEnded, saying that `wanted` rows are asked for, where an iterator has no more.
        """
        position = self._read
        while self._used == len(self._part):
            if self._next_part():
                continue
            if self._is_iterator or position.row == 0:
                kind = "iterator" if self._is_iterator else "data"
                raise _DataEnded(
                    f"data: the {kind} ended after {position.row:,} rows to train on, and the run "
                    f"needs {wanted}"
                )
            position = self._read = _Position(position.epoch + 1, 0, position.tokens)
            self._begin_epoch()
        rows = self._part[self._used : self._used + count]
        self._used += len(rows)
        self._read = _Position(position.epoch, position.row + len(rows), position.tokens)
        return rows.to(self._device, torch.float32, copy=True)

    def _begin_epoch(self) -> None:
        """Begin to read from the start, and pass over the held-out rows there."""
        with _seeded(self._seed, self._read.epoch):
            self._parts = iter(self._given)
            self._part, self._used = torch.empty(0), 0
            if not self._next_part():
                raise _DataEnded(f"data: {_kind(self._given)} gives no rows")
        self._device = self._part.device
        self._d_in = self._part.shape[1]
        held, left = [], self._held_rows
        while left:
            if self._used == len(self._part) and not self._next_part():
                raise _DataEnded(f"data: fewer rows than the {self._held_rows:,} to hold out")
            rows = self._part[self._used : self._used + left]
            held.append(rows.to(self._device, torch.float32, copy=True))
            self._used, left = self._used + len(rows), left - len(rows)
        if not held:
            return
        rows = torch.cat(held)
        if self.held is None:
            self.held = rows
        elif not torch.equal(self.held, rows):
            raise ValueError(
                "heldout_fraction: the data come in another order than in the epoch before, which "
                "would train on held-out rows: give heldout"
            )

    def _next_part(self) -> bool:
        """Take the next part that has rows; return False where there is none."""
        assert self._parts is not None
        for given in self._parts:
            part = self._checked(given)
            if len(part):
                self._part, self._used = part, 0
                return True
        return False

    def _checked(self, given: Any) -> Tensor:
        if isinstance(given, list | tuple) and len(given) == 1:
            given = given[0]  # as a TensorDataset gives its rows
        if not isinstance(given, Tensor | np.ndarray):
            what = f"{len(given)} of them" if isinstance(given, list | tuple) else _kind(given)
            raise ValueError(f"data: each part must be one tensor or array [n, D], got {what}")
        part = as_given_tensor("data", given).detach()
        width = "D" if self._d_in is None else self._d_in
        if part.ndim != 2 or part.shape[1] != (self._d_in or part.shape[1]) or not part.shape[1]:
            raise ValueError(
                f"data: each part must have shape [n, {width}], got {list(part.shape)}"
            )
        try:
            storage_of(part.dtype)
        except ValueError as error:
            raise ValueError(f"data: {error}") from None
        return part


class _DataEnded(ValueError):
    """There are no more rows."""


def _kind(given: object) -> str:
    return type(given).__name__


def _digest(row: Tensor) -> str:
    return hashlib.sha256(row.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def stated_rows(given: Iterable[Any]) -> int | None:
    """Return the rows that one pass over the data gives, as far as they say it."""
    if isinstance(given, DataLoader):
        sampler: Any = given.sampler
        if given.batch_size is None or not isinstance(sampler, Sized):
            return None
        rows = len(sampler)
        return rows - rows % given.batch_size if given.drop_last else rows
    if isinstance(given, Sequence):
        return sum(len(part) for part in given if isinstance(part, Tensor | np.ndarray)) or None
    return None


def _begins_anywhere(given: Iterable[Any]) -> bool:
    """Return whether the order of an epoch depends on none before it."""
    if isinstance(given, DataLoader):
        sampler = given.sampler
        is_free = isinstance(sampler, RandomSampler) and sampler.generator is None
        return is_free or isinstance(sampler, SequentialSampler)
    return isinstance(given, Sequence)


def _is_shuffled(given: Iterable[Any]) -> bool:
    return isinstance(given, DataLoader) and isinstance(given.sampler, RandomSampler)


@contextmanager
def _seeded(seed: int, epoch: int) -> Iterator[None]:
    """Let torch's generator have a state that follows from seed and epoch, then its own again.

    The order in which a DataLoader shuffles is drawn from it, where it has none of its own.
    """
    before = torch.get_rng_state()
    drawn = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    torch.default_generator.manual_seed(int(drawn) >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)
