"""The largest latents in a report: their numbers and, with tokens, their strongest contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from sae_fast.evaluation.concepts import TOKEN, Concepts
from sae_fast.evaluation.definitions import LATENTS
from sae_fast.evaluation.excerpts import excerpts
from sae_fast.report.page import Page, Row

SHOWN = 12  # latents
CONTEXTS = 5  # of a latent
_DENSITY, _MEAN, _MAX = "feature_density", "mean_activation", "max_activation"
_COLUMNS = (_DENSITY, _MEAN, _MAX, "max_decoder_cosine_sim", "attribution")


def add_top_latents(
    page: Page,
    heading: str,
    numbers: Mapping[str, Tensor],
    concepts: Concepts,
    texts: Mapping[int, str],
    ablated: Sequence[int] = (),
) -> None:
    """Add a section with the largest latents: a table, and their contexts where there are tokens.

    Args:
        page: the report.
        heading: of the section.
        numbers: a number for each latent [F], by its name in definitions.py.
        concepts: with the strongest rows of each latent, where the rows have tokens.
        texts: of tokens; a token without one is shown by its number.
        ablated: latents that come first.
    """
    mass = numbers[_DENSITY] * numbers[_MEAN]
    largest = mass.topk(min(SHOWN, len(mass))).indices.tolist()
    chosen = [n for n in dict.fromkeys([*ablated, *largest]) if mass[n] > 0][:SHOWN]
    order = ", after the ablated ones" if ablated else ""
    page.heading(
        heading,
        f"The latents with the largest density times mean activation{order}. "
        "python -m sae_fast.latents makes a page of every latent.",
    )
    columns = [name for name in _COLUMNS if name in numbers]
    page.table(
        ["latent", *(name.replace("_", " ") for name in columns)],
        [
            Row(str(n), tuple(_shown(name, float(numbers[name][n])) for name in columns))
            for n in chosen
        ],
    )
    page.definitions({name.replace("_", " "): LATENTS[name] for name in columns})
    if (purity := concepts.purity.get(TOKEN)) is None:
        page.paragraph("Contexts need rows with tokens: shards with token_ids have them.")
        return
    if not texts:
        page.paragraph(
            "Tokens are shown by their numbers: no tokenizer that has them is on this machine."
        )
    for latent in chosen:
        found = excerpts(purity, latent, concepts.columns, texts, CONTEXTS)
        share = float(purity.purity[latent])
        told = [
            f"active on {float(numbers[_DENSITY][latent]):.2%} of the rows",
            f"largest activation {float(numbers[_MAX][latent]):.3g}",
        ]
        if not math.isnan(share):
            told.append(f"token purity {share:.0%}")
        page.contexts(
            f"latent {latent}",
            ", ".join(told),
            [(item.activation, item.texts, item.place) for item in found],
        )


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.2%}" if name == _DENSITY else f"{value:.3g}"
