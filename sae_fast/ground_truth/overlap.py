"""The share of latents that several seeds have in common, by the matching of `sae_fast.compare`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sae_fast.evaluation.comparison import Dictionary, compare
from sae_fast.ground_truth.task import Score

OVERLAP = (
    Score(
        "pw_mcc",
        "PW-MCC",
        "Mean cosine of the matched decoder directions of two seeds, over all pairs of seeds.",
        "arXiv:2505.20254",
    ),
    Score(
        "shared_at_0.7",
        "shared at 0.7",
        "Share of the latents whose partner in another seed has a cosine of at least 0.7, averaged "
        "over all pairs of seeds.",
        "sae_fast.compare",
    ),
    Score(
        "shared_at_0.9",
        "shared at 0.9",
        "The share of the latents whose partner has a cosine of at least 0.9.",
        "sae_fast.compare",
    ),
)


def seed_overlap(models: Mapping[str, Path]) -> dict[str, float]:
    """Return the figures of `OVERLAP` for saved models by seed; none for fewer than two."""
    if len(models) < 2:
        return {}
    comparison = compare({name: Dictionary.read(path) for name, path in models.items()})
    mean: dict[str, float] = comparison.to_dict()["mean"]
    return {score.name: mean[score.name] for score in OVERLAP}
