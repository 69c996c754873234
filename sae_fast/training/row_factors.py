"""The factors that backward leaves on W_enc and W_dec, merged into one latent-major list each.

Micro-batches and AuxK each leave a factor. The codes are joined end to end; so are the dense sides,
unless one is the tensor of a factor before it. W_enc and W_dec come from the same codes, so they
share the latent-major view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae_fast import ops
from sae_fast.ops import RowFactor

LatentMajor = tuple[Tensor, Tensor, Tensor]  # latent_offsets [F + 1], entries, rows


@dataclass(frozen=True)
class MergedFactors:
    """A gradient: row j sums coefficients[p] · (dense[rows[p]] − shift) over its entries p."""

    latent_offsets: Tensor  # [F + 1] int64
    rows: Tensor  # [entries] int32
    coefficients: Tensor  # [entries], latent-major
    dense: Tensor  # [N, D]
    shift: Tensor | None  # [D]


def merge_row_factors(
    W_enc: nn.Parameter,  # [F, D]
    W_dec: nn.Parameter,  # [F, D]
) -> tuple[MergedFactors, MergedFactors]:
    """The factors of both parameters, with one latent-major view where their codes are the same."""
    encoder, decoder = row_factors(W_enc), row_factors(W_dec)
    encoder_keys = [factor.code_key for factor in encoder]
    by_key = {factor.code_key: factor for factor in decoder}
    same_codes = len(by_key) == len(decoder) and by_key.keys() == set(encoder_keys)
    view = _latent_major(encoder, W_enc)
    if not same_codes or len(encoder_keys) != len(by_key):
        return _merge(encoder, W_enc, view), _merge(decoder, W_dec, _latent_major(decoder, W_dec))
    decoder = [by_key[key] for key in encoder_keys]
    return _merge(encoder, W_enc, view), _merge(decoder, W_dec, view)


def row_factors(W: nn.Parameter) -> list[RowFactor]:
    """The factors that backward has left on a parameter since they were last cleared."""
    factors: list[RowFactor] = getattr(W, "row_factors", [])
    return factors


def _merge(factors: Sequence[RowFactor], W: Tensor, view: LatentMajor) -> MergedFactors:
    latent_offsets, entries, rows = view
    if not factors:
        return MergedFactors(latent_offsets, rows, W.new_empty(0), W.new_empty(0, W.shape[1]), None)
    coefficients = _join([factor.coefficients for factor in factors])
    dense, shift, starts = _stack_dense(factors)
    n_rows = [factor.dense.shape[0] for factor in factors]
    if starts != _running_sum(n_rows):
        parts = [
            torch.arange(start, start + n, dtype=rows.dtype, device=rows.device)
            for start, n in zip(starts, n_rows, strict=True)
        ]
        rows = torch.cat(parts).index_select(0, rows)
    ordered = ops.gather_entries(coefficients, entries)
    return MergedFactors(latent_offsets, rows, ordered, dense, shift)


def _stack_dense(factors: Sequence[RowFactor]) -> tuple[Tensor, Tensor | None, list[int]]:
    """The distinct dense sides end to end, their shift, and where each factor's rows start."""
    shift = factors[0].shift
    one_shift = all(factor.shift is shift for factor in factors)
    distinct: list[RowFactor] = []
    starts: list[int] = []
    for factor in factors:
        earlier = (i for i, other in enumerate(distinct) if _has_same_side(factor, other))
        place = next(earlier, len(distinct))
        if place == len(distinct):
            distinct.append(factor)
        starts.append(sum(other.dense.shape[0] for other in distinct[:place]))
    sides = [factor.dense for factor in distinct]
    if not one_shift:
        sides = [
            factor.dense if factor.shift is None else factor.dense - factor.shift
            for factor in distinct
        ]
    stacked = sides[0] if len(sides) == 1 else torch.cat(sides)
    return stacked, shift if one_shift else None, starts


def _latent_major(factors: Sequence[RowFactor], W: Tensor) -> LatentMajor:
    d_sae = W.shape[0]
    if not factors:
        empty = torch.empty(0, dtype=torch.int32, device=W.device)
        return torch.zeros(d_sae + 1, dtype=torch.int64, device=W.device), empty, empty
    if len(factors) == 1:
        return factors[0].latent_major(d_sae)
    offsets = [torch.zeros(1, dtype=torch.int64, device=W.device)]
    n_entries = 0
    for factor in factors:
        offsets.append(_row_ends(factor) + n_entries)
        n_entries += factor.values.numel()
    values = _join([factor.values for factor in factors])
    indices = _join([factor.indices for factor in factors])
    return ops.latent_major(values, indices, torch.cat(offsets), d_sae)


def _row_ends(factor: RowFactor) -> Tensor:
    """Where each row's entries end, counted within the factor, [N] int64."""
    if factor.offsets is not None:
        return factor.offsets[1:]
    n_rows, width = factor.values.shape
    return torch.arange(1, n_rows + 1, device=factor.values.device) * width


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def _running_sum(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _has_same_side(first: RowFactor, second: RowFactor) -> bool:
    one, other = first.dense, second.dense
    is_same_tensor = one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
    return is_same_tensor and first.shift is second.shift
