"""Excerpts of the text in which a latent is strongest, from the columns beside the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from sae_fast.evaluation.purity import Purity
from sae_fast.evaluation.text_rows import DOCUMENT, TOKENS

BEFORE, AFTER = 20, 8  # tokens


class Excerpt(NamedTuple):
    """A piece of text round a row.

    Attributes:
        activation: of the latent on the row.
        texts: of the tokens.
        place: of the row's own token among them.
    """

    activation: float
    texts: list[str]
    place: int


def excerpts(
    purity: Purity,
    latent: int,
    columns: Mapping[str, Tensor],
    texts: Mapping[int, str],
    count: int,
) -> list[Excerpt]:
    """Return the text round the strongest rows of a latent, the strongest first.

    Args:
        purity: of tokens, with the strongest rows.
        latent: the latent.
        columns: tokens of all rows [rows], and documents if they are known.
        texts: of tokens; a token without one is shown by its number.
        count: how many rows, at most.
    """
    tokens, documents = columns[TOKENS], columns.get(DOCUMENT)
    found = []
    for row, strength in zip(
        purity.strongest[latent, :count].tolist(),
        purity.strengths[latent, :count].tolist(),
        strict=True,
    ):
        if row < 0:
            break
        first, last = max(row - BEFORE, 0), min(row + AFTER + 1, len(tokens))
        if documents is not None:
            own = documents[first:last] == documents[row]
            # The rows of the document that are next to this one.
            before, after = own[: row - first].flip(0), own[row - first :]
            first = row - int(before.long().cumprod(0).sum())
            last = row + int(after.long().cumprod(0).sum())
        shown = [texts.get(token, f" {token}") for token in tokens[first:last].tolist()]
        found.append(Excerpt(strength, shown, row - first))
    return found
