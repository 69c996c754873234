"""Metrics of a model on rows that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat

import torch
from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.slots import Slots

# Rows that may decide sums over all: 1 % with the largest norms. Without them the FVU is told where
# it differs by this factor.
_EXTREME_SHARE = 0.01
_MUCH = 1.5


@torch.no_grad()
def evaluate_slots(
    sae: SparseAutoencoder, batches: Iterable[Tensor], labels: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the shares of labelled rows with the right slot the largest and the right answer.

    Args:
        sae: a model with relation slots.
        batches: rows [n, D] as captured.
        labels: of all of them, [rows] whole numbers, by the names that the configuration has.

    Raises:
        ValueError: where a label is not one that the model has.
    """
    slots, config = sae.architecture, sae.config
    assert isinstance(slots, Slots)
    relations = labels[config.relation_labels or ""]
    answers = labels[config.answer_labels or ""] if config.has_value_heads else None
    counts = torch.zeros(4, dtype=torch.int64)
    first = 0
    for batch in batches:
        rows = slice(first, first + len(batch))
        first += len(batch)
        x = sae.normalize(batch.to(sae.W_enc.device))
        bound = relations[rows].to(x.device, torch.int64)
        wanted = None if answers is None else answers[rows].to(x.device, torch.int64)
        counts += torch.stack(slots.measure(sae.weights, x, bound, wanted)).cpu()
    slots_right, n_relations, answers_right, n_answers = counts.tolist()
    shares = {"heldout_slot_accuracy": slots_right / max(n_relations, 1)}
    if answers is not None:
        shares["heldout_value_accuracy"] = answers_right / max(n_answers, 1)
    return shares


@torch.no_grad()
def evaluate(
    sae: SparseAutoencoder,
    batches: Iterable[Tensor],
    targets: Iterable[Tensor] | None = None,
    dead_rate: float = 0.0,
    ordinary_norm: float | None = None,
    note_rates: Callable[[Tensor], object] | None = None,
) -> dict[str, float]:
    """Return the FVU, the L0 and the share of latents that hardly ever fire on held-out rows.

    FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2 over all rows, sums in float64; a transcoder has
    its targets in place of x. The explained variance is 1 - FVU; the overall one is
    1 - mse / x.var() with one mean and one variance of all numbers.

    Args:
        sae: the model. Where each of several processes has some of its latents, all call this with
            the same rows.
        batches: rows [n, D] as captured; the model normalises them itself.
        targets: of each batch, [n, d_out], for a transcoder.
        dead_rate: the share of rows below which a latent that fires counts as dead; one that fires
            on exactly this share does not.
        ordinary_norm: what `largest_ordinary_norm` gives; the FVU of the rows up to it is added
            where it is another one.
        note_rates: called with the share of the rows on which each latent fires, [F] float64.
    """
    device = sae.W_enc.device
    sums, ordinary = (_Sums(sae.config.target_width, device) for _ in range(2))
    active = torch.zeros((), dtype=torch.float64, device=device)
    fired = torch.zeros(len(sae.W_enc), dtype=torch.int64, device=device)  # on how many rows
    rows = 0
    pairs = zip(batches, repeat(None) if targets is None else targets, strict=targets is not None)
    with sae.kept_copies():
        for batch, target in pairs:
            x = batch.to(device)
            y = x if target is None else target.to(device)
            code = sae.encode(x)
            squared = (y - sae.decode(code, x)).double().square()
            sums.add(y, squared)
            if ordinary_norm is not None:
                kept = torch.linalg.vector_norm(y.double(), dim=1) <= ordinary_norm
                ordinary.add(y[kept], squared[kept])
            active += code.l0().sum()
            fired += torch.bincount(code.indices[code.fires()], minlength=len(fired))
            rows += len(x)
    active, fired = sae.engine.total(active), sae.engine.joined(fired)
    if note_rates is not None:
        note_rates(fired.double() / rows)
    fvu, extra = sums.fvu(), {}
    if ordinary_norm is not None and fvu > 0:
        ratio = ordinary.fvu() / fvu
        if ratio >= _MUCH or ratio <= 1 / _MUCH:
            extra["heldout_ordinary_fvu"] = ordinary.fvu()
    return {
        "heldout_fvu": fvu,
        **extra,
        "heldout_explained_variance": 1 - fvu,
        "heldout_explained_variance_overall": sums.overall_explained_variance(),
        "heldout_l0": float(active / rows),
        "heldout_dead_fraction": float(is_dead(fired, rows, dead_rate).double().mean()),
    }


def largest_ordinary_norm(batches: Iterable[Tensor]) -> float:
    """Return the norm up to which rows are ordinary: all but the 1 % that have the largest."""
    norms = torch.cat([torch.linalg.vector_norm(batch.double(), dim=1).cpu() for batch in batches])
    n_ordinary = len(norms) - math.ceil(_EXTREME_SHARE * len(norms))
    return float(norms.sort().values[max(n_ordinary, 1) - 1])


class _Sums:
    """Sums over rows in float64, of which the variance and the error are made."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._squared_error = torch.zeros((), dtype=torch.float64, device=device)
        self._squared_norm = torch.zeros_like(self._squared_error)
        self._total = torch.zeros(width, dtype=torch.float64, device=device)
        self._rows = 0

    def add(
        self,
        y: Tensor,  # [n, D]
        squared: Tensor,  # [n, D], errors
    ) -> None:
        """Add rows."""
        self._squared_error += squared.sum()
        self._squared_norm += y.double().square().sum()
        self._total += y.sum(dim=0, dtype=torch.float64)
        self._rows += len(y)

    def fvu(self) -> float:
        """Return Σ (ŷ − y)² / Σ (y − mean(y))²."""
        variance = self._squared_norm - self._total.square().sum() / self._rows
        return float(self._squared_error / variance)

    def overall_explained_variance(self) -> float:
        """Return 1 − mse / y.var(), with one variance of all numbers."""
        numbers = self._rows * len(self._total)
        overall = (self._squared_norm - self._total.sum().square() / numbers) / (numbers - 1)
        return float(1 - self._squared_error / numbers / overall)


def is_dead(
    fired: Tensor,  # [F] int64, on how many rows a latent fires
    rows: int,
    dead_rate: float,
) -> Tensor:
    """Return which latents fire on no row, or on a share below `dead_rate`, [F] bool.

    A quotient rounds as the decimal number does that names it: 7 of 10,000 is 0.0007, but 0.0007
    times 10,000 is above 7.
    """
    return (fired == 0) | (fired.double() / rows < dead_rate)
