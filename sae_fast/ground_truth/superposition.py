"""Superposition: rows made of a known dictionary with more features than dimensions.

A row is x = Σ_j c_j g_j: unit directions g_j, drawn at random, and coefficients, most of them 0.
Probabilities fall as rank^-0.5. Magnitudes are log-normal with mean 1. Each parent has children, of
which at most one is active and none without the parent; other features are correlated in groups by
a Gaussian copula.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.ground_truth import SuperpositionConfig
from sae_fast.ground_truth.dictionary_scores import FiringCounts, pair_features, uniqueness
from sae_fast.ground_truth.pictures import draw_dots, finish, new_figure
from sae_fast.ground_truth.task import Progress, Score, Scored, Task

_FALLOFF = 0.5
_LARGEST_PROBABILITY = 0.5
_CHUNK = 16_384  # rows
_SYNTH = "SynthSAEBench, arXiv:2602.14687"
KINDS = ("parents", "children", "in groups")


class Dictionary:
    """A known dictionary and the rows drawn from it.

    Args:
        config: sizes and probabilities.

    Attributes:
        features: unit directions, [G, D].
        parents: the parent of each feature, −1 where it has none, [G] int64.
        probabilities: of being active, [G].
    """

    def __init__(self, config: SuperpositionConfig) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(config.data_seed)
        drawn = torch.randn(config.features, config.d_in, generator=self.generator)
        self.features = F.normalize(drawn, dim=1)
        n_parents = config.parents
        n_children = n_parents * config.children
        self.parents = torch.full((config.features,), -1)
        self.parents[n_parents : n_parents + n_children] = torch.arange(
            n_parents
        ).repeat_interleave(config.children)
        self._is_child = self.parents >= 0
        self._others = torch.arange(n_parents + n_children, config.features)
        self.probabilities = self._probabilities()

    def _probabilities(self) -> Tensor:
        config = self.config
        own = (~self._is_child).nonzero().squeeze(1)
        ranks = 1 + torch.randperm(len(own), generator=self.generator)
        shares = ranks.double() ** -_FALLOFF
        weights = torch.ones_like(shares)
        weights[: config.parents] += config.child_share  # a child comes with its parent
        factor = config.active / float((shares * weights).sum())
        probabilities = torch.zeros(config.features, dtype=torch.float64)
        probabilities[own] = (factor * shares).clamp_max(_LARGEST_PROBABILITY)
        parents = self.parents[self._is_child]
        each = config.child_share / config.children
        probabilities[self._is_child] = probabilities[parents] * each
        return probabilities

    @property
    def kinds(self) -> Tensor:
        """The place in `KINDS` of each feature, [G] int64."""
        kinds = torch.full((self.config.features,), 2)
        kinds[: self.config.parents] = 0
        kinds[self._is_child] = 1
        return kinds

    def draw(self, n_rows: int) -> Tensor:
        """Draw coefficients of rows, [n_rows, G]; 0 where a feature is not active."""
        config, generator = self.config, self.generator
        active = torch.zeros(n_rows, config.features, dtype=torch.bool)
        first = self.probabilities[: config.parents].float()
        active[:, : config.parents] = torch.rand(n_rows, len(first), generator=generator) < first
        if config.parents:
            shape = n_rows, config.parents
            has_child = torch.rand(shape, generator=generator) < config.child_share
            chosen = torch.randint(config.children, shape, generator=generator)
            chosen = F.one_hot(chosen, config.children).bool()
            with_child = active[:, : config.parents] & has_child
            active[:, self._is_child] = (chosen & with_child[..., None]).flatten(1)
        if len(self._others):
            active[:, self._others] = self._draw_groups(n_rows)
        noise = torch.randn(n_rows, config.features, generator=generator)
        magnitudes = torch.exp(config.tail * noise - config.tail**2 / 2)
        return torch.where(active, magnitudes, 0.0)

    def _draw_groups(self, n_rows: int) -> Tensor:
        """Draw which of the features in groups are active, [n_rows, G'] bool."""
        config = self.config
        groups = torch.arange(len(self._others)) // config.group_size
        shared = torch.randn(n_rows, int(groups[-1]) + 1, generator=self.generator)[:, groups]
        own = torch.randn(n_rows, len(self._others), generator=self.generator)
        mixed = math.sqrt(config.correlation) * shared + math.sqrt(1 - config.correlation) * own
        thresholds = torch.special.ndtri(1 - self.probabilities[self._others]).float()
        active: Tensor = mixed > thresholds
        return active

    def chunks(self, n_rows: int) -> Iterator[Tensor]:
        """Yield coefficients of `n_rows` rows, part by part."""
        for start in range(0, n_rows, _CHUNK):
            yield self.draw(min(_CHUNK, n_rows - start))


class Superposition(Task):
    """Find a known dictionary again."""

    name: ClassVar[str] = "superposition"
    title: ClassVar[str] = "Superposition: a known dictionary"
    about: ClassVar[str] = (
        "Rows are sums of few features of a known dictionary, which has more features than "
        "dimensions. Magnitudes are log-normal, probabilities fall as rank^-0.5, some features are "
        "children that are active only with their parent, and the others are correlated in groups."
    )
    scores: ClassVar[Sequence[Score]] = (
        Score(
            "mcc",
            "MCC",
            "Mean |cosine| of decoder rows and true directions, matched one to one so that the sum "
            "is largest (Hungarian algorithm).",
            f"{_SYNTH}; SAELens `mean_correlation_coefficient`",
        ),
        Score(
            "recovered",
            "recovered",
            "Share of the true features whose matched latent has |cosine| above 0.9.",
            "arXiv:2309.08600",
        ),
        Score(
            "uniqueness",
            "unique",
            "Number of features that are the nearest one of some latent, divided by the number of "
            "latents.",
            f"{_SYNTH}; SAELens `feature_uniqueness`",
        ),
        Score(
            "precision",
            "precision",
            "Of the rows on which a feature's matched latent fires, the share on which the feature "
            "is active; mean over features.",
            _SYNTH,
        ),
        Score(
            "recall",
            "recall",
            "Of the rows on which a feature is active, the share on which its matched latent "
            "fires; mean over features.",
            _SYNTH,
        ),
        Score("f1", "F1", "Harmonic mean of precision and recall; mean over features.", _SYNTH),
        Score(
            "absorption_rate",
            "absorption",
            "Of all rows with an active child, the share on which the child's latent fires and the "
            "latent of its parent, which is active too, is silent.",
            "arXiv:2409.14507, with known features in place of probes",
        ),
        Score(
            "shrinkage",
            "shrinkage",
            "Sum of a latent's values, times the norm of its decoder row, divided by the sum of "
            "the true coefficients, over the rows on which both are active; mean over recovered "
            "features. 1: none, below 1: values are too small.",
            "arXiv:2404.16014",
            is_share=False,
        ),
    )

    config: SuperpositionConfig
    dictionary: Dictionary
    truth: Tensor  # [M, G], coefficients of the held-out rows

    def prepare(self, folder: Path, progress: Progress) -> None:
        """Draw the dictionary, the held-out rows and the rows; nothing is kept in the folder."""
        self.dictionary = Dictionary(self.config)
        features = self.dictionary.features
        self.truth = torch.cat(list(self.dictionary.chunks(self.config.heldout_rows)))
        self.heldout_rows = self.truth @ features
        parts = [part @ features for part in self.dictionary.chunks(self.config.rows)]
        self.rows = torch.cat(parts)

    def facts(self) -> Mapping[str, Any]:
        """Return sizes, and what is active on the held-out rows."""
        kinds = self.dictionary.kinds
        cosines = (self.dictionary.features @ self.dictionary.features.t()).fill_diagonal_(0)
        return {
            "features": {name: int((kinds == number).sum()) for number, name in enumerate(KINDS)},
            "active features per held-out row": float((self.truth != 0).sum(1).double().mean()),
            "largest |cosine| of two features": float(cosines.abs().max()),
            "rows": len(self.rows),
            "held-out rows": len(self.heldout_rows),
        }

    @torch.no_grad()
    def score(self, sae: SparseAutoencoder) -> Scored:
        """Return the scores of a dictionary, and cosine and F1 of each feature."""
        features = self.dictionary.features
        directions = sae.direction(slice(None)).float().cpu()
        pairs = pair_features(directions, features)
        # A latent's value times this is its contribution along its feature, in the rows' units.
        lengths = directions.norm(dim=1)[pairs.latents.clamp_min(0)] * pairs.cosines.sign()
        counts = FiringCounts(self.dictionary.parents)
        for start in range(0, len(self.truth), _CHUNK):
            part = slice(start, start + _CHUNK)
            rows, truth = self.heldout_rows[part], self.truth[part]
            code = sae.encode(rows).dense().float().cpu()
            values = code[:, pairs.latents.clamp_min(0)] * lengths
            counts.add(torch.where(pairs.has_latent, values, 0.0), truth)
        f1, recall = counts.f1(), counts.recall()
        return Scored(
            {
                "mcc": pairs.mcc(),
                "recovered": pairs.recovered_share(),
                "uniqueness": uniqueness(directions, features),
                "precision": counts.mean(counts.precision()),
                "recall": counts.mean(recall),
                "f1": counts.mean(f1),
                "absorption_rate": counts.absorption_rate(),
                "shrinkage": counts.shrinkage(pairs.is_recovered),
            },
            {
                "cosines": _rounded(pairs.cosines.abs()),
                "f1": _rounded(f1),
                "recall": _rounded(recall),
            },
        )

    def draw(self, entries: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
        """Draw cosines and F1 of all features, and both by the kind of feature."""
        names = list(dict.fromkeys(str(entry["arch"]) for entry in entries))
        kinds = self.dictionary.kinds
        figure, cells = new_figure(2, 3, (4.0, 3.1))
        for place, name in enumerate(names):
            own = [entry["details"] for entry in entries if entry["arch"] == name]
            cosines, f1 = (
                torch.tensor([details[key] for details in own]).mean(0) for key in ("cosines", "f1")
            )
            style: dict[str, Any] = {"color": f"C{place}", "label": name, "linewidth": 1.3}
            cells[0].plot(cosines.sort(descending=True).values.numpy(), **style)
            order = self.dictionary.probabilities.argsort()
            smooth = _running_mean(f1[order], max(1, len(f1) // 16))
            cells[1].plot(self.dictionary.probabilities[order].numpy(), smooth.numpy(), **style)
        cells[0].set_title("|cosine| of each feature's latent", fontsize=11)
        cells[0].set_xlabel("features, best first", fontsize=10)
        cells[1].set_title("F1 of firing, running mean", fontsize=11)
        cells[1].set_xlabel("probability of the feature", fontsize=10)
        cells[1].set_xscale("log")
        cells[2].set_axis_off()
        handles, labels = cells[0].get_legend_handles_labels()
        cells[2].legend(handles, labels, fontsize=10, frameon=False, loc="center")
        for axes, (number, kind) in zip(cells[3:], enumerate(KINDS), strict=True):
            chosen = (kinds == number).nonzero().squeeze(1).tolist()
            if chosen:
                draw_dots(axes, names, functools.partial(_recalls, entries, chosen))
            axes.set_title(f"recall of firing: {kind}", fontsize=11)
        for axes in (*cells[:2], *cells[3:]):
            axes.set_ylim(-0.03, 1.03)
            axes.tick_params(labelsize=9)
            axes.grid(alpha=0.3)
        return [finish(figure, f"{self.title}, by feature", out / "features.png")]


def _recalls(entries: Sequence[Mapping[str, Any]], chosen: list[int], name: str) -> list[float]:
    """Return the mean recall of chosen features for each seed of an architecture."""
    own = [entry["details"]["recall"] for entry in entries if entry["arch"] == name]
    return [sum(recall[j] for j in chosen) / len(chosen) for recall in own]


def _running_mean(values: Tensor, width: int) -> Tensor:
    half = width // 2
    padded = F.pad(values[None, None], (half, half), mode="replicate")
    return F.avg_pool1d(padded, 2 * half + 1, stride=1)[0, 0]


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]
