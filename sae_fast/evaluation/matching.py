"""One-to-one matching of the rows of two dictionaries by their cosine, at any size.

Below `exact_below` rows the sum of matched cosines is the largest there is: the Hungarian
algorithm on all cosines. From there on a matrix of all pairs of rows is never made. Each row keeps
its nearest neighbours in the other dictionary, both ways, the best matching within these candidates
is found, and the few rows that it leaves over are matched among themselves. Where the dictionaries
are alike every best partner is among the candidates, and the result is the exact one too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_BELOW = 16_384
NEIGHBOURS = 32
_BLOCK_NUMBERS = 2**26  # cosines at a time, 256 MB
_INSTALL = "pip install 'sae_fast[evaluate]'"


@dataclass(frozen=True)
class Matching:
    """A one-to-one matching of the rows of A and B, as many pairs as the smaller one has rows.

    Attributes:
        rows: rows of A that have a partner, ascending, [n] int64.
        columns: their partners in B, [n] int64.
        cosines: of each pair, [n] float32.
        nearest_in_b: the largest cosine of each row of A with any row of B, [F_A] float32.
        nearest_in_a: the largest cosine of each row of B with any row of A, [F_B] float32.
        is_exact: whether no other matching has a larger sum for certain.
    """

    rows: Tensor
    columns: Tensor
    cosines: Tensor
    nearest_in_b: Tensor
    nearest_in_a: Tensor
    is_exact: bool

    def mean(self) -> float:
        """Return the mean cosine of the matched pairs, a number from −1 to 1."""
        return float(self.cosines.double().mean())

    def partners_of_a(self, count: int) -> tuple[Tensor, Tensor]:
        """Return partner and cosine of every row of A, [count] each; −1 and NaN where none."""
        return _spread(self.rows, self.columns, self.cosines, count)

    def partners_of_b(self, count: int) -> tuple[Tensor, Tensor]:
        """Return partner and cosine of every row of B, [count] each; −1 and NaN where none."""
        return _spread(self.columns, self.rows, self.cosines, count)


def match(
    a: Tensor,  # [F_A, D]
    b: Tensor,  # [F_B, D]
    *,
    absolute: bool = False,
    exact_below: int = EXACT_BELOW,
    neighbours: int = NEIGHBOURS,
) -> Matching:
    """Match the rows of two dictionaries one to one, so that the sum of their cosines is largest.

    Rows need not have norm 1; a row of zeros has cosine 0 with all others.

    Args:
        a: rows of the first dictionary.
        b: rows of the second one, of the same width.
        absolute: compare |cosine|: a row and its negative count as equal.
        exact_below: with fewer rows in both, the matching is exact.
        neighbours: candidates of each row, where it is not.

    Raises:
        ValueError: for different widths, no rows, numbers that are not finite, or without scipy.
    """
    a, b = _unit_rows(a, "a"), _unit_rows(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have equal widths, got {a.shape[1]} and {b.shape[1]}")
    if max(len(a), len(b)) < exact_below:
        cosines = _cosines(a, b, absolute)
        rows, columns = best_matching(cosines)
        matched = cosines[rows, columns]
        nearest = cosines.amax(1), cosines.amax(0)
        return Matching(rows, columns, matched, *nearest, is_exact=True)
    return _sparse_match(a, b, absolute, exact_below, neighbours)


def _sparse_match(
    a: Tensor, b: Tensor, absolute: bool, exact_below: int, neighbours: int
) -> Matching:
    values_a, near_a = _nearest(a, b, min(neighbours, len(b)), absolute)
    values_b, near_b = _nearest(b, a, min(neighbours, len(a)), absolute)
    own_a = torch.arange(len(a))[:, None].expand_as(near_a)
    own_b = torch.arange(len(b))[:, None].expand_as(near_b)
    rows = torch.cat([own_a.reshape(-1), near_b.reshape(-1)])
    columns = torch.cat([near_a.reshape(-1), own_b.reshape(-1)])
    values = torch.cat([values_a.reshape(-1), values_b.reshape(-1)])
    partner = _best_of_candidates(rows, columns, values, len(a), len(b))
    _complete_(partner, a, b, absolute, exact_below)
    matched = (partner >= 0).nonzero().squeeze(1)
    of_them = partner[matched]
    cosines = (a[matched] * b[of_them]).sum(1).clamp_(-1, 1)
    return Matching(
        matched,
        of_them,
        cosines.abs() if absolute else cosines,
        values_a[:, 0],
        values_b[:, 0],
        is_exact=False,
    )


def _unit_rows(rows: Tensor, name: str) -> Tensor:
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(f"{name} must be a matrix with rows, got shape {tuple(rows.shape)}")
    rows = rows.detach().float().cpu()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{name} must be finite")
    return F.normalize(rows, dim=1, eps=1e-30)


def _cosines(a: Tensor, b: Tensor, absolute: bool) -> Tensor:
    """Return the cosines of unit rows; products of rounded ones can be a little above 1."""
    cosines = (a @ b.t()).clamp_(-1, 1)
    return cosines.abs_() if absolute else cosines


def _nearest(a: Tensor, b: Tensor, count: int, absolute: bool) -> tuple[Tensor, Tensor]:
    """Return cosines and rows of b of the nearest neighbours of each row of a, [F_A, count]."""
    size = max(1, _BLOCK_NUMBERS // len(b))
    starts = range(0, len(a), size)
    blocks = [_cosines(a[i : i + size], b, absolute).topk(count, dim=1) for i in starts]
    values = torch.cat([block.values for block in blocks])
    return values, torch.cat([block.indices for block in blocks])


def best_matching(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows, ascending, and columns of the matching with the largest sum, of a matrix.

    Raises ValueError without scipy.
    """
    rows, columns = _scipy("optimize").linear_sum_assignment(scores.numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def _best_of_candidates(
    rows: Tensor,  # [n] int64
    columns: Tensor,  # [n] int64
    values: Tensor,  # [n], their cosines
    n_rows: int,
    n_columns: int,
) -> Tensor:
    """Return the partner of each row, [n_rows] int64, −1 where none of its candidates is left.

    Each row has, beside its candidates, a column of its own with cosine 0, which stands for no
    partner. So a matching of all rows exists in any case.
    """
    own = torch.arange(n_rows)
    rows = torch.cat([rows, own])
    columns = torch.cat([columns, n_columns + own])
    costs = 2 - torch.cat([values.double(), torch.zeros(n_rows, dtype=torch.float64)])
    width = n_columns + n_rows
    _, first = np.unique((rows * width + columns).numpy(), return_index=True)  # a pair once
    graph = _scipy("sparse").csr_matrix(
        (costs.numpy()[first], (rows.numpy()[first], columns.numpy()[first])),
        shape=(n_rows, width),
    )
    matched, partners = _scipy("sparse.csgraph").min_weight_full_bipartite_matching(graph)
    partner = torch.full((n_rows,), -1, dtype=torch.int64)
    partner[torch.from_numpy(matched).long()] = torch.from_numpy(partners).long()
    return torch.where(partner < n_columns, partner, -1)


def _complete_(partner: Tensor, a: Tensor, b: Tensor, absolute: bool, exact_below: int) -> None:
    """Match the rows without a partner with the rows of b that are left, in place.

    They are matched all at once where they are fewer than `exact_below`, or else in blocks, each
    of which takes the best that the blocks before it have left.
    """
    is_free = torch.ones(len(b), dtype=torch.bool)
    is_free[partner[partner >= 0]] = False
    left, free = (partner < 0).nonzero().squeeze(1), is_free.nonzero().squeeze(1)
    while len(left) and len(free):
        is_small = max(len(left), len(free)) < exact_below
        count = len(left) if is_small else max(1, _BLOCK_NUMBERS // len(free))
        block, left = left[:count], left[count:]
        rows, columns = best_matching(_cosines(a[block], b[free], absolute))
        partner[block[rows]] = free[columns]
        is_free[free[columns]] = False
        free = is_free.nonzero().squeeze(1)


def _spread(rows: Tensor, partners: Tensor, cosines: Tensor, count: int) -> tuple[Tensor, Tensor]:
    partner = torch.full((count,), -1, dtype=torch.int64)
    partner[rows] = partners
    values = torch.full((count,), torch.nan)
    values[rows] = cosines
    return partner, values


def _scipy(name: str) -> Any:
    """Return a module of scipy; raise ValueError, which names the remedy, where it is missing."""
    import importlib

    try:
        return importlib.import_module(f"scipy.{name}")
    except ImportError as error:
        raise ValueError(f"matching latents needs scipy: install it ({_INSTALL})") from error
