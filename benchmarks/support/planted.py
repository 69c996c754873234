"""Activations made from a known sparse dictionary, and a score of how well a decoder finds it.

Features are random unit vectors, more than there are dimensions. Each is active at random, with a
probability that falls as a power of its rank and an amount of 1 + U(0, 1); a little noise is added.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Planted:
    """A dictionary and the rows drawn from it.

    Args:
        seed: seed of the dictionary and the rows.
    """

    d_in = 64
    n_features = 256
    active = 8  # average number of active features in a row
    falloff = 0.5  # probabilities are proportional to rank ** -falloff
    noise = 0.02

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.n_features, self.d_in, generator=self._generator)
        self.features = F.normalize(drawn, dim=1)  # [G, D]
        ranks = torch.arange(1, self.n_features + 1).float()
        probabilities = ranks**-self.falloff
        self._probabilities = probabilities * (self.active / probabilities.sum())

    def draw(self, n_rows: int) -> Tensor:
        """Draw rows [n_rows, D] with an expected norm of about √D, like normalised activations."""
        chance = torch.rand(n_rows, self.n_features, generator=self._generator)
        amounts = 1 + torch.rand(n_rows, self.n_features, generator=self._generator)
        amounts *= chance < self._probabilities
        noise = torch.randn(n_rows, self.d_in, generator=self._generator)
        scale = math.sqrt(self.d_in / (self.active * 7 / 3))
        return scale * (amounts @ self.features + self.noise * noise)

    @classmethod
    def about(cls) -> str:
        """Return a description of the data for a table."""
        return (
            f"{cls.n_features} planted features in {cls.d_in} dimensions, on average {cls.active} "
            f"active in a row, with probabilities proportional to rank^-{cls.falloff:g}; one "
            "latent per feature"
        )


def matched_cosine(
    decoder: Tensor,  # [F, D]
    features: Tensor,  # [G, D], unit rows
) -> float:
    """Return the MCC: the mean |cosine| of features and decoder rows in their best matching."""
    from scipy.optimize import linear_sum_assignment

    cosines = (features @ F.normalize(decoder, dim=1).t()).abs()
    matched = linear_sum_assignment(cosines.numpy(), maximize=True)
    return float(cosines[matched].mean())
