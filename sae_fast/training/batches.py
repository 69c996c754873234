"""The batches of each step on the device, copied there while the step before is running.

On a GPU a source's batches are fetched one step ahead: `prefetch` takes them from the source and
copies them on a stream of its own into the buffer that the step before last has read. Rows that are
stored in 16 bits are copied so, and widened there. A checkpoint saves the position after the
batches that were handed out, not after the fetched ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations import Rows, Source, Transform
from sae_fast.activations.source import StoredRows, placed
from sae_fast.distributed.ranks import ALONE, Ranks

_Transforms = tuple[Transform | None, Transform | None]  # of the rows, of their targets


@dataclass(frozen=True)
class _Fetched:
    """The batches of a step, and the state of the source when they had been fetched."""

    batches: list[Rows]
    position: dict[str, Any]
    passes: float | None
    shards: list[Path]
    waited: float  # seconds that the host waited for the source


class StepBatches:
    """Hands out the batches of one step after another.

    Args:
        source: where they come from.
        device: where they are used.
        per_step: how many a step takes from each rank.
        ahead: whether to fetch the batches of the next step while one is running.
        ranks: the processes that have a batch each in turn; each is handed its own.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        per_step: int,
        *,
        ahead: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self._source = source
        self._ranks = ranks
        self._device = device
        self._per_step = per_step
        self._ahead = ahead
        self._next: _Fetched | None = None
        self._error: Exception | None = None
        self._handed_out: _Fetched | None = None
        self._stalled = 0.0
        self._uploads = _Uploads(device) if ahead and device.type == "cuda" else None

    def start(self) -> None:
        """Let the source read ahead what this rank takes."""
        self._source.start(self._ranks.rank, self._ranks.size)

    def take(self) -> list[Rows]:
        """Return the batches of the next step; raise what kept the source from serving them."""
        if self._error is not None:
            raise self._error
        if not self._ahead:
            before = self._source.stall_seconds
            batches = self._next_batches()
            self._stalled += self._source.stall_seconds - before
            return [batch.map(self._on_device) for batch in batches]
        fetched, self._next = self._next or self._fetch(), None
        self._handed_out = fetched
        if self._uploads is None:
            self._stalled += fetched.waited
        else:
            self._uploads.hand_over(fetched.waited)
        return fetched.batches

    def prefetch(self) -> None:
        """Fetch the next batches; to be called when the step of the last ones was launched."""
        if not self._ahead:
            return
        if self._uploads is not None:
            self._uploads.end_step()
        try:
            self._next = self._fetch()
        except Exception as error:  # of a step that may never be made: `take` raises it
            self._error = error

    def current_shards(self) -> list[Path]:
        """Return the shards that the last batch handed out may come from."""
        fetched = self._handed_out
        return self._source.current_shards() if fetched is None else fetched.shards

    def take_stalled_seconds(self) -> float:
        """Return the seconds since the last call in which there was nothing to train on.

        On a GPU that is the idle time before a step for which the host waited for the source; to be
        called when the device has finished all steps.
        """
        stalled, self._stalled = self._stalled, 0.0
        return stalled if self._uploads is None else stalled + self._uploads.take_idle_seconds()

    def state_dict(self) -> dict[str, Any]:
        """Return the source's position after the last batch handed out."""
        fetched = self._handed_out
        return self._source.state_dict() if fetched is None else fetched.position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; raise ValueError if the data is not the same."""
        self._next = self._handed_out = self._error = None
        self._source.load_state_dict(state)

    def rows_served(self) -> int | None:
        """Return the rows up to the position; None: the source does not count every row."""
        return self._source.tokens_served if self._source.counts_rows else None

    def passes(self, tokens: int) -> float:
        """Return the passes over the data up to the position: of documents, or by `tokens` rows."""
        fetched = self._handed_out
        passes = self._source.passes if fetched is None else fetched.passes
        return tokens / self._source.rows_per_epoch if passes is None else passes

    def _next_batches(self) -> list[Rows]:
        """Return the batches of a step that are this rank's; the others' are passed over."""
        rank, size = self._ranks.rank, self._ranks.size
        if size == 1:
            return [self._source.next_rows() for _ in range(self._per_step)]
        return [self._source.next_share(rank, size) for _ in range(self._per_step)]

    def _fetch(self) -> _Fetched:
        source, share = self._source, (self._ranks.rank, self._ranks.size)
        before = source.stall_seconds
        if self._uploads is None:
            batches = self._next_batches()
            waited = source.stall_seconds - before
        else:
            stored = [source.next_stored(*share) for _ in range(self._per_step)]
            waited = source.stall_seconds - before
            batches = self._uploads.copy(stored)
        shards = source.current_shards()
        return _Fetched(batches, source.state_dict(), source.passes, shards, waited)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


class _Uploads:
    """Copies batches to the device on a side stream, into two buffers in turn, and widens them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._buffers: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._turn = 0
        self._transforms: tuple[_Transforms, _Transforms] = ((None, None), (None, None))
        start = _event()
        start.record(torch.cuda.current_stream(device))
        self._ends = [start, start]  # of the last two steps, the later one last
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []

    def copy(self, batches: list[StoredRows]) -> list[Rows]:
        """Copy the batches to the device and widen them there; complete from `hand_over` on.

        Batches that are there already stay as they are. Waits for the step before last, which has
        read the buffer. This also keeps the host from running away from the device, with
        page-locked batches piling up between them.
        """
        self._ends[0].synchronize()
        self._turn = 1 - self._turn
        on_device = [self._widened(number, batch) for number, batch in enumerate(batches)]
        self._copied.record(self._stream)
        return on_device

    def _widened(self, number: int, batch: StoredRows) -> Rows:
        current = torch.cuda.current_stream(self._device)
        columns = {
            name: self._upload(f"{number} {name}", column)
            for name, column in batch.rows.columns.items()
        }
        rows = Rows(self._upload(f"{number} x", batch.rows.x), columns)
        transforms = self._on_device((batch.transform, batch.target_transform))

        def make(name: str, stored: Tensor) -> Tensor:
            with torch.cuda.stream(current):
                return self._buffer(f"{number} {name} widened", stored, torch.float32)

        with torch.cuda.stream(self._stream):
            return StoredRows(rows, *transforms).widened(make)

    def _on_device(self, transforms: _Transforms) -> _Transforms:
        """Return transforms with their means on the device, which they are copied to once."""
        known, there = self._transforms
        if any(one is not other for one, other in zip(known, transforms, strict=True)):
            first, second = transforms
            there = placed(first, self._device), placed(second, self._device)
            self._transforms = transforms, there
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return there

    def _buffer(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the memory of a name in the present turn, in the shape of `like`."""
        buffers = self._buffers[self._turn]
        if name not in buffers:
            buffers[name] = torch.empty_like(like, device=self._device, dtype=dtype)
            # Memory from the allocator may still be in use by work queued on the current stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return buffers[name]

    def _upload(self, name: str, batch: Tensor) -> Tensor:
        if batch.device == self._device:
            return batch
        buffer = self._buffer(name, batch, batch.dtype)
        # From pageable memory the copy would not be asynchronous. A page-locked batch may be
        # dropped here: torch keeps its memory until the copy is done.
        pinned = batch if batch.is_pinned() else batch.pin_memory()
        with torch.cuda.stream(self._stream):
            return buffer.copy_(pinned, non_blocking=True)

    def hand_over(self, waited: float) -> None:
        """Let the current stream wait for the copies; the host has `waited` for the batches."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied)
        if waited > 0:
            begin = _event()
            begin.record(current)
            self._gaps.append((self._ends[1], begin, waited))

    def end_step(self) -> None:
        """Record that all of a step has been launched on the current stream."""
        end = _event()
        end.record(torch.cuda.current_stream(self._device))
        self._ends = [self._ends[1], end]

    def take_idle_seconds(self) -> float:
        """Return the idle time since the last call before steps that waited for batches."""
        gaps, self._gaps = self._gaps, []
        return sum(_idle(*gap) for gap in gaps)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


def _idle(end: torch.cuda.Event, begin: torch.cuda.Event, waited: float) -> float:
    """Return seconds between two steps, at most `waited`: an evaluation may lie between them."""
    milliseconds: float = end.elapsed_time(begin)
    return min(waited, milliseconds / 1000)
