"""Latents that are near each other by their decoder rows, without a matrix of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_NUMBERS = 1 << 22  # cosines that are computed together
_COLUMN_BITS = 32
_LOW_BITS = 0x7FFFFFFF


def top_columns(
    scores: Tensor,  # [B, F] float32, no NaN
    count: int,  # below F
) -> tuple[Tensor, Tensor]:
    """Return the largest scores of each row, descending, and their columns int64: [B, count] each.

    Of equal scores the lower column comes first.
    """
    values, columns = scores.topk(count + 1, dim=1)
    # Sorted by column, then stably by score. Only where equal scores lie on both sides of the end
    # is it open which of them are in, and the keys, which are all different, decide.
    after = values[:, count]
    columns, order = columns[:, :count].sort(dim=1)
    values, order = values[:, :count].gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    is_open = (after == values[:, -1]).nonzero().flatten()
    if len(is_open):
        columns[is_open] = _columns_by_key(scores[is_open], count)
    return values, columns


def _columns_by_key(scores: Tensor, count: int) -> Tensor:
    """Return the columns of the largest scores, of equal ones the lower columns."""
    bits = (scores + 0.0).contiguous().view(torch.int32)  # + 0.0: -0 equals 0
    ordered = torch.where(bits < 0, bits ^ _LOW_BITS, bits).long()
    columns = torch.arange(scores.size(1), device=scores.device)
    keys = (ordered << _COLUMN_BITS) | (_LOW_BITS - columns)
    return _LOW_BITS - (keys.topk(count, dim=1).values & _LOW_BITS)


@torch.no_grad()
def nearest_decoder_rows(
    W_dec: Tensor,  # [F, D]
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return the cosines of each decoder row with the `count` most similar others, and these.

    The cosines are [F, count] float32, descending, equal ones by ascending latent; the latents are
    int64. A row of zeros has the cosine 0 with all. The count is at most F − 1.
    """
    n_latents = len(W_dec)
    count = min(count, n_latents - 1)
    rows = torch.nn.functional.normalize(W_dec.float(), dim=1)
    step = max(1, _BLOCK_NUMBERS // n_latents)
    cosines = torch.empty(n_latents, count)
    latents = torch.empty(n_latents, count, dtype=torch.int64)
    for first in range(0, n_latents, step):
        block = rows[first : first + step]
        own = torch.arange(first, first + len(block), device=rows.device)
        scores = (block @ rows.T).clamp_(-1, 1)
        scores.scatter_(1, own[:, None], -2.0)  # not itself
        values, columns = top_columns(scores, count)
        cosines[first : first + step], latents[first : first + step] = values, columns
    return cosines, latents
