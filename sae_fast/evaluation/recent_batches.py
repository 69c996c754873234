"""`RecentBatches`: what the newest batches of a training say of all latents.

The codes are the ones of the training steps: nothing is encoded for it. Memory is O(d_sae · count),
whatever the number of batches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sae_fast.evaluation.code_store import block_codes
from sae_fast.evaluation.latents import FiringCounts
from sae_fast.evaluation.text_rows import Integers
from sae_fast.evaluation.top_entries import EMPTY, TopEntries, priority_of
from sae_fast.ops import Code


class RecentBatches:
    """On how many of the newest rows each latent fires, and its strongest rows among them.

    Args:
        d_sae: latents.
        count: strongest rows of each that are kept.
        window: rows that are taken into account, at least so many once there were so many batches,
            and at most twice as many and a batch.
        newest: of how many of the last rows the numbers are kept.
    """

    def __init__(self, d_sae: int, count: int, window: int, newest: int) -> None:
        self._d_sae, self._count, self._window, self._n_newest = d_sae, count, window, newest
        self._newer = _Span(d_sae, count)
        self._older = _Span(d_sae, count)
        self.newest = np.zeros(0, np.int64)

    def add(
        self,
        code: Code,  # of n rows
        rows: Integers,  # [n], numbers of the rows
    ) -> None:
        """Take a batch."""
        if self._newer.firing.rows >= self._window:
            self._older, self._newer = self._newer, _Span(self._d_sae, self._count)
        self._newer.add(code, rows)
        self.newest = np.concatenate([self.newest, rows])[-self._n_newest :]

    @property
    def rows(self) -> int:
        """Number of the rows that are taken into account."""
        return self._newer.firing.rows + self._older.firing.rows

    @property
    def fired(self) -> Integers:
        """On how many of them each latent fires, [F]."""
        return self._newer.firing.fired + self._older.firing.fired

    def mean(self) -> npt.NDArray[np.float64]:
        """Return the mean magnitude where a latent fires, [F]."""
        sums = self._newer.firing.sums + self._older.firing.sums
        means: npt.NDArray[np.float64] = sums / np.maximum(self.fired, 1)
        return means

    def strongest(self, most: int) -> Integers:
        """Return at most so many different rows: the strongest of each latent come first.

        The latents that fire most rarely come first: a sample of rows shows the others.
        """
        spans = [span.peaks for span in (self._newer, self._older)]
        for peaks in spans:
            peaks.merge()
        priorities = np.concatenate([peaks.priorities for peaks in spans], axis=1)
        rows = np.concatenate([peaks.rows for peaks in spans], axis=1)
        order = np.argsort(-priorities.astype(np.int64), axis=1, kind="stable")
        rows = np.take_along_axis(rows, order, axis=1)[np.argsort(self.fired, kind="stable")]
        by_rank = rows.T[rows.T != EMPTY]
        _, firsts = np.unique(by_rank, return_index=True)
        chosen: Integers = by_rank[np.sort(firsts)[:most]]
        return chosen


class _Span:
    """Counts and strongest rows of batches that follow each other."""

    def __init__(self, d_sae: int, count: int) -> None:
        self.firing = FiringCounts(d_sae)
        self.peaks = TopEntries(d_sae, count)

    def add(self, code: Code, rows: Integers) -> None:
        codes = block_codes(code, 0, len(rows), np.arange(len(rows)))
        self.firing.add(codes, len(rows))
        priorities = priority_of(codes.strengths)
        kept = np.flatnonzero(priorities > np.repeat(self.peaks.least, np.diff(codes.offsets)))
        self.peaks.add(codes.latents[kept], priorities[kept], rows[codes.rows[kept]])
