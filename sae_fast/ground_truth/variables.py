"""Scores of latents as detectors of known variables that are true or false on each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

N_THRESHOLDS = 10
F1_TEXT = "over ten thresholds, 0, 0.1 … 0.9 of the largest value of the latent"
F1_SOURCE = "coverage, arXiv:2408.00113"


@dataclass(frozen=True)
class Contingency:
    """Counts of rows by latent and variable.

    Attributes:
        both: rows on which the latent fires and the variable is true, [F, V] float64.
        fires: rows on which the latent fires, [F] float64.
        true: rows on which the variable is true, [V] float64.
    """

    both: Tensor
    fires: Tensor
    true: Tensor

    @property
    def alive(self) -> Tensor:
        """The latents that fire on any row, [F] bool."""
        return self.fires > 0

    def f1(self) -> Tensor:
        """Return the F1 of each latent's firing for each variable, [F, V]."""
        return 2 * self.both / (self.fires[:, None] + self.true).clamp_min(1)

    def purity(self) -> float | None:
        """Return the share of the firings that fall on the commonest variable of their latent.

        Of variables that exclude each other, such as states. It is the mean over latents of the
        share of the commonest variable among the rows on which they fire, weighted by the number of
        these rows. None where nothing fires.
        """
        total = float(self.fires.sum())
        return float(self.both.amax(1).sum()) / total if total else None

    def latent_purity(self) -> float | None:
        """Return the mean of this share over the latents that fire, each with weight 1."""
        alive = self.alive
        if not bool(alive.any()):
            return None
        return float((self.both.amax(1)[alive] / self.fires[alive]).mean())


def count(
    values: Tensor,  # [N, F], values of latents
    truth: Tensor,  # [N, V] bool
) -> Contingency:
    """Count the rows of latents, which fire where their value is not 0, and variables."""
    fires = (values != 0).float()
    both = fires.t() @ truth.float()  # exact below 2**24 rows
    return Contingency(both.double(), fires.sum(0).double(), truth.sum(0).double())


def best_f1(
    values: Tensor,  # [N, F], values of latents
    truth: Tensor,  # [N, V] bool
) -> tuple[Tensor, Tensor]:
    """Return, of each variable, the largest F1 of a latent as its detector, and that latent.

    A latent detects where its value is above a threshold, 0, 0.1 … 0.9 of its largest value; the
    best of the ten counts (coverage, arXiv:2408.00113). The results are [V] float64 and int64; F1
    is 0, of latent 0, where nothing fires.
    """
    largest = values.amax(0)
    best = torch.zeros(truth.shape[1], dtype=torch.float64)
    latents = torch.zeros(truth.shape[1], dtype=torch.int64)
    for tenth in range(N_THRESHOLDS):
        detected = (values > tenth / N_THRESHOLDS * largest).float()
        found = count(detected, truth).f1().max(0)
        is_better = found.values > best
        best = torch.where(is_better, found.values, best)
        latents = torch.where(is_better, found.indices, latents)
    return best, latents


def auc(
    values: Tensor,  # [N, F], values of latents
    truth: Tensor,  # [N] bool
) -> Tensor:
    """Return the area under the ROC curve of each latent's value, [F] float64.

    It is the probability that a row on which the variable is true has a larger value than one on
    which it is false, where equal values count half. NaN where all rows are alike.
    """
    n_true = int(truth.sum())
    n_false = len(truth) - n_true
    ordered, order = values.t().contiguous().sort(dim=1)
    is_true = truth[order].double()
    ranks = torch.stack([_mean_ranks(row) for row in ordered])
    sums = (ranks * is_true).sum(1)
    return (sums - n_true * (n_true + 1) / 2) / (n_true * n_false or float("nan"))


def _mean_ranks(
    ordered: Tensor,  # [N], ascending
) -> Tensor:
    """Return the rank of each value, from 1; equal values have the mean of theirs, [N] float64."""
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    group = starts.cumsum(0) - 1
    sizes = torch.bincount(group).double()
    last = sizes.cumsum(0)
    return (last - (sizes - 1) / 2)[group]
