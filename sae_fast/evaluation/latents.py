"""The page of every latent, out of one pass over rows: the numbers and contexts, without a viewer.

The rows are encoded once and their codes kept on disk (code_store.py). Three readings of the codes
follow: of the largest activations; of histograms, samples and latents that fire together, which
need the largest activation of each latent; of the values round the chosen rows. Memory is
O(d_sae · contexts), whatever the number of rows, and 12 bytes a row for its token and document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sae_fast.activations.background import Workers
from sae_fast.evaluation.code_store import BlockCodes, CodeStore, Floats
from sae_fast.evaluation.cofiring import cofiring_neighbours, sample_rate
from sae_fast.evaluation.contexts import TOP, Contexts, apart, gather_contexts
from sae_fast.evaluation.neighbours import nearest_decoder_rows
from sae_fast.evaluation.text_rows import Integers, TextRows
from sae_fast.evaluation.top_entries import EMPTY, MOST_ROWS, TopEntries, hashed, priority_of

Report = Callable[[str, int], object]  # takes the name of a reading and rows done since the last

ENCODING, COUNTING, GATHERING = "encode", "count", "gather"
# A context hides at most the peaks of the two cells beside its own, see `apart`.
_PEAKS_PER_CONTEXT = 3
_PRIORITY_BITS = 33  # of 64 that are dropped to leave a whole number of 31 bits


@dataclass(frozen=True)
class PageSettings:
    """Sizes of the pages of latents.

    Attributes:
        contexts: the largest contexts of each latent.
        context_tokens: tokens of a context.
        intervals: of activations, of equal width from 0 to the latent's largest.
        samples: rows of each interval, drawn at random.
        bins: of the histogram of activations, of equal width from 0 to the latent's largest.
        neighbours: latents that are listed as neighbours, by decoder rows and by firing.
        cofiring_rows: rows on which latents that fire together are counted, at most.
        seed: of the samples.
    """

    contexts: int = 20
    context_tokens: int = 32
    intervals: int = 5
    samples: int = 5
    bins: int = 40
    neighbours: int = 10
    cofiring_rows: int = 1 << 16
    seed: int = 0


@dataclass(frozen=True)
class LatentPages:
    """The numbers of all pages; latents are rows.

    Attributes:
        rows: rows that were encoded.
        fired: [F] int64, rows on which each latent fires.
        largest: [F] float32, the largest magnitude of each latent, 0 where it never fires.
        mean: [F] float64, the mean magnitude over the rows on which it fires.
        histogram: [F, bins] int64, rows by magnitude, from above 0 to `largest`.
        intervals: [F, intervals] int64, rows by the interval that samples are drawn from.
        contexts: the largest contexts and the samples of all latents.
        decoder_cosines, decoder_latents: [F, m], see `nearest_decoder_rows`.
        cofiring_phi, cofiring_latents, cofiring_counts: [F, m], see `cofiring_neighbours`.
        cofiring_rows: rows on which latents that fire together were counted.
        cofiring_fired: [F], on how many of these each latent fires.
    """

    rows: int
    fired: Integers
    largest: Floats
    mean: npt.NDArray[np.float64]
    histogram: Integers
    intervals: Integers
    contexts: Contexts
    decoder_cosines: Floats
    decoder_latents: Integers
    cofiring_phi: Floats
    cofiring_latents: Integers
    cofiring_counts: Integers
    cofiring_rows: int
    cofiring_fired: Integers

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.fired)


class FiringCounts:
    """On how many rows each latent fires, and how strongly.

    Attributes:
        rows: rows that were counted.
        fired: [F] int64, rows on which each latent fires.
        sums: [F], of its magnitudes.
    """

    def __init__(self, d_sae: int) -> None:
        self.rows = 0
        self.fired = np.zeros(d_sae, np.int64)
        self.sums = np.zeros(d_sae, np.float64)

    def add(self, codes: BlockCodes, rows: int) -> None:
        """Count the codes of a block, of which so many rows are served."""
        self.rows += rows
        self.fired += np.diff(codes.offsets)
        # One by one: no sum depends on the blocks.
        np.add.at(self.sums, codes.latents, codes.strengths.astype(np.float64))

    def mean(self) -> npt.NDArray[np.float64]:
        """Return the mean magnitude where a latent fires, [F]."""
        return self.sums / np.maximum(self.fired, 1)


class _Largest:
    """First reading: the largest peaks of all latents."""

    def __init__(self, d_sae: int, settings: PageSettings, text: TextRows) -> None:
        self.peaks = TopEntries(d_sae, _PEAKS_PER_CONTEXT * settings.contexts)
        self._text = text

    def add(self, codes: BlockCodes) -> None:
        """Take the codes of a block."""
        counts, strengths, latents = np.diff(codes.offsets), codes.strengths, codes.latents
        priorities = priority_of(strengths)
        # A peak is the largest of its cell: where it is too small, all of its cell are.
        kept = np.flatnonzero(priorities > np.repeat(self.peaks.least, counts))
        if not kept.size:
            return
        cells = self._text.cells(codes.first + np.arange(codes.n_rows))[codes.rows[kept]]
        entries = kept[first_of_largest(latents[kept], cells, strengths[kept])]
        rows = codes.first + codes.rows[entries].astype(np.int64)
        self.peaks.add(latents[entries], priorities[entries], rows)

    def largest(self) -> Floats:
        """Return the largest magnitude of each latent, [F], 0 where it never fires."""
        self.peaks.merge()
        highest = np.maximum(self.peaks.priorities[:, 0], 0)
        largest: Floats = highest.view(np.float32)
        return largest


class _Distribution:
    """Second reading: histograms, samples of intervals, and a sample of whole rows."""

    def __init__(self, largest: Floats, share: float, settings: PageSettings) -> None:
        self._largest = largest.astype(np.float64)
        self._settings = settings
        self._least_hash = np.uint64(min(int(share * 2**64), 2**64 - 1))
        d_sae = len(largest)
        self.histogram = np.zeros(d_sae * settings.bins, np.int64)
        self.intervals = np.zeros(d_sae * settings.intervals, np.int64)
        self.samples = TopEntries(d_sae * settings.intervals, settings.samples)
        self.n_rows = 0
        self._rows: list[Integers] = []
        self._latents: list[Integers] = []

    def add(self, codes: BlockCodes, places: Integers) -> None:
        """Take the codes of a block, and the places in it of the rows that are served."""
        settings, latents = self._settings, codes.latents
        self._sample_rows(codes, latents, places)
        share = codes.strengths / np.repeat(self._largest, np.diff(codes.offsets))
        np.add.at(self.histogram, _cut(share, latents, settings.bins), 1)
        slots = _cut(share, latents, settings.intervals)
        np.add.at(self.intervals, slots, 1)
        if not settings.samples:
            return
        rows = codes.first + codes.rows.astype(np.int64)
        bits = hashed(rows * codes.d_sae + latents, settings.seed) >> np.uint64(_PRIORITY_BITS)
        kept = np.flatnonzero(bits.astype(np.int32) > self.samples.least[slots])
        kept = kept[np.argsort(slots[kept], kind="stable")]
        self.samples.add(slots[kept], bits[kept].astype(np.int32), rows[kept])

    def sample(self) -> tuple[Integers, Integers]:
        """Return row, from 0, and latent of the entries of the sampled rows."""
        none = [np.zeros(0, np.int64)]
        return np.concatenate(none + self._rows), np.concatenate(none + self._latents)

    def _sample_rows(self, codes: BlockCodes, latents: Integers, places: Integers) -> None:
        chosen = hashed(codes.first + places, self._settings.seed + 1) <= self._least_hash
        numbers = np.full(codes.n_rows, EMPTY, np.int64)
        numbers[places[chosen]] = self.n_rows + np.arange(int(chosen.sum()))
        self.n_rows += int(chosen.sum())
        of_entry = numbers[codes.rows]
        kept = np.flatnonzero(of_entry != EMPTY)
        self._rows.append(of_entry[kept])
        self._latents.append(latents[kept])


def _cut(
    share: npt.NDArray[np.float64],  # [n], above 0, at most 1
    latents: Integers,  # [n]
    parts: int,
) -> Integers:
    """Return the number, over all latents, of the part of equal width that each share is in."""
    part = np.minimum((share * parts).astype(np.int32), parts - 1)
    numbers: Integers = latents * parts + part
    return numbers


def make_pages(
    store: CodeStore,
    W_dec: Tensor,  # [F, D]
    settings: PageSettings,
    report: Report = lambda reading, rows: None,
    counted: npt.NDArray[np.bool_] | None = None,  # [rows]
) -> LatentPages:
    """Return the pages of all latents, from the codes of the rows of `store`.

    Where some rows are `counted` the numbers are of these, and the others only give contexts.

    A latent has one peak in each cell of `context_tokens` tokens: its largest magnitude there, of
    equal ones the first. Its contexts are round the largest peaks, of equal ones the first, and
    a peak that is less than `context_tokens` from a larger one is left out, so that contexts do not
    overlap. The samples are entries of each interval drawn by a hash of row and latent.
    """
    text, d_sae = store.text, len(W_dec)
    if text.rows > MOST_ROWS:
        raise ValueError(f"pages are made of at most {MOST_ROWS:,} rows, got {text.rows:,}")
    first, firing = _Largest(d_sae, settings, text), FiringCounts(d_sae)
    for item, codes in zip(store.blocks, _reported(store, report, ENCODING), strict=True):
        first.add(codes)
        own, places = _counted(codes, text.places(item), counted)
        firing.add(own, len(places))
    largest = first.largest()
    mean_l0 = float(firing.fired.sum()) / max(firing.rows, 1)
    share = sample_rate(firing.rows, mean_l0, settings.cofiring_rows)
    second = _Distribution(largest, share, settings)
    for item, codes in zip(store.blocks, _reported(store, report, COUNTING), strict=True):
        second.add(*_counted(codes, text.places(item), counted))
    second.samples.merge()
    sampled_rows, sampled_latents = second.sample()
    sample = sampled_rows, sampled_latents, second.n_rows, d_sae, settings.neighbours
    with Workers(1, name="pairs", does="counts pairs") as beside:
        cofiring = beside.submit(lambda: cofiring_neighbours(*sample))
        cosines, nearest = nearest_decoder_rows(W_dec.detach(), settings.neighbours)
        chosen = _chosen_rows(first.peaks, second.samples, settings, text)
        contexts = gather_contexts(
            *chosen, text, settings.context_tokens, _reported(store, report, GATHERING)
        )
        phi, partners, together = beside.wait(cofiring)
    return LatentPages(
        firing.rows,
        firing.fired,
        largest,
        firing.mean(),
        second.histogram.reshape(d_sae, settings.bins),
        second.intervals.reshape(d_sae, settings.intervals),
        contexts,
        cosines.numpy(),
        nearest.numpy(),
        phi,
        partners,
        together,
        second.n_rows,
        np.bincount(sampled_latents, minlength=d_sae),
    )


def first_of_largest(
    latents: Integers,  # [n] ascending
    cells: Integers,  # [n] ascending within a latent
    strengths: Floats,  # [n]
) -> Integers:
    """Return the first entry with the largest strength in each cell of each latent."""
    is_start = np.ones(len(latents), bool)
    is_start[1:] = (latents[1:] != latents[:-1]) | (cells[1:] != cells[:-1])
    starts = np.flatnonzero(is_start)
    largest = np.maximum.reduceat(strengths, starts)
    group = np.cumsum(is_start) - 1
    entries = np.flatnonzero(strengths == largest[group])
    _, firsts = np.unique(group[entries], return_index=True)
    chosen: Integers = entries[firsts]
    return chosen


def _chosen_rows(
    peaks: TopEntries, samples: TopEntries, settings: PageSettings, text: TextRows
) -> tuple[Integers, Integers, Integers]:
    """Return latent, interval and row of all contexts, by latent.

    The largest come first, then samples from the highest interval down, in the order of the text.
    """
    d_sae = len(peaks.rows)
    top = apart(peaks.rows, settings.contexts, settings.context_tokens, text)
    drawn = samples.rows.reshape(d_sae, settings.intervals, settings.samples)
    drawn = np.sort(np.where(drawn == EMPTY, np.iinfo(np.int64).max, drawn), axis=2)[:, ::-1]
    last = np.where(drawn == np.iinfo(np.int64).max, EMPTY, drawn).reshape(d_sae, -1)
    order = np.arange(settings.intervals)[::-1].repeat(settings.samples)
    rows = np.concatenate([top, last], axis=1)
    intervals = np.concatenate([np.full(settings.contexts, TOP), order])
    latents, places = np.nonzero(rows != EMPTY)
    return latents, intervals[places], rows[latents, places]


def _counted(
    codes: BlockCodes,
    places: Integers,  # [n], of the rows of the block that are served
    counted: npt.NDArray[np.bool_] | None,  # [rows]
) -> tuple[BlockCodes, Integers]:
    """Return the codes of a block, and places in it, of the rows that are counted."""
    if counted is None:
        return codes, places
    own = counted[codes.first : codes.first + codes.n_rows]
    return codes.of_rows(own), places[own[places]]


def _reported(store: CodeStore, report: Report, reading: str) -> Iterator[BlockCodes]:
    with closing(iter(store)) as blocks:  # also where `report` raises to stop the pass
        for codes in blocks:
            yield codes
            report(reading, codes.n_rows)
