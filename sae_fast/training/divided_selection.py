"""The selection of BatchTopK by several ranks, each of which encodes some of the rows of a step.

The encoder's product is most of a step's work. Each rank finds the candidates of its rows: as many
as the whole step takes, so that all selected ones are among them. From the candidates of all ranks
each makes the selection of `encode_batch_topk` itself, equal values in its order included.

`largest_of_all` chooses among the candidates, also where ranks have blocks of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.architecture import SELECTIONS
from sae_fast.distributed.ranks import Ranks
from sae_fast.ops.encode import encode_selected

_Outputs = tuple[Tensor, ...]


def divided_selections(ranks: Ranks) -> Mapping[str, Callable[..., ops.SparseCode]]:
    """Return the selections of an `Engine`, computed by all ranks, which call it with one batch."""
    if ranks.size == 1:
        return SELECTIONS
    return {**SELECTIONS, "batch_topk": partial(_batch_topk, ranks)}


def _batch_topk(
    ranks: Ranks,
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    k: int,
    **options: Any,
) -> ops.SparseCode:
    """Return what `ops.encode_batch_topk` does."""
    tensors = (x, W_enc, b_enc, b_dec)
    return encode_selected("encode_batch_topk", partial(_select, ranks), tensors, k, **options)


def _select(
    ranks: Ranks,
    x: Tensor,  # [N, D]
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    precision: str,
    dead_mask: Tensor | None,  # [F] bool
    k_aux: int,
    *copies: Tensor | None,
) -> _Outputs:
    """Return values, indices, offsets, aux_values and aux_indices of the op on all rows."""
    n_rows, budget = len(x), len(x) * k
    starts = [n_rows * number // ranks.size for number in range(ranks.size + 1)]
    own = x[starts[ranks.rank] : starts[ranks.rank + 1]]
    # So many of a row that together they are as many as the whole selection.
    most = min(-(-budget // max(1, len(own))), len(W_enc))
    op = torch.ops.sae_fast.encode_batch_topk.default
    found = op(own, W_enc, b_enc, b_dec, most, precision, dead_mask, k_aux, *copies)
    values, indices, offsets, *aux = found
    first = starts[ranks.rank], 0
    values, rows, indices, *aux = largest_of_all(
        ranks, values, indices, offsets, first, len(W_enc), budget, aux
    )
    counts = torch.bincount(rows, minlength=n_rows)
    missing = budget - len(values)
    counts[-1] += missing
    padded = [torch.nn.functional.pad(part, (0, missing)) for part in (values, indices)]
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return *padded, ends, *aux


def largest_of_all(
    ranks: Ranks,
    values: Tensor,  # [entries]
    indices: Tensor,  # [entries] int32
    offsets: Tensor,  # [rows + 1] int64
    first: tuple[int, int],
    d_sae: int,
    budget: int,
    beside: Sequence[Tensor] = (),
) -> _Outputs:
    """Return the largest entries of the codes that all ranks have, by row, then by latent.

    Of equal values the one of the lower row is chosen, in a row the one of the lower latent.

    Args:
        ranks: the processes, which call this together.
        values: of the entries of this process; entries of value 0 only fill up a row.
        indices: of their latents, counted from the first one of this process.
        offsets: where each row of this process begins, and the end.
        first: the row and the latent from which this process counts.
        d_sae: the number of all latents.
        budget: how many entries are chosen, at most.
        beside: other tensors of this process.

    Returns values, rows and latents of the entries, and the tensors of `beside` of all processes,
    joined in the order of the ranks.
    """
    kept = ~(values <= 0)  # NaN is kept
    rows = torch.arange(len(offsets) - 1, device=values.device).repeat_interleave(offsets.diff())
    keys = (rows[kept] + first[0]) * d_sae + indices[kept] + first[1]
    found = [tensors for _, tensors in ranks.gather(None, [values[kept], keys, *beside])]
    values, keys, *others = (torch.cat(parts) for parts in zip(*found, strict=True))
    keys, order = keys.sort()
    values = values[order]
    if len(values) > budget:
        largest = values.sort(descending=True, stable=True).indices[:budget]
        places = largest.sort().values
        values, keys = values[places], keys[places]
    return values, keys // d_sae, (keys % d_sae).int(), *others
