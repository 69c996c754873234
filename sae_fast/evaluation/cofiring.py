"""Latents that fire on the same rows, counted on a sample of the rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sae_fast.evaluation.top_entries import place_in_run

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

MOST_PAIRS = 1 << 24  # pairs of entries that are counted, for the number of rows in the sample
_BLOCK_PAIRS = 1 << 17  # that are counted together, in a cache
_LARGEST = 2**31 - 1
NONE = -1  # in place of a latent where there are fewer neighbours


def sample_rate(
    rows: int,
    mean_l0: float,  # entries of a row
    wanted: int,  # rows
) -> float:
    """Return the share of the rows to sample: at most `wanted` and about MOST_PAIRS pairs."""
    affordable = min(wanted, MOST_PAIRS / max(mean_l0, 1.0) ** 2)
    return min(1.0, affordable / max(rows, 1))


def cofiring_neighbours(
    rows: Integers,  # [nnz], of the sample, from 0
    latents: Integers,  # [nnz]
    n_rows: int,
    d_sae: int,
    count: int,
) -> tuple[Floats, Integers, Integers]:
    """Return for each latent the latents whose firing correlates most with its own.

    phi_ij = (S C_ij − n_i n_j) / sqrt(n_i (S − n_i) n_j (S − n_j)) over S rows, of which n_i make
    latent i fire and C_ij both: the correlation of "fires" as 0 and 1. Only latents that fire
    together more often than by chance, phi > 0, count. Equal values are ordered by ascending
    latent.

    Returns phi [F, count] float32, the latents [F, count] int64, NONE where there are fewer, and
    C_ij [F, count] int64.
    """
    count = min(count, max(d_sae - 1, 0))
    phi = np.zeros((d_sae, count), np.float32)
    found = np.full((d_sae, count), NONE, np.int64)
    together = np.zeros((d_sae, count), np.int64)
    if not rows.size or not count:
        return phi, found, together
    by_row = np.argsort(rows, kind="stable")
    latents_by_row = latents[by_row]
    row_offsets = np.searchsorted(rows[by_row], np.arange(n_rows + 1))
    by_latent = np.argsort(latents, kind="stable")
    rows_by_latent = rows[by_latent]
    fires = np.bincount(latents, minlength=d_sae)
    latent_offsets = np.concatenate([[0], np.cumsum(fires)])
    spread = np.sqrt(fires.astype(np.float64) * (n_rows - fires))
    inverse = np.divide(1, spread, out=np.zeros(d_sae), where=spread > 0)  # 0: on no row, or on all
    lengths = np.diff(row_offsets)[rows_by_latent]
    n_pairs = np.concatenate([[0], np.cumsum(lengths)])[latent_offsets]  # of the latents below
    first = 0
    while first < d_sae:
        stop = int(np.searchsorted(n_pairs, n_pairs[first] + _BLOCK_PAIRS, side="right")) - 1
        stop = max(first + 1, stop)
        part = slice(latent_offsets[first], latent_offsets[stop])
        numbers = np.repeat(np.arange(first, stop), fires[first:stop])
        kind = np.int32 if (stop - first) * d_sae <= _LARGEST else np.int64
        partners = expanded_ranges(row_offsets[rows_by_latent[part]], lengths[part])
        pairs = np.repeat(((numbers - first) * d_sae).astype(kind), lengths[part])
        pairs += latents_by_row[partners].astype(kind)
        cells, counts = _counted(pairs)
        own, others = np.divmod(cells, d_sae)
        own += first
        # phi of each pair; of a latent with itself it is no number that is asked for.
        excess = n_rows * counts - fires[own] * fires[others]
        scores = (excess * inverse[own] * inverse[others]).astype(np.float32)
        scores[own == others] = 0
        own, others, scores = _largest_of_each(own - first, others, scores, d_sae, count)
        latent, places = first + own, place_in_run(own)
        phi[latent, places] = scores
        found[latent, places] = others
        together[latent, places] = counts[np.searchsorted(cells, own * d_sae + others)]
        first = stop
    return phi, found, together


def _counted(
    numbers: npt.NDArray[np.int32] | Integers,  # [n]
) -> tuple[Integers, Integers]:
    """Return the different numbers, ascending, and how many there are of each."""
    numbers.sort()
    is_start = np.ones(len(numbers), bool)
    is_start[1:] = numbers[1:] != numbers[:-1]
    starts = np.flatnonzero(is_start)
    return numbers[starts].astype(np.int64), np.diff(np.append(starts, len(numbers)))


def _largest_of_each(
    own: Integers,  # [n] ascending
    others: Integers,  # [n], below d_sae
    scores: Floats,  # [n]
    d_sae: int,
    count: int,
) -> tuple[Integers, Integers, Floats]:
    """Return own, others and scores of the largest scores above 0 of each `own`, best first.

    Equal scores are ordered by ascending `others`.
    """
    kept = np.flatnonzero(scores > 0)
    bits = scores[kept].view(np.int32).astype(np.int64)  # ordered as the scores are
    column_bits = (d_sae - 1).bit_length()
    keys = (own[kept] << (31 + column_bits)) | ((_LARGEST - bits) << column_bits) | others[kept]
    keys.sort()  # far faster than finding the order, and a key holds all that is asked for
    owners = keys >> (31 + column_bits)
    is_in = place_in_run(owners) < count
    keys = keys[is_in]
    bits = _LARGEST - ((keys >> column_bits) & _LARGEST)
    return owners[is_in], keys & ((1 << column_bits) - 1), bits.astype(np.int32).view(np.float32)


def expanded_ranges(begins: Integers, lengths: Integers) -> Integers:
    """Return the numbers begins[i] … begins[i] + lengths[i] − 1 for one i after another."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    numbers: Integers = np.repeat(begins - (ends - lengths), lengths)
    numbers += np.arange(total)
    return numbers
