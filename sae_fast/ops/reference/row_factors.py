"""The ops on latent-major codes and on gradients in factors, in plain PyTorch."""

import torch
from torch import Tensor

from sae_fast.ops.reference.chunks import chunks
from sae_fast.ops.reference.decode import entry_rows


def latent_major(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32
    offsets: Tensor | None,  # [N + 1] int64
    d_sae: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return latent_offsets, entries and rows: the entries with value != 0, by latent."""
    active = (values.flatten() != 0).nonzero().flatten()
    latents = indices.flatten()[active]
    entries = active[latents.argsort(stable=True)]
    counts = torch.bincount(latents, minlength=d_sae)
    latent_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return latent_offsets, entries.int(), entry_rows(indices, offsets)[entries].int()


def gather_entries(source: Tensor, entries: Tensor) -> Tensor:  # [M] int32
    """Return the numbers at these flat positions, [M]."""
    return source.flatten().index_select(0, entries)


def latent_sums(
    latent_offsets: Tensor,  # [F + 1] int64
    entries: Tensor,  # [entries] int32
    coefficients: Tensor,  # any shape
) -> Tensor:
    """Return per latent the sum of the coefficients at its entries, [F]."""
    ordered = gather_entries(coefficients, entries)
    return torch.segment_reduce(ordered, "sum", offsets=latent_offsets, initial=0, unsafe=True)


def accumulate_rows(
    coefficients: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32
    offsets: Tensor | None,  # [N + 1] int64
    dense: Tensor,  # [N, D]
    d_sae: int,
) -> tuple[Tensor, Tensor]:
    """Return per latent the sum of coefficient * dense[n], [F, D], and of coefficients, [F]."""
    tokens = entry_rows(indices, offsets)
    return sum_rows(coefficients.flatten(), indices.flatten(), tokens, dense, None, d_sae)


def sum_rows(
    coefficients: Tensor,  # [entries]
    latents: Tensor,  # [entries]
    tokens: Tensor,  # [entries]
    dense: Tensor,  # [N, D]
    shift: Tensor | None,  # [D]
    d_sae: int,
) -> tuple[Tensor, Tensor]:
    """Return per latent the sum of coefficient * (dense[n] - shift), and of coefficients."""
    total = torch.promote_types(coefficients.dtype, torch.float32)
    rows = coefficients.new_zeros(d_sae, dense.size(1), dtype=total)
    sums = coefficients.new_zeros(d_sae, dtype=total)
    for part in chunks(latents.numel(), dense.size(1)):
        terms = dense[tokens[part]].to(total)
        if shift is not None:
            terms = terms - shift
        scale = coefficients[part].to(total)
        _add_rows_(rows, latents[part], terms * scale[:, None])
        _add_rows_(sums, latents[part], scale)
    return rows, sums


def _add_rows_(out: Tensor, latents: Tensor, terms: Tensor) -> None:
    """Add terms [entries, ...] to the rows `latents` of out, in the order of the entries."""
    if out.is_cuda:  # there index_add_ uses float atomics, and index_put_ sorts first
        out.index_put_((latents,), terms, accumulate=True)
    else:
        out.index_add_(0, latents, terms)
