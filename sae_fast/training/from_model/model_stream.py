"""Activations straight from a model, shuffled in memory: `ModelStream`.

The rows that the batches of tokens give, one after another, are cut into windows of `pool_rows`. A
window is served in a random order while the next one is harvested, in step with it. The order of
rows depends on the batches, the seed and `pool_rows` alone, so a position is a few numbers; going
on from one runs the model over its window again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_fast.activations import STARTS, Column, Rows
from sae_fast.activations.capture import Harvest, Harvester, TokenCursor
from sae_fast.activations.capture.sequences import saved_cursor
from sae_fast.activations.columns import SEQUENCE_COLUMNS, STARTS_COLUMN, sequence_starts
from sae_fast.activations.order import shuffled_rows
from sae_fast.activations.source import BatchSource, check_state, saved_counts
from sae_fast.ops import gather_rows_

logger = logging.getLogger(__name__)

STATE_VERSION = 1
# Batches of which the rows are known: a training looks at the first ones before it takes them.
_KNOWN_BATCHES = 32

HookRows = dict[str, Rows]


@dataclass(frozen=True)
class _Place:
    """Where a window begins: the pass over the documents, its number there, its first batch."""

    epoch: int
    number: int
    cursor: TokenCursor


class Window:
    """Rows of all hook points, as they are harvested and then in a random order."""

    def __init__(self, place: _Place, capacity: int) -> None:
        self.place = self.following = place
        self.rows = 0
        self.complete = False
        self._capacity = capacity
        self._pools: dict[str, Tensor] = {}  # each [capacity, D], as the model has them
        self._text: list[tuple[Tensor, ...]] = []  # token_ids, doc_id and position, [n] each
        self.order = torch.empty(0, dtype=torch.int64)
        self._begins: Tensor | None = None

    def reuse(self, place: _Place) -> None:
        """Begin another window in the same memory."""
        self.place = self.following = place
        self.rows, self.complete, self._text = 0, False, []

    def add(self, harvest: Harvest) -> None:
        """Add the rows of a batch."""
        end = self.rows + len(harvest)
        for name, rows in harvest.activations.items():
            if name not in self._pools:
                self._pools[name] = rows.new_empty(self._capacity, rows.shape[1])
            self._pools[name][self.rows : end] = rows
        self._text.append((harvest.token_ids, harvest.doc_id, harvest.position))
        self.rows = end

    def shuffle(self, seed: int, whole_sequences: bool) -> None:
        """Choose the order in which rows are taken; to be called when all of them are there."""
        starts = None
        if whole_sequences:
            text = self.text()
            sequences = (text[name].numpy() for name in SEQUENCE_COLUMNS)
            starts = sequence_starts(self.rows, 1, *sequences)
            self._begins = torch.zeros(self.rows, dtype=torch.bool)
            self._begins[torch.from_numpy(starts)] = True
        order = shuffled_rows(self.rows, starts, seed, self.place.epoch, self.place.number + 1)
        device = next(iter(self._pools.values())).device
        self.order = torch.from_numpy(order).to(device)

    def text(self) -> dict[str, Tensor]:
        """Return token, document and position of the rows, [n] each, as they were harvested."""
        parts = map(torch.cat, zip(*self._text, strict=True))
        return dict(zip(("token_ids", *SEQUENCE_COLUMNS), parts, strict=True))

    def rows_of(
        self,
        name: str,
        rows: Tensor,  # [n] int64
    ) -> Tensor:
        """Return rows of a hook point, [n, D] float32, as they were harvested."""
        return _gathered(self._pools[name], rows.to(self.order.device))

    def take(self, start: int, stop: int) -> HookRows:
        """Return the start-th to stop-th row of the order, [n, D] float32 of each hook point."""
        chosen = self.order[start:stop]
        columns = {}
        if self._begins is not None:
            columns[STARTS] = self._begins[chosen.cpu()].to(chosen.device)
        return {
            name: Rows(_gathered(pool, chosen), dict(columns)) for name, pool in self._pools.items()
        }


class DocumentStream(BatchSource[HookRows]):
    """Base of the streams that run a model over documents again and again: what they count.

    Args:
        max_tokens: rows that count as one pass over the data.
        rows_per_pass: estimated rows of all documents; None: `max_tokens`.
    """

    def __init__(self, max_tokens: int, rows_per_pass: int | None) -> None:
        self._max_tokens = max_tokens
        self._rows_per_pass = rows_per_pass or max_tokens
        self._tokens_served = 0
        self._stall_seconds = 0.0

    @property
    def rows_per_epoch(self) -> int:
        """Rows that are taken, which count as one pass over the data."""
        return self._max_tokens

    @property
    def tokens_served(self) -> int:
        """Rows of each hook point served since the very beginning, over resumes."""
        return self._tokens_served

    @property
    def stall_seconds(self) -> float:
        """Seconds that `next_rows` has taken: rows are made in the thread that asks for them."""
        return self._stall_seconds

    def _passes(self, epoch: int, rows: int) -> float:
        """Return the passes over the documents, after `rows` rows of pass number `epoch`."""
        return float(epoch) + min(1.0, rows / self._rows_per_pass)


class ModelStream(DocumentStream):
    """Batches of the activations of several hook points, of the same tokens at each.

    `next_rows` gives the rows [N, D] float32 of every hook point by its name. When the documents
    end before the training does, they are read again, with one warning. On a GPU the model runs on
    a stream of its own, beside the training.

    Args:
        harvester: gives the rows of one batch of tokens after another, up to `max_tokens`.
        widths: width D of each hook point, by name.
        batch_size: rows N of a batch.
        pool_rows: rows that are shuffled together, of each hook point; twice as many are in memory.
        seed: seed of the order.
        max_tokens: rows that will be taken; they count as one pass over the data.
        identity: on what the rows depend besides, compared when a position is loaded.
        rows_per_pass: estimated rows of all documents; default: `max_tokens`.
        whole_sequences: sequences are shuffled, not rows, and the column STARTS says where each
            begins, as in `ActivationStream`.
    """

    def __init__(
        self,
        harvester: Harvester,
        widths: Mapping[str, int],
        *,
        batch_size: int,
        pool_rows: int,
        seed: int,
        max_tokens: int,
        identity: Mapping[str, Any],
        rows_per_pass: int | None = None,
        whole_sequences: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("pool_rows", pool_rows)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.widths = dict(widths)
        self.batch_size = batch_size
        self.pool_rows = pool_rows
        super().__init__(max_tokens, rows_per_pass)
        self.columns: dict[str, Column] = {STARTS: STARTS_COLUMN} if whole_sequences else {}
        self._harvester = harvester
        self._seed = seed
        self._identity = dict(identity)
        parameter = next(harvester.model.network.parameters())
        self._itemsize = parameter.dtype.itemsize
        self._device = parameter.device
        self._side: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        tokens = harvester.batches.config
        self._capacity = pool_rows + tokens.batch_size * tokens.ctx_len
        self._harvest: Generator[Harvest, None, None] | None = None
        self._windows: tuple[Window, Window] | None = None  # served, and harvested
        self._place = _Place(0, 0, harvester.batches.start)  # of the first of them
        self._served = 0  # rows of it
        self._orders: dict[int, Tensor] = {}  # of the last windows, by the rows served before
        self._told = False

    @property
    def passes(self) -> float:
        """Passes over the documents."""
        place = self._place_served
        return self._passes(place.epoch, place.cursor.rows + self._served)

    @property
    def memory_bytes(self) -> int:
        """Memory of both pools."""
        return 2 * self._capacity * self._itemsize * sum(self.widths.values())

    def next_rows(self) -> HookRows:
        """Return the next rows of every hook point, by its name."""
        begin = time.perf_counter()
        parts: list[HookRows] = []
        missing = self.batch_size
        while missing:
            window, following = self._ready()
            count = min(missing, window.rows - self._served)
            parts.append(window.take(self._served, self._served + count))
            self._note_order(window.order)
            self._served += count
            missing -= count
            self._tokens_served += count
            self._keep_up(window, following)
        self._stall_seconds += time.perf_counter() - begin
        return _joined(parts)

    @property
    def first(self) -> int:
        """Rows that were served before the window that is served."""
        return self._tokens_served - self._served

    @property
    def window(self) -> Window:
        """The window that is served; it was served from."""
        assert self._windows is not None
        return self._windows[0]

    def batch_rows(self, first: int) -> npt.NDArray[np.int64]:
        """Return the number of each row of one of the last batches; fewer where it is too old.

        Rows are counted as they are harvested: in `window` they have the numbers from `first` on.

        Args:
            first: how many rows were served before the batch, since the very beginning.
        """
        found = [torch.empty(0, dtype=torch.int64)]
        for begin, order in self._orders.items():
            low, high = max(first - begin, 0), first + self.batch_size - begin
            found.append(begin + order[low : max(high, 0)].cpu())
        numbers: npt.NDArray[np.int64] = torch.cat(found).numpy()
        return numbers

    def _note_order(self, order: Tensor) -> None:
        """Keep the order of the window that is served, and of those that recent batches are of."""
        self._orders[self.first] = order
        oldest = self._tokens_served - _KNOWN_BATCHES * self.batch_size
        for begin, known in list(self._orders.items()):
            if begin + len(known) <= oldest:
                del self._orders[begin]

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch served."""
        place = self._place_served
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "pool_rows": self.pool_rows,
            "whole_sequences": bool(self.columns),
            "identity": self._identity,
            "epoch": place.epoch,
            "window": place.number,
            "cursor": asdict(place.cursor),
            "served": self._served,
            "tokens": self.tokens_served,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; raise ValueError if model, text or order changed."""
        whole = bool(self.columns)
        expected = {"seed": self._seed, "pool_rows": self.pool_rows, "whole_sequences": whole}
        check_state(state, STATE_VERSION, expected, self._identity)
        epoch, window, served, tokens = saved_counts(state, "epoch", "window", "served", "tokens")
        place = _Place(epoch, window, saved_cursor(state.get("cursor")))
        self._end_harvest()
        self._windows, self._orders = None, {}
        self._place = place
        self._served, self._tokens_served = served, tokens

    def close(self) -> None:
        """End the harvest, and close a harvester that keeps files."""
        self._end_harvest()
        self._harvester.close()

    @property
    def _place_served(self) -> _Place:
        """Return where the window that is served begins."""
        return self._place if self._windows is None else self._windows[0].place

    def _end_harvest(self) -> None:
        if self._harvest is not None:
            self._harvest.close()
            self._harvest = None

    def _ready(self) -> tuple[Window, Window]:
        """Return a window with rows that are left to serve, and the one that is harvested."""
        if self._windows is None:
            first = Window(self._place, self._capacity)
            self._complete(first)
            if self._served > first.rows:
                raise ValueError(
                    f"data position: {self._served} rows served of a window of {first.rows}"
                )
            self._windows = first, Window(first.following, self._capacity)
        window, following = self._windows
        if self._served == window.rows:
            self._complete(following)
            if self._side is not None:  # the training has read what is written over now
                self._side.wait_stream(torch.cuda.current_stream(self._device))
            window.reuse(following.following)
            self._windows, self._served = (following, window), 0
        return self._windows

    def _keep_up(self, window: Window, following: Window) -> None:
        """Advance the following window as far as this one is served, but not beyond the end."""
        wanted = min(
            self._served * self.pool_rows / window.rows,
            self.rows_per_epoch - self.tokens_served - (window.rows - self._served),
        )
        while not following.complete and following.rows < wanted:
            self._add_batch(following)

    def _complete(self, window: Window) -> None:
        while not window.complete:
            self._add_batch(window)
        window.shuffle(self._seed, bool(self.columns))
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def _add_batch(self, window: Window) -> None:
        """Add the next batch to a window; it is complete with enough rows, or at the end."""
        place = window.place
        if self._harvest is None:
            self._harvest = self._harvester.harvest(place.cursor)
        with self._beside():
            harvest = next(self._harvest, None)
            if harvest is not None:
                window.add(harvest)
        if harvest is not None:
            window.following = _Place(place.epoch, place.number + 1, harvest.batch.following)
            window.complete = window.rows >= self.pool_rows
            return
        self._harvest = None
        again = _Place(place.epoch + 1, 0, self._harvester.batches.start)
        if window.rows:
            window.following, window.complete = again, True
        elif place.number == 0:
            raise ValueError("dataset: no document has a token that is kept")
        else:
            window.reuse(again)
        rows = place.cursor.rows + window.rows if window.following is again else place.cursor.rows
        if rows < self.rows_per_epoch and not self._told:
            self._told = True
            logger.warning(
                "all documents together have %s tokens, of %s to train on: they are read again",
                *(f"{rows:,}", f"{self.rows_per_epoch:,}"),
            )

    def _beside(self) -> AbstractContextManager[Any]:
        """Enter, on a GPU, the CUDA stream of the model."""
        if self._side is None:
            return nullcontext()
        return torch.cuda.stream(self._side)


def _gathered(pool: Tensor, chosen: Tensor) -> Tensor:
    """Gather chosen rows [n, D] float32 of a pool."""
    rows = torch.empty(len(chosen), pool.shape[1], dtype=torch.float32, device=pool.device)
    return gather_rows_(rows, pool, chosen)


def _joined(parts: list[HookRows]) -> HookRows:
    """Join the parts of a batch."""
    joined = {}
    for name, first in parts[0].items():
        x = first.x if len(parts) == 1 else torch.cat([part[name].x for part in parts])
        columns = {
            column: torch.cat([part[name].columns[column] for part in parts])
            for column in first.columns
        }
        if STARTS in columns:
            columns[STARTS][0] = True  # the row before it is in another batch
        joined[name] = Rows(x, columns)
    return joined
