"""Scores of a dictionary against the true one: directions, firing, absorption, shrinkage.

Latents are matched with true features one to one, so that the sum of |cosine| of decoder row and
true direction is largest (evaluation/matching.py). The other scores are of these pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_fast.evaluation.matching import match

RECOVERED = 0.9  # |cosine| above which a feature counts as recovered


@dataclass(frozen=True)
class Pairs:
    """The latent of each true feature.

    Attributes:
        latents: [G] int64, −1 where a feature has none because there are fewer latents.
        cosines: of decoder row and true direction, with their sign, [G]; 0 without a latent.
    """

    latents: Tensor
    cosines: Tensor

    @property
    def has_latent(self) -> Tensor:
        """The features that have a latent, [G] bool."""
        return self.latents >= 0

    @property
    def is_recovered(self) -> Tensor:
        """The features whose latent has |cosine| above 0.9, [G] bool."""
        return self.cosines.abs() > RECOVERED

    def mcc(self) -> float:
        """Return the mean |cosine| of the matched pairs."""
        return float(self.cosines[self.has_latent].abs().double().mean())

    def recovered_share(self) -> float:
        """Return the share of all true features that are recovered."""
        return float(self.is_recovered.double().mean())


def pair_features(
    directions: Tensor,  # [F, D], decoder rows
    features: Tensor,  # [G, D], true directions
) -> Pairs:
    """Match latents and true features one to one by |cosine|; neither needs unit rows."""
    latents, _ = match(directions, features, absolute=True).partners_of_b(len(features))
    rows = directions.detach().float().cpu()[latents.clamp_min(0)]
    cosines = F.cosine_similarity(rows, features.float(), dim=1, eps=1e-30).clamp_(-1, 1)
    return Pairs(latents, torch.where(latents >= 0, cosines, 0.0))


def uniqueness(
    directions: Tensor,  # [F, D]
    features: Tensor,  # [G, D]
) -> float:
    """Return the number of features that are nearest to a latent, divided by the number of latents.

    1: each latent has a nearest feature of its own. With more latents than features it is at most
    G / F.
    """
    rows = F.normalize(directions.detach().float().cpu(), dim=1)
    nearest = (rows @ F.normalize(features.float(), dim=1).t()).abs().argmax(1)
    return len(torch.bincount(nearest).nonzero()) / len(directions)


class FiringCounts:
    """Counts of the rows on which features are active and their latents fire.

    Args:
        parents: [G] int64, the parent of each feature, −1 where it has none.
    """

    def __init__(self, parents: Tensor) -> None:
        self.parents = parents
        zeros = torch.zeros(len(parents), dtype=torch.float64)
        self.both, self.firing, self.active = zeros.clone(), zeros.clone(), zeros.clone()
        self._absorbed = zeros.clone()
        self._values, self._truths = zeros.clone(), zeros.clone()

    def add(
        self,
        values: Tensor,  # [N, G], contribution of each feature's latent along the feature
        truth: Tensor,  # [N, G], true coefficients, 0 where a feature is not active
    ) -> None:
        """Add rows. A latent fires where its value is not 0, and one that is not there never."""
        fires, active = values != 0, truth != 0
        both = fires & active
        self.both += both.sum(0)
        self.firing += fires.sum(0)
        self.active += active.sum(0)
        silent_parent = ~fires[:, self.parents.clamp_min(0)]
        self._absorbed += (both & silent_parent).sum(0)
        self._values += torch.where(both, values, 0).sum(0, dtype=torch.float64)
        self._truths += torch.where(both, truth, 0).sum(0, dtype=torch.float64)

    def precision(self) -> Tensor:
        """Return, of the rows on which each latent fires, the share with its feature, [G]."""
        return self.both / self.firing.clamp_min(1)

    def recall(self) -> Tensor:
        """Return, of the rows with each feature, the share on which its latent fires, [G]."""
        return self.both / self.active.clamp_min(1)

    def f1(self) -> Tensor:
        """Return the harmonic mean of precision and recall of each feature, [G]."""
        return 2 * self.both / (self.firing + self.active).clamp_min(1)

    def mean(self, scores: Tensor) -> float | None:
        """Return the mean of scores [G] over the features that were active on any row."""
        seen = self.active > 0
        return float(scores[seen].mean()) if bool(seen.any()) else None

    def absorption_rate(self) -> float | None:
        """Return the share of (row, active child) pairs in which the child has taken the parent.

        The child's latent fires there and the latent of its parent, which is active as well, is
        silent. None where no child was active.
        """
        is_child = self.parents >= 0
        active = float(self.active[is_child].sum())
        return float(self._absorbed[is_child].sum()) / active if active else None

    def shrinkage(
        self,
        counted: Tensor,  # [G] bool
    ) -> float | None:
        """Return the mean over features of Σ value / Σ true coefficient where both are active.

        1: values are right on average; below 1 they are too small. None where no feature counts.
        """
        counted = counted & (self._truths > 0)
        if not bool(counted.any()):
            return None
        return float((self._values[counted] / self._truths[counted]).mean())
