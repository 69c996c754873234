"""Batches made of rows as they are stored, in plain PyTorch."""

from torch import Tensor

from sae_fast.ops.reference.chunks import chunks


def gather_rows_(
    out: Tensor,  # [M, D]
    places: Tensor | None,  # [N] int64
    source: Tensor,  # [S, D]
    rows: Tensor,  # [N] int64
    mean: Tensor | None,  # [D]
    scale: float,
) -> None:
    """Write (source[rows[i]] - mean) * scale to row places[i] of out, without places to row i."""
    for chunk in chunks(len(rows), source.size(1)):
        chosen = source.index_select(0, rows[chunk]).to(out.dtype)
        if mean is not None:
            chosen -= mean
        out[chunk if places is None else places[chunk]] = chosen.mul_(scale)
