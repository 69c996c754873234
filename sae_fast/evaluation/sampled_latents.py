"""Numbers and tokens of the latents of a dictionary on a few rows, for the report of a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from sae_fast.activations import ShardSet
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.evaluation.concepts import ConceptPass, Concepts
from sae_fast.evaluation.core import core_metrics
from sae_fast.evaluation.rows import text_columns
from sae_fast.evaluation.text_rows import TOKENS
from sae_fast.evaluation.token_texts import named_tokenizer, texts_here


@dataclass(frozen=True)
class SampledLatents:
    """Numbers and tokens of latents on a few rows.

    Attributes:
        rows: how many rows.
        numbers: a number for each latent [F], by name, see `CoreMetrics`.
        concepts: the tokens of the rows on which they are strongest, where the shards have tokens.
        texts: of the tokens, where their tokenizer is on this machine.
    """

    rows: int
    numbers: dict[str, Tensor]
    concepts: Concepts
    texts: dict[int, str]


def sample_latents(
    sae: SparseAutoencoder,
    batches: Iterable[Tensor],
    targets: Iterable[Tensor] | None,
    shards: ShardSet | None,
    *,
    limit: int,
    top: int,
) -> SampledLatents:
    """Return numbers and tokens of latents on the first rows.

    Args:
        sae: the dictionary, in evaluation mode.
        batches: rows [n, D] as captured.
        targets: of each batch, [n, d_out], for a transcoder.
        shards: that hold these rows, if any do.
        limit: how many rows, at most.
        top: rows on which a latent is strongest that are kept.
    """
    columns = {} if shards is None else text_columns(shards)
    columns = {name: numbers[:limit] for name, numbers in columns.items()}
    concepts = ConceptPass(sae.d_sae, columns, None, top=top, probe_rows=0)
    first = None if targets is None else _first(targets, limit)
    core = core_metrics(sae, _first(batches, limit), first, watch=concepts)
    texts: dict[int, str] = {}
    with suppress(ValueError):  # without its tokenizer a token is shown by its number
        if shards is not None and TOKENS in columns and (name := named_tokenizer(shards)):
            found = texts_here(name)
            texts = {} if found is None else found.by_token(columns[TOKENS])
    return SampledLatents(core.rows, core.latents, concepts.result(), texts)


def _first(batches: Iterable[Tensor], limit: int) -> Iterator[Tensor]:
    """Yield the first rows of batches, no further batch than needed."""
    for batch in batches:
        yield batch[:limit]
        limit -= len(batch)
        if limit <= 0:
            return
