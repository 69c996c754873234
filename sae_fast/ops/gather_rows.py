"""Batches made of rows as they are stored: gathered, widened to float32 and standardized."""

import torch
from torch import Tensor


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
    """Write (source[rows[i]] − mean) · scale to row places[i] of `out`, and return it.

    Without `places` row i goes to row i, and N is M; without `mean` nothing is subtracted. The
    difference is rounded to float32, then the product, so every device gives the same bits.

    Raises:
        RuntimeError: for an argument that does not fit, which the message names. Row numbers
            outside `source` or `out` are found on the CPU only: a look at them waits for a GPU.
    """
    torch.ops.sae_fast.gather_rows_.default(out, places, source, rows, mean, scale)
    torch.autograd.graph.increment_version(out)
    return out
