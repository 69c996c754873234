"""The text round rows on which latents fire, and the values of the latent on each of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_fast.evaluation.code_store import BlockCodes, Floats
from sae_fast.evaluation.cofiring import expanded_ranges
from sae_fast.evaluation.text_rows import Integers, TextRows
from sae_fast.evaluation.top_entries import EMPTY

TOP = -1  # in place of an interval: the context is one of the largest
BEFORE_SHARE = 0.75  # of the tokens of a context that are not the peak, in front of it


@dataclass(frozen=True)
class Contexts:
    """Pieces of text round rows, by ascending latent.

    Attributes:
        latents: [P].
        intervals: [P]: TOP, or the interval of activations that the row is a sample of, from 0.
        rows: [P], the numbers of the rows.
        begins, ends: [P], the first row of each piece and the row after its last one.
        offsets: [P + 1]: piece p has the entries from offsets[p] up to offsets[p + 1].
        places: [nnz], ascending within a piece: places of tokens in it on which the latent fires.
        values: [nnz].
    """

    latents: Integers
    intervals: Integers
    rows: Integers
    begins: Integers
    ends: Integers
    offsets: Integers
    places: Integers
    values: Floats

    def of(self, latent: int) -> range:
        """Return the numbers of the pieces of one latent."""
        first, stop = np.searchsorted(self.latents, (latent, latent + 1))
        return range(int(first), int(stop))

    def entries(self, piece: int) -> dict[int, float]:
        """Return the values in a piece by the place of the token."""
        part = slice(self.offsets[piece], self.offsets[piece + 1])
        return dict(zip(self.places[part].tolist(), self.values[part].tolist(), strict=True))


def apart(
    rows: Integers,  # [F, m], of one latent in a row, best first, EMPTY at the end
    count: int,
    distance: int,
    text: TextRows,
) -> Integers:
    """Return of each latent the first `count` rows that are apart from each other, [F, count].

    From the first on, a row less than `distance` from one that was chosen before, in one sequence
    with it, is left out.
    """
    chosen = np.full((len(rows), count), EMPTY, np.int64)
    n_chosen = np.zeros(len(rows), np.int64)
    first, _ = text.sequence_bounds(np.maximum(rows, 0))
    begins = np.full((len(rows), count), EMPTY, np.int64)
    for place in range(rows.shape[1]):
        row, begin = rows[:, place], first[:, place]
        is_near = (np.abs(chosen - row[:, None]) < distance) & (begins == begin[:, None])
        is_taken = (row != EMPTY) & (n_chosen < count) & ~(is_near & (chosen != EMPTY)).any(1)
        latents = np.flatnonzero(is_taken)
        chosen[latents, n_chosen[latents]] = row[latents]
        begins[latents, n_chosen[latents]] = begin[latents]
        n_chosen[latents] += 1
    return chosen


def tokens_before(length: int) -> int:
    """Return how many tokens of a context are in front of its peak."""
    return int((length - 1) * BEFORE_SHARE)


def gather_contexts(
    latents: Integers,  # [P] ascending
    intervals: Integers,  # [P]
    rows: Integers,  # [P]
    text: TextRows,
    length: int,
    blocks: Iterable[BlockCodes],
) -> Contexts:
    """Return the pieces of at most `length` tokens round rows, which never leave their sequence.

    Three quarters of the other tokens are in front of the row, as the models that read from left to
    right know only these; at an end of the sequence a piece is shorter.
    """
    before = tokens_before(length)
    first, stop = text.sequence_bounds(rows)
    begins = np.maximum(first, rows - before)
    ends = np.minimum(stop, rows - before + length)
    by_begin = np.argsort(begins, kind="stable")
    sorted_begins = begins[by_begin]
    pieces: list[Integers] = []
    places: list[Integers] = []
    values: list[npt.NDArray[np.float32]] = []
    for codes in blocks:
        last = codes.first + codes.n_rows
        low = np.searchsorted(sorted_begins, codes.first - length + 1)
        high = np.searchsorted(sorted_begins, last)
        near = by_begin[low:high]
        near = near[ends[near] > codes.first]
        keys = codes.latents * codes.n_rows + codes.rows  # ascending
        base = latents[near] * codes.n_rows
        start = np.searchsorted(keys, base + np.maximum(begins[near] - codes.first, 0))
        end = np.searchsorted(keys, base + np.minimum(ends[near], last) - codes.first)
        lengths = end - start
        entries = expanded_ranges(start, lengths)
        owner = np.repeat(near, lengths)
        pieces.append(owner)
        places.append(codes.first + codes.rows[entries].astype(np.int64) - begins[owner])
        values.append(codes.values[entries])
    owners = np.concatenate([np.zeros(0, np.int64), *pieces])
    order = np.argsort(owners, kind="stable")  # blocks come in order, so places stay ascending
    return Contexts(
        latents,
        intervals,
        rows,
        begins,
        ends,
        np.searchsorted(owners[order], np.arange(len(rows) + 1)),
        np.concatenate([np.zeros(0, np.int64), *places])[order],
        np.concatenate([np.zeros(0, np.float32), *values])[order],
    )
