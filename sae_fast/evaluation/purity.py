"""The purity of latents: how alike the tokens or labels of a latent's strongest rows are.

A latent whose strongest rows all hold one token, or one label, may stand for it. The strongest rows
are kept while codes pass by, so that one pass serves all latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.activations.columns import NO_LABEL
from sae_fast.evaluation.core import Section
from sae_fast.evaluation.top_entries import EMPTY, TopEntries, priority_of, strengths_of

COMMONEST = 5  # numbers of a latent that are listed


@dataclass(frozen=True)
class Purity:
    """The numbers that the strongest rows of each latent hold.

    Attributes:
        rows: how many rows were looked at, [F] int64.
        numbers: the commonest numbers, in descending order of `counts`, [F, 5] int64.
        counts: on how many of the rows each of them is, [F, 5] int64; 0: there is none, NO_LABEL.
        entropy: of the numbers in nats, [F] float64; NaN without rows.
        commonest_share: the share of the commonest number among all rows, active or not.
        top: the rows that were looked at, at most.
        strongest: their numbers, the strongest first, [F, min(top, rows)] int64; -1: there is none.
        strengths: |f| on them, [F, min(top, rows)] float32.
    """

    rows: Tensor
    numbers: Tensor
    counts: Tensor
    entropy: Tensor
    commonest_share: float
    top: int
    strongest: Tensor
    strengths: Tensor

    @property
    def purity(self) -> Tensor:
        """The share of the commonest number of each latent, [F] float64; NaN without rows."""
        share = self.counts[:, 0].double() / self.rows
        return torch.where(self.rows > 0, share, torch.nan)

    def section(self, kind: str) -> Section:
        """Return averages over the latents that are active on `top` rows or more, by name."""
        enough = self.rows == self.top
        number = int(enough.sum())
        means = {
            f"{kind}_purity": float(self.purity[enough].mean()),
            f"{kind}_entropy": float(self.entropy[enough].mean()),
            f"{kind}_pure_fraction": float((self.purity[enough] == 1).double().mean()),
        }
        return {
            **(means if number else {}),
            f"{kind}_commonest_share": self.commonest_share,
            f"{kind}_latents": number,
        }

    def latents(self, kind: str) -> dict[str, Tensor]:
        """Return numbers for each latent [F], by name."""
        top = torch.where(self.rows > 0, self.numbers[:, 0].double(), torch.nan)
        return {
            f"top_{kind}": top,
            f"{kind}_purity": self.purity,
            f"{kind}_entropy": self.entropy,
        }


class StrongestRows:
    """The rows on which each latent is strongest, among the rows that have a number.

    Args:
        d_sae: number of latents.
        numbers: of all rows, [rows] int64, NO_LABEL: none.
        top: rows of a latent that are kept.
    """

    def __init__(self, d_sae: int, numbers: Tensor, top: int) -> None:
        self._numbers = numbers
        self._top = top
        self._entries = TopEntries(d_sae, min(top, len(numbers)))

    def add(self, code: ops.SparseCode, first: int) -> None:
        """Add the codes of consecutive rows, the first of which has the number `first`."""
        offsets, entries, of_entries = (part.cpu() for part in code.latent_major())
        rows, entries = of_entries.long() + first, entries.long()
        kept = code.fires().flatten().cpu()[entries] & (self._numbers[rows] != NO_LABEL)
        latents = torch.arange(code.d_sae).repeat_interleave(offsets.diff())[kept]
        strengths = code.values.detach().flatten().cpu()[entries[kept]].abs().float()
        self._entries.add(latents.numpy(), priority_of(strengths.numpy()), rows[kept].numpy())

    def result(self) -> Purity:
        """Return how alike the numbers of the rows are."""
        self._entries.merge()
        rows = torch.from_numpy(self._entries.rows)
        there = rows != EMPTY
        found = torch.where(there, self._numbers[rows.clamp_min(0)], _NOTHING)
        labelled = self._numbers[self._numbers != NO_LABEL]
        all_counts = np.unique(labelled.numpy(), return_counts=True)[1]
        share = float(all_counts.max() / len(labelled)) if len(labelled) else 0.0
        strengths = torch.from_numpy(strengths_of(self._entries.priorities))
        return Purity(there.sum(1), *_counted(found), share, self._top, rows, strengths)


_NOTHING = int(np.iinfo(np.int64).min)


def _counted(
    found: Tensor,  # [F, n] int64, _NOTHING: no row
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the commonest numbers and their counts, [F, 5] each, and the entropy, [F]."""
    ordered = found.sort(dim=1).values
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = begins.cumsum(1) - 1
    there = (ordered != _NOTHING).long()
    counts = torch.zeros_like(ordered).scatter_add_(1, run, there)
    values = torch.zeros_like(ordered).scatter_(1, run, ordered)
    total = there.sum(1)
    shares = counts.double() / total.clamp_min(1)[:, None]
    entropy = -torch.special.xlogy(shares, shares).sum(1).clamp_max(0)
    # Of equal counts the smaller number comes first.
    order = counts.sort(dim=1, descending=True, stable=True).indices[:, :COMMONEST]
    short = COMMONEST - order.shape[1]
    numbers, best = (
        torch.nn.functional.pad(tensor.gather(1, order), (0, max(short, 0)))
        for tensor in (values, counts)
    )
    return (
        numbers.masked_fill(best == 0, NO_LABEL),
        best,
        torch.where(total > 0, entropy, torch.nan),
    )


def token_rows(
    purity: Purity, texts: Mapping[int, str] | None = None
) -> list[tuple[int, int, str, float]]:
    """Return latent, token, its text and its share of the strongest rows, for the commonest."""
    known = texts or {}
    found = []
    for latent, (numbers, counts, rows) in enumerate(
        zip(purity.numbers.tolist(), purity.counts.tolist(), purity.rows.tolist(), strict=True)
    ):
        found += [
            (latent, number, known.get(number, ""), count / rows)
            for number, count in zip(numbers, counts, strict=True)
            if count
        ]
    return found
