"""Latents that are near each other by their decoder rows, without a matrix of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.ops import encode_topk

_BLOCK_NUMBERS = 1 << 22  # cosines that are computed together


def top_columns(
    scores: Tensor,  # [B, F] float32, no NaN
    count: int,  # below F
) -> tuple[Tensor, Tensor]:
    """Return the largest scores of each row, descending, and their columns int64: [B, count] each.

    Of equal scores the lower column comes first.
    """
    values, columns = scores.topk(count + 1, dim=1)
    # Sorted by column, then stably by score. Only where equal scores lie on both sides of the end
    # is it open which of them are in.
    after = values[:, count]
    columns, order = columns[:, :count].sort(dim=1)
    values, order = values[:, :count].gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    is_open = (after == values[:, -1]).nonzero().flatten()
    if len(is_open):
        _fill_by_column_(columns, values, scores, is_open)
    return values, columns


def _fill_by_column_(columns: Tensor, values: Tensor, scores: Tensor, rows: Tensor) -> None:
    """Put the lowest columns that have the last score in the places of that score."""
    last = values[rows, -1:]
    row, column = (scores[rows] == last).nonzero(as_tuple=True)
    numbers = torch.arange(len(row), device=row.device)
    begins = torch.searchsorted(row, torch.arange(len(rows), device=row.device))
    place = numbers - begins[row] + (values[rows] > last).sum(1)[row]
    is_in = place < columns.size(1)
    columns[rows[row[is_in]], place[is_in]] = column[is_in]


@torch.no_grad()
def nearest_decoder_rows(
    W_dec: Tensor,  # [F, D]
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return the cosines of each decoder row with the `count` most similar others, and these.

    The cosines are [F, count] float32, descending, equal ones by ascending latent; the latents are
    int64. A row of zeros has the cosine 0 with all. The count is at most F − 1.
    """
    n_latents, width = W_dec.shape
    count = min(count, n_latents - 1)
    if not count:
        return torch.empty(n_latents, 0), torch.empty(n_latents, 0, dtype=torch.int64)
    rows = torch.nn.functional.normalize(W_dec.float(), dim=1)
    # The encoder lists the largest products of every row, if they are above 0; one is its own.
    code = encode_topk(rows, rows, rows.new_zeros(n_latents), rows.new_zeros(width), count + 1)
    latents = code.indices.long()
    own = latents == torch.arange(n_latents, device=rows.device)[:, None]
    own[:, -1] |= ~own.any(1)  # so many equal rows come before it
    cosines = code.values[~own].view(n_latents, count).clamp(max=1)
    latents = latents[~own].view(n_latents, count)
    others = (cosines[:, -1] <= 0).nonzero().flatten()
    for part in torch.split(others, max(1, _BLOCK_NUMBERS // n_latents)):
        scores = (rows[part] @ rows.T).clamp_(-1, 1)
        scores.scatter_(1, part[:, None], -2.0)  # not itself
        cosines[part], latents[part] = top_columns(scores, count)
    return cosines.cpu(), latents.cpu()
