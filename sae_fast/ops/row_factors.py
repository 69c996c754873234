"""Gradients of weight matrices in factors, and the latent-major codes they are summed by.

With `dense_grad=False` a backward appends a RowFactor to `W.row_factors`, a list on the parameter,
in place of a dense `.grad`. Micro-batches and AuxK each leave one. The optimizer merges them into
one latent-major list per parameter, and clears them: codes and dense sides are joined end to end;
a dense side that is the tensor of an earlier factor is not repeated. W_enc and W_dec come from the
same codes, so they share the latent-major view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae_fast.ops.code import CodeKey

LatentMajor = tuple[Tensor, Tensor, Tensor]  # latent_offsets [F + 1], entries, rows


@dataclass(frozen=True, eq=False)
class RowFactor:
    """A gradient: row j is Σ coefficient · (dense[n] − shift) over the entries of latent j.

    Attributes:
        values: [N, K] or [nnz], of the code, or other numbers that are 0 where an entry does not
            count, whatever its coefficient.
        indices: int32, in the shape of values.
        offsets: None, or [N + 1] int64.
        coefficients: in the shape of values.
        dense: [N, D] float32, bfloat16 or float16.
        shift: [D], or None for 0.
        code_key: identity of the code; factors with one key share its latent-major view.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    coefficients: Tensor
    dense: Tensor
    shift: Tensor | None
    code_key: CodeKey

    def latent_major(self, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the latent-major view of the code: latent_offsets, entries, rows."""
        return self.code_key.latent_major(self.values, self.indices, self.offsets, d_sae)


class FactorSink:
    """The parameter on which the backward of one call leaves its factors, and its codes' keys.

    The keys are made before the call, so that the sink never changes: an encoder has one for its
    code and one for its aux, a decoder has the key of the code which it decodes.

    Raises RuntimeError for a tensor that is not a leaf: nothing would find the factors on it.
    """

    def __init__(self, op: str, name: str, W: Tensor, *keys: CodeKey) -> None:
        if W.requires_grad and not W.is_leaf:
            raise RuntimeError(
                f"{op}: {name} must be a leaf tensor (a parameter) for dense_grad=False: "
                "factors are left on the tensor itself"
            )
        self.W = W
        self.keys = keys

    def append(self, factor: RowFactor) -> None:
        """Leave a factor on the parameter, and tell the one who watches it, see `watched`."""
        if not hasattr(self.W, "row_factors"):
            self.W.row_factors = []  # type: ignore[attr-defined]
        self.W.row_factors.append(factor)  # type: ignore[attr-defined]
        if (on_factor := getattr(self.W, "on_row_factor", None)) is not None:
            on_factor(factor)


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
) -> Iterator[MergedFactors]:
    """Yield the merged factors of W_enc, then the ones of W_dec, with one view if they share codes.

    The dense sides of W_dec are read when its factors are asked for, and not before.
    """
    encoder, decoder = row_factors(W_enc), row_factors(W_dec)
    encoder_keys = [factor.code_key for factor in encoder]
    by_key = {factor.code_key: factor for factor in decoder}
    same_codes = len(by_key) == len(decoder) and by_key.keys() == set(encoder_keys)
    view = _joined_view(encoder, W_enc)
    if not same_codes or len(encoder_keys) != len(by_key):
        yield _merge(encoder, W_enc, view)
        yield _merge(decoder, W_dec, _joined_view(decoder, W_dec))
        return
    yield _merge(encoder, W_enc, view)
    yield _merge([by_key[key] for key in encoder_keys], W_dec, view)


@contextmanager
def watched(W: nn.Parameter, on_factor: Callable[[RowFactor], None]) -> Iterator[None]:
    """Call `on_factor` with each factor that a backward in this context leaves on a parameter."""
    W.on_row_factor = on_factor  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del W.on_row_factor  # type: ignore[attr-defined]


def row_factors(W: nn.Parameter) -> list[RowFactor]:
    """Return the factors that backward has left on a parameter since they were last cleared."""
    factors: list[RowFactor] = getattr(W, "row_factors", [])
    return factors


@torch.no_grad()
def latent_major(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32, the shape of values
    offsets: Tensor | None,  # [N + 1] int64
    d_sae: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entries with a value other than 0 by latent: latent_offsets, entries, rows.

    latent_offsets is [d_sae + 1] int64; entries are flat positions in values and rows their tokens,
    both int32; inside a latent they ascend.
    """
    op = torch.ops.sae_fast.latent_major.default
    latent_offsets, entries, rows = op(values, indices, offsets, d_sae)
    return latent_offsets, entries, rows


@torch.no_grad()
def gather_entries(
    source: Tensor,  # any shape
    entries: Tensor,  # [M] int32
) -> Tensor:
    """Return the numbers of `source` at these flat positions, [M]."""
    ordered: Tensor = torch.ops.sae_fast.gather_entries.default(source, entries)
    return ordered


@torch.no_grad()
def latent_sums(
    latent_offsets: Tensor,  # [F + 1] int64
    entries: Tensor,  # [E] int32, flat positions in coefficients
    coefficients: Tensor,  # any shape
) -> Tensor:
    """Return per latent the sum of the coefficients at its entries, [F]."""
    sums: Tensor = torch.ops.sae_fast.latent_sums.default(latent_offsets, entries, coefficients)
    return sums


@torch.no_grad()
def accumulate_rows(
    coefficients: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32, the shape of coefficients
    offsets: Tensor | None,  # [N + 1] int64
    dense: Tensor,  # [N, D]
    d_sae: int,
) -> tuple[Tensor, Tensor]:
    """Return per latent the sum of coefficient * dense[n], [d_sae, D], and of coefficients."""
    op = torch.ops.sae_fast.accumulate_rows.default
    rows, sums = op(coefficients, indices, offsets, dense, d_sae)
    return rows, sums


def weighted_row_sum(
    weights: Tensor,  # [M]
    matrix: Tensor,  # [M, D]
    factor: float = 1.0,
) -> Tensor:
    """Return `factor` · Σ_m weights[m] · matrix[m], [D], equal for any number of threads."""
    total: Tensor = torch.ops.sae_fast.weighted_row_sum.default(weights, matrix, factor)
    return total


def factor_sums(factor: RowFactor, d_sae: int) -> Tensor:
    """Return per latent the sum of a factor's coefficients, [d_sae]."""
    latent_offsets, entries, _ = factor.latent_major(d_sae)
    return latent_sums(latent_offsets, entries, factor.coefficients)


def _merge(factors: Sequence[RowFactor], W: Tensor, view: LatentMajor) -> MergedFactors:
    latent_offsets, entries, rows = view
    if not factors:
        return MergedFactors(latent_offsets, rows, W.new_empty(0), W.new_empty(0, W.shape[1]), None)
    coefficients = _join([factor.coefficients for factor in factors])
    dense, shift, starts = _stack_dense(factors)
    n_rows = [factor.dense.shape[0] for factor in factors]
    if starts == _running_sum(n_rows):
        pass
    elif len(set(n_rows)) == 1 and not any(starts):  # all have one dense side
        rows = rows % n_rows[0]
    else:
        parts = [
            torch.arange(start, start + n, dtype=rows.dtype, device=rows.device)
            for start, n in zip(starts, n_rows, strict=True)
        ]
        rows = torch.cat(parts).index_select(0, rows)
    ordered = gather_entries(coefficients, entries)
    return MergedFactors(latent_offsets, rows, ordered, dense, shift)


def _stack_dense(factors: Sequence[RowFactor]) -> tuple[Tensor, Tensor | None, list[int]]:
    """Return the distinct dense sides end to end, their shift, and each factor's first row."""
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


def _joined_view(factors: Sequence[RowFactor], W: Tensor) -> LatentMajor:
    """Return the latent-major view of all factors, their codes joined end to end."""
    d_sae = W.shape[0]
    if not factors:
        empty = torch.empty(0, dtype=torch.int32, device=W.device)
        return torch.zeros(d_sae + 1, dtype=torch.int64, device=W.device), empty, empty
    if len(factors) == 1:
        return factors[0].latent_major(d_sae)
    offsets, n_entries = [], 0
    for factor in factors:
        offsets.append(_row_starts(factor, n_entries))
        n_entries += factor.values.numel()
    offsets.append(torch.full((1,), n_entries, dtype=torch.int64, device=W.device))
    values = _join([factor.values for factor in factors])
    indices = _join([factor.indices for factor in factors])
    return latent_major(values, indices, torch.cat(offsets), d_sae)


def _row_starts(factor: RowFactor, first: int) -> Tensor:
    """Return where each row's entries begin, [N] int64, if the factor's begin at `first`."""
    if factor.offsets is not None:
        return factor.offsets[:-1] + first
    n_rows, width = factor.values.shape
    if width == 0:
        return torch.full((n_rows,), first, dtype=torch.int64, device=factor.values.device)
    return torch.arange(first, first + n_rows * width, width, device=factor.values.device)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def _running_sum(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _has_same_side(first: RowFactor, second: RowFactor) -> bool:
    """Tell if two factors have one dense tensor and one shift, without a look at their numbers."""
    one, other = first.dense, second.dense
    is_same_tensor = one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
    return is_same_tensor and first.shift is second.shift
