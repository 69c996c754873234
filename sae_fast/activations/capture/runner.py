"""The run of a capture: the model in this thread, the writing of shards in another thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from sae_fast.activations.background import BackgroundWriter
from sae_fast.activations.capture.directory import (
    HELDOUT,
    CaptureDirectory,
    CaptureProgress,
    completed,
    next_part,
)
from sae_fast.activations.capture.harvest import Harvester
from sae_fast.activations.capture.images import ImageBatches
from sae_fast.activations.capture.plan import Capture
from sae_fast.activations.capture.sequences import TokenBatches
from sae_fast.activations.capture.shard_series import (
    ShardSeries,
    bring_to_host,
    shard_metadata,
)
from sae_fast.activations.writer import BESIDE_BYTES

BEHIND = 4  # batches that may wait to be written
FILE_OVERHEAD = 0.01  # of HDF5, at most


@dataclass(frozen=True)
class CaptureResult:
    """The result of a run.

    Attributes:
        rows: captured now and before, for each hook point, without held-out rows.
        heldout_rows: held-out rows captured now and before.
        empty: documents without text, as far as it read.
        stopped: whether it was asked to stop before the end.
    """

    rows: int
    heldout_rows: int
    empty: int
    stopped: bool


class CaptureRun:
    """The capture of one rank.

    Args:
        capture: the model, its hook points and its batches.
        directory: entered and prepared.
        recipe: the recipe of the capture, which every shard carries.
        stop: whether to end now, asked after every batch.
        report: is told how many rows have been captured.
    """

    def __init__(
        self,
        capture: Capture,
        directory: CaptureDirectory,
        recipe: dict[str, Any],
        *,
        stop: Callable[[], bool] = lambda: False,
        report: Callable[[int], None] = lambda _rows: None,
    ) -> None:
        self._capture = capture
        self._directory = directory
        self._stop = stop
        self._report = report
        self._metadata = shard_metadata(recipe)

    def run(self) -> CaptureResult:
        """Capture what is not there yet.

        Raises:
            ValueError, OSError: in one line; whole shards are kept, and a later run continues.
        """
        progress, empty, stopped = self._directory.progress(), 0, False
        if progress.complete:
            return CaptureResult(progress.rows, progress.heldout_rows, empty, stopped)
        if progress.part == HELDOUT:
            if self._capture.heldout is not None:
                limit = self._capture.config.heldout_tokens
                progress, empty, stopped = self.part(self._capture.heldout, limit, progress)
            if not stopped:
                progress = next_part(progress)
                self._directory.save(progress)
        if not stopped:
            limit_all = self._capture.config.max_tokens
            progress, also_empty, stopped = self.part(self._capture.batches, limit_all, progress)
            empty += also_empty
        if not stopped:
            if not progress.rows and self._directory.world_size == 1:
                raise ValueError(
                    f"dataset: {self._capture.config.dataset} has no tokens to capture"
                )
            progress = completed(progress)
            self._directory.save(progress)
        return CaptureResult(progress.rows, progress.heldout_rows, empty, stopped)

    def part(
        self, batches: TokenBatches | ImageBatches, limit: int | None, progress: CaptureProgress
    ) -> tuple[CaptureProgress, int, bool]:
        """Capture one part to its end, from `progress` on, up to `limit` rows.

        Returns how far it came, the number of documents without text, and whether it was stopped.
        """
        config, directory = self._capture.config, self._directory
        harvester = Harvester(
            self._capture.hooked,
            batches,
            max_tokens=limit,
            rank=directory.rank,
            world_size=directory.world_size,
        )
        stopped = False
        with ShardSeries(
            directory,
            self._capture.hooked.hooks,
            self._metadata,
            progress,
            dtype=config.dtype,
            compression=None if config.compression == "none" else config.compression,
            shard_tokens=config.shard_tokens,
        ) as series:
            with (
                BackgroundWriter(
                    series.write, BEHIND, name="shards", does="writes the shards"
                ) as writer,
                closing(harvester.harvest(progress.cursor)) as harvests,
            ):
                for harvest in harvests:
                    writer.put(bring_to_host(harvest, config.dtype))
                    self._report(len(harvest))
                    if self._stop():
                        stopped = True
                        break
            if not stopped:
                series.finish()
        return series.progress, harvester.reached.empty, stopped


def needed_bytes(capture: Capture, rows: int) -> int:
    """Return the disk space for `rows` more rows of every hook point, uncompressed."""
    if not rows:
        return 0
    shards_being_written = len(capture.widths) * BESIDE_BYTES
    return int(capture.stored_bytes(rows) * (1 + FILE_OVERHEAD)) + shards_being_written


def check_space(directory: CaptureDirectory, needed: int) -> int:
    """Return the free bytes of the disk; raise OSError where they are too few."""
    free = directory.free_bytes
    if needed > free:
        raise OSError(
            f"out: {directory.path} has {free / 1e9:,.2f} GB free, this capture needs "
            f"{needed / 1e9:,.2f} GB: fewer --max-tokens or hook points, or another disk"
        )
    return free
