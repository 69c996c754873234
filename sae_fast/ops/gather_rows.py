"""Batches made of rows as they are stored: gathered, widened to float32 and standardised."""

import torch
from torch import Tensor

from sae_fast.ops.library import fake


@torch.no_grad()
def gather_rows_(
    out: Tensor,  # [M, D]
    source: Tensor,  # [S, D] float32, bfloat16 or float16
    rows: Tensor,  # [N] int64
    *,
    places: Tensor | None = None,  # [N] int64, all different
    mean: Tensor | None = None,  # [D]
    scale: float = 1.0,
) -> Tensor:
    """Write (source[rows[i]] − mean) · scale to row places[i] of `out`, which is returned.

    Without `places` row i goes to row i, and N is M; without `mean` it is zeros. The difference is
    rounded to float32, then the product, so every device gives the same bits.

    Raises:
        RuntimeError: naming the argument that does not fit. Numbers outside `source` or `out` are
            found on the CPU; on a GPU looking at them would wait for it.
    """
    torch.ops.sae_fast.gather_rows_.default(out, places, source, rows, mean, scale)
    torch.autograd.graph.increment_version(out)
    return out


@fake("gather_rows_")
def _(*arguments: object) -> None:
    return None
