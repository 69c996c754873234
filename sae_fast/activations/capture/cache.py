"""Harvested activations kept as shards too: `--cache-dir` of a training.

The directory is laid out as by a capture, see directory.py. Batches come in the order of the
documents, but a reader may go back, or begin further on when it resumes; every batch is stored
once, and batches that were passed over are harvested for the shards alone.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack

from sae_fast.activations.capture.directory import (
    HELDOUT,
    CaptureDirectory,
    completed,
    next_part,
)
from sae_fast.activations.capture.harvest import Harvest, Harvester
from sae_fast.activations.capture.plan import Capture, made_with
from sae_fast.activations.capture.runner import CaptureRun, check_space, needed_bytes
from sae_fast.activations.capture.sequences import TokenCursor
from sae_fast.activations.capture.shard_series import ShardSeries, bring_to_host, shard_metadata
from sae_fast.activations.capture.storage_type import with_storage_type


class CachingHarvester(Harvester):
    """A harvester that also writes the shards of a capture; to be closed.

    Held-out documents are captured first. A shard appears when it is whole; the last one, and the
    manifests, when all rows have been harvested.

    Args:
        capture: what is harvested, `max_tokens` included.
        directory: where the shards are written.

    Raises:
        ValueError, OSError: in one line, where another capture is there or there is no room.
    """

    def __init__(self, capture: Capture, directory: CaptureDirectory) -> None:
        limit = capture.config.max_tokens
        super().__init__(capture.hooked, capture.batches, max_tokens=limit)
        self._open = ExitStack()
        self._directory = self._open.enter_context(directory)
        try:
            self._prepare(capture)
        except BaseException:
            self._open.close()
            raise

    def _prepare(self, capture: Capture) -> None:
        capture = with_storage_type(capture, self._directory)
        recipe = capture.recipe(1)
        self._directory.prepare(recipe, made_with(str(capture.model.device)))
        progress = self._directory.progress()
        rows, _ = capture.expected_rows()
        rows += capture.config.heldout_tokens - progress.rows - progress.heldout_rows
        check_space(self._directory, needed_bytes(capture, max(0, rows)))
        if progress.part == HELDOUT and not progress.complete:
            if capture.heldout is not None:
                run = CaptureRun(capture, self._directory, recipe)
                progress, _, _ = run.part(capture.heldout, capture.config.heldout_tokens, progress)
            progress = next_part(progress)
            self._directory.save(progress)
        self._complete = progress.complete
        self._next = progress.cursor or self.batches.start
        config = capture.config
        self._series = ShardSeries(
            self._directory,
            capture.hooked.hooks,
            shard_metadata(recipe),
            progress,
            dtype=config.dtype,
            compression=None if config.compression == "none" else config.compression,
            shard_tokens=config.shard_tokens,
        )
        self._dtype = config.dtype

    def harvest(self, cursor: TokenCursor | None = None) -> Generator[Harvest, None, None]:
        """Run the model as `Harvester.harvest` does, and store what is not in the shards yet."""
        begin = self.batches.start if cursor is None else cursor
        if not self._complete and begin.batch > self._next.batch:
            for harvest in super().harvest(self._next):
                if harvest.batch.cursor.batch >= begin.batch:
                    break
                self._keep(harvest)
        for harvest in super().harvest(cursor):
            self._keep(harvest)
            yield harvest
        self._finish()

    def close(self) -> None:
        """Finish the shards where all rows are there; leave none half written."""
        limit = self.max_tokens
        if limit is not None and self._next.rows >= limit:
            self._finish()
        self._series.__exit__(None, None, None)
        self._open.close()

    def _keep(self, harvest: Harvest) -> None:
        if self._complete or harvest.batch.cursor.batch < self._next.batch:
            return
        self._series.write(bring_to_host(harvest, self._dtype))
        self._next = harvest.batch.following

    def _finish(self) -> None:
        if self._complete:
            return
        self._complete = True
        self._series.finish()
        self._directory.save(completed(self._series.progress))
        self._directory.finish()
