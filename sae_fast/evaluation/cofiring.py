"""Latents that fire on the same rows, counted on a sample of the rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sae_fast.evaluation.neighbours import top_columns

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

MOST_PAIRS = 1 << 25  # pairs of entries that are counted, for the number of rows in the sample
_BLOCK_NUMBERS = 1 << 22  # counts that are held together
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
    spread = torch.from_numpy(np.sqrt(fires.astype(np.float64) * (n_rows - fires)))
    inverse = torch.where(spread > 0, 1 / spread, 0).float()  # 0: it fires on no row, or on all
    of_chance = torch.from_numpy(fires).float() * inverse
    step = max(1, _BLOCK_NUMBERS // d_sae)
    for first in range(0, d_sae, step):
        stop = min(first + step, d_sae)
        own_rows = rows_by_latent[latent_offsets[first] : latent_offsets[stop]]
        if not own_rows.size:
            continue
        own = np.repeat(np.arange(stop - first), fires[first:stop])
        begins = row_offsets[own_rows]
        lengths = row_offsets[own_rows + 1] - begins
        others = latents_by_row[expanded_ranges(begins, lengths)]
        keys = np.repeat(own * d_sae, lengths) + others
        counts = np.bincount(keys, minlength=(stop - first) * d_sae).reshape(-1, d_sae)
        counts[np.arange(stop - first), np.arange(first, stop)] = 0  # not itself
        # phi = C_ij · S / (s_i s_j) − (n_i / s_i) (n_j / s_j), in place: [F, F] numbers in all.
        scores = torch.from_numpy(counts).float()
        scores.mul_(n_rows * inverse[first:stop, None]).mul_(inverse)
        scores.addr_(of_chance[first:stop], of_chance, alpha=-1)
        values, columns = top_columns(scores, count)
        is_none = values <= 0
        phi[first:stop] = values.masked_fill(is_none, 0).numpy()
        found[first:stop] = columns.masked_fill(is_none, NONE).numpy()
        counted = np.take_along_axis(counts, columns.numpy(), 1)
        together[first:stop] = np.where(is_none.numpy(), 0, counted)
    return phi, found, together


def expanded_ranges(begins: Integers, lengths: Integers) -> Integers:
    """Return the numbers begins[i] … begins[i] + lengths[i] − 1 for one i after another."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    numbers: Integers = np.repeat(begins - (ends - lengths), lengths)
    numbers += np.arange(total)
    return numbers
