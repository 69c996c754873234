"""Every op in plain PyTorch: its definition, its oracle, and what runs without the compiled module.

Any float dtype goes in, float64 included, and sums are taken in at least float32. Work is cut into
chunks, so that neither an [N, F] nor an [N, K, D] array is ever whole in memory.
"""

import torch
from torch import Tensor

from sae_fast.ops.moments import (
    EXP_AVG,
    EXP_AVG_SQ,
    decode_moment,
    encode_moment_,
    moment_random,
)
from sae_fast.ops.reference_correlation import code_correlation, code_correlation_backward
from sae_fast.ops.reference_encoder import (
    ROUNDED_DTYPES,
    chunks,
    encode_batch_topk,
    encode_threshold,
    encode_topk,
    pack_encoder,
)
from sae_fast.ops.reference_step import update_scalars, update_vector_

__all__ = [
    "ROUNDED_DTYPES",
    "accumulate_rows",
    "code_correlation",
    "code_correlation_backward",
    "decode",
    "decode_backward",
    "decorrelation",
    "dense_product",
    "encode_batch_topk",
    "encode_threshold",
    "encode_topk",
    "fused_update_",
    "gather_entries",
    "gather_rows_",
    "latent_major",
    "latent_sums",
    "normalize_rows_",
    "pack_encoder",
    "reconstruct",
    "row_gradient_norm",
    "update_scalars",
    "update_vector_",
]

_SMALLEST_NORM = 1e-12


def decode(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32, the shape of values
    offsets: Tensor | None,  # [N + 1] int64
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor | None,  # [D]
) -> Tensor:
    """x_hat [N, D]: the sum over the entries of a row of value * W_dec[index], plus b_dec."""
    total = torch.promote_types(values.dtype, torch.float32)
    n_rows = _n_rows(indices, offsets)
    if indices.numel() == 0:
        x_hat = values.new_zeros(n_rows, W_dec.size(1), dtype=total)
    else:
        x_hat = torch.nn.functional.embedding_bag(
            indices.flatten(),
            W_dec.to(total),
            _row_offsets(indices, offsets).to(indices.dtype),
            mode="sum",
            per_sample_weights=values.flatten().to(total),
            include_last_offset=True,
        )
    return x_hat if b_dec is None else x_hat + b_dec


def decode_backward(
    grad: Tensor,  # [N, D]
    indices: Tensor,  # int32
    offsets: Tensor | None,  # [N + 1] int64
    W_dec: Tensor,  # [F, D]
) -> Tensor:
    """The gradient of the code values: <grad[n], W_dec[index]> for every entry."""
    total = torch.promote_types(grad.dtype, torch.float32)
    grad_values = grad.new_empty(indices.numel(), dtype=total)
    entry_rows = _entry_rows(indices, offsets)
    flat_indices = indices.flatten()
    for part in chunks(indices.numel(), W_dec.size(1)):
        weights = W_dec[flat_indices[part]].to(total)
        grad_values[part] = weights.mul_(grad[entry_rows[part]]).sum(1)
    return grad_values.view(indices.shape)


def reconstruct(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32
    offsets: Tensor | None,  # [N + 1] int64
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor | None,  # [D]
    x: Tensor,  # [N, D]
) -> tuple[Tensor, Tensor, Tensor]:
    """x_hat - x, its squared length in every row, and its dot product with every active row."""
    residual = decode(values, indices, offsets, W_dec, b_dec).sub_(x)
    squared_error = residual.square().sum(1)
    residual_dot = decode_backward(residual, indices, offsets, W_dec)
    return residual.to(W_dec.dtype), squared_error, residual_dot


def accumulate_rows(
    coefficients: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32
    offsets: Tensor | None,  # [N + 1] int64
    dense: Tensor,  # [N, D]
    d_sae: int,
) -> tuple[Tensor, Tensor]:
    """Per latent: the sum of coefficient * dense[n] over its entries, and of the coefficients."""
    entry_rows = _entry_rows(indices, offsets)
    return _sum_rows(coefficients.flatten(), indices.flatten(), entry_rows, dense, None, d_sae)


def latent_major(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32
    offsets: Tensor | None,  # [N + 1] int64
    d_sae: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CSC view of the entries whose value is not 0: (latent_offsets, entries, rows)."""
    active = (values.flatten() != 0).nonzero().flatten()
    latents = indices.flatten()[active]
    entries = active[latents.argsort(stable=True)]
    counts = torch.bincount(latents, minlength=d_sae)
    latent_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return latent_offsets, entries.int(), _entry_rows(indices, offsets)[entries].int()


def row_gradient_norm(
    latent_offsets: Tensor,  # [F + 1] int64
    rows: Tensor,  # [entries] int32
    coefficients: Tensor,  # [entries], latent-major
    dense: Tensor,  # [N, D]
    shift: Tensor | None,  # [D]
    project_onto: Tensor | None,  # [F, D], unit rows
    extra_grad: Tensor | None,  # [F, D]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The squared norm of a gradient given by its factors, and the per-latent coefficient sums."""
    factors = (latent_offsets, rows, coefficients, dense, shift)
    grad, sums = _row_gradients(*factors, extra_grad, project_onto)
    norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
    cache_slots = rows.new_full((latent_offsets.numel() - 1,), -1)
    return norm.square(), sums, grad.new_empty(0, dense.size(1)), cache_slots


def fused_update_(
    W: Tensor,  # [F, D]
    exp_avg: Tensor,  # [F, D] float32, bfloat16 or uint8
    exp_avg_sq: Tensor | None,  # [F, D], the dtype of exp_avg; of adam
    exp_avg_scale: Tensor | None,  # [F, ceil(D / 256)], of uint8
    exp_avg_sq_scale: Tensor | None,  # [F, ceil(D / 256)], of uint8
    latent_offsets: Tensor,  # [F + 1] int64
    rows: Tensor,  # [entries] int32
    coefficients: Tensor,  # [entries], latent-major
    dense: Tensor,  # [N, D]
    shift: Tensor | None,  # [D]
    extra_grad: Tensor | None,  # [F, D]
    sums: Tensor,  # [F]
    cached: Tensor,
    cache_slots: Tensor,
    scalars: Tensor,  # [11]
    step_count: Tensor | None,  # 0-d int64
    rule: str,
    project: bool,
    unit_norm: bool,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
    precision: str,
) -> None:
    """One step of every row from the factors of its gradient, in the order of torch.optim."""
    factors = (latent_offsets, rows, coefficients, dense, shift)
    grad, _ = _row_gradients(*factors, extra_grad, W if project else None)
    if bool(scalars[0].isfinite()):
        scales = (exp_avg_scale, exp_avg_sq_scale)
        _update_moments_(
            *(W, exp_avg, exp_avg_sq, *scales, grad, scalars, step_count, rule, unit_norm)
        )
    # The reference's own encoder copy is empty; only a rounded W_dec is there to be refreshed.
    if rounded is not None and rounded.shape == W.shape:
        rounded.copy_(W)


def _update_moments_(
    W: Tensor,  # [F, D]
    exp_avg: Tensor,  # [F, D]
    exp_avg_sq: Tensor | None,  # [F, D]
    exp_avg_scale: Tensor | None,  # [F, ceil(D / 256)]
    exp_avg_sq_scale: Tensor | None,  # [F, ceil(D / 256)]
    grad: Tensor,  # [F, D]
    scalars: Tensor,  # [11]
    step_count: Tensor | None,  # 0-d int64
    rule: str,
    unit_norm: bool,
) -> None:
    """The step on moments that are numbers, or codes of which only the float32 inside is used."""
    if exp_avg.dtype in (torch.float32, torch.float64):
        _update_rows_(W, exp_avg, exp_avg_sq, grad, scalars, rule, unit_norm)
        return
    assert step_count is not None
    mean, square = decode_moment(exp_avg, exp_avg_scale, EXP_AVG).to(W.dtype), None
    if exp_avg_sq is not None:
        square = decode_moment(exp_avg_sq, exp_avg_sq_scale, EXP_AVG_SQ).to(W.dtype)
    _update_rows_(W, mean, square, grad, scalars, rule, unit_norm)
    random = moment_random(step_count, *W.shape)
    encode_moment_(exp_avg, exp_avg_scale, mean, random, EXP_AVG)
    if exp_avg_sq is not None and square is not None:
        encode_moment_(exp_avg_sq, exp_avg_sq_scale, square, random, EXP_AVG_SQ)


def _update_rows_(
    W: Tensor,  # [F, D]
    exp_avg: Tensor,  # [F, D]
    exp_avg_sq: Tensor | None,  # [F, D]
    grad: Tensor,  # [F, D]
    scalars: Tensor,  # [11]
    rule: str,
    unit_norm: bool,
) -> None:
    """The step, then rows of unit norm where asked; a difference of weights is divided too."""
    update_vector_(W, exp_avg, exp_avg_sq, grad, scalars, rule)
    if unit_norm:
        norms = _row_norms(W)
        W.div_(norms)
        if rule == "schedule_free_signum":
            exp_avg.div_(norms)


def gather_entries(source: Tensor, entries: Tensor) -> Tensor:  # [M] int32
    """The numbers at these flat positions."""
    return source.flatten().index_select(0, entries)


def gather_rows_(
    out: Tensor,  # [M, D]
    places: Tensor | None,  # [N] int64
    source: Tensor,  # [S, D]
    rows: Tensor,  # [N] int64
    mean: Tensor | None,  # [D]
    scale: float,
) -> None:
    """Row places[i] of out, without places row i, becomes (source[rows[i]] - mean) * scale."""
    for chunk in chunks(len(rows), source.size(1)):
        chosen = source.index_select(0, rows[chunk]).to(out.dtype)
        if mean is not None:
            chosen -= mean
        out[chunk if places is None else places[chunk]] = chosen.mul_(scale)


def latent_sums(
    latent_offsets: Tensor,  # [F + 1] int64
    entries: Tensor,  # [entries] int32
    coefficients: Tensor,  # any shape
) -> Tensor:
    """Per latent: the sum of the coefficients at the flat positions of its entries."""
    ordered = gather_entries(coefficients, entries)
    return torch.segment_reduce(ordered, "sum", offsets=latent_offsets, initial=0, unsafe=True)


def normalize_rows_(W: Tensor) -> None:  # [F, D]
    """Divide every row by its L2 norm, or by 1e-12 where that is larger."""
    W.div_(_row_norms(W))


def _row_norms(W: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return norms.clamp_min(_SMALLEST_NORM)


def dense_product(
    left: Tensor,  # [M, K]
    right: Tensor,  # [K, P]
    bias: Tensor | None,  # [P]
    relu: bool,
    precision: str,
) -> Tensor:
    """left · right + bias, [M, P], and of that ReLU; both are rounded to the precision's dtype."""
    dtype = ROUNDED_DTYPES.get(precision, left.dtype)
    product = left.to(dtype).to(left.dtype) @ right.to(dtype).to(left.dtype)
    if bias is not None:
        product += bias
    return product.relu_() if relu else product


def decorrelation(W: Tensor) -> tuple[Tensor, Tensor]:  # [F, D]
    """The sum over i != j of (ŵ_i·ŵ_j)² and its gradient, by the D×D Gram matrix.

    With S = ŴᵀŴ the sum over all pairs is |S|², from which the diagonal |ŵ_j|⁴ is taken off.
    """
    norms = _row_norms(W)
    unit = W / norms
    gram = unit.t() @ unit
    squared = unit.square().sum(1, keepdim=True)
    # Both terms are near F²/D; their difference needs the wider sum.
    loss = gram.double().square().sum() - squared.double().square().sum()
    grad = (unit @ gram).sub_(squared * unit).mul_(4)
    along = (grad * unit).sum(1, keepdim=True)
    return loss.to(W.dtype), grad.sub_(along * unit).div_(norms)


def _n_rows(indices: Tensor, offsets: Tensor | None) -> int:
    return indices.size(0) if offsets is None else offsets.numel() - 1


def _row_offsets(indices: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is not None:
        return offsets
    n_rows, width = indices.shape
    return torch.arange(n_rows + 1, device=indices.device) * width


def _entry_rows(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """The row n of every entry, flat."""
    offsets = _row_offsets(indices, offsets)
    rows = torch.arange(offsets.numel() - 1, device=indices.device)
    return rows.repeat_interleave(offsets.diff(), output_size=indices.numel())


def _sum_rows(
    coefficients: Tensor,  # [entries]
    latents: Tensor,  # [entries]
    entry_rows: Tensor,  # [entries]
    dense: Tensor,  # [N, D]
    shift: Tensor | None,  # [D]
    d_sae: int,
) -> tuple[Tensor, Tensor]:
    """Per latent: sum of coefficient * (dense[n] - shift), and sum of coefficients."""
    total = torch.promote_types(coefficients.dtype, torch.float32)
    rows = coefficients.new_zeros(d_sae, dense.size(1), dtype=total)
    sums = coefficients.new_zeros(d_sae, dtype=total)
    for part in chunks(latents.numel(), dense.size(1)):
        terms = dense[entry_rows[part]].to(total)
        if shift is not None:
            terms = terms - shift
        scale = coefficients[part].to(total)
        _add_rows_(rows, latents[part], terms * scale[:, None])
        _add_rows_(sums, latents[part], scale)
    return rows, sums


def _add_rows_(out: Tensor, latents: Tensor, terms: Tensor) -> None:
    """Add terms into rows of out, in the order of the entries."""
    if out.is_cuda:  # there index_add_ uses float atomics, and index_put_ sorts first
        out.index_put_((latents,), terms, accumulate=True)
    else:
        out.index_add_(0, latents, terms)


def _row_gradients(
    latent_offsets: Tensor,  # [F + 1] int64
    rows: Tensor,  # [entries] int32
    coefficients: Tensor,  # [entries]
    dense: Tensor,  # [N, D]
    shift: Tensor | None,  # [D]
    extra_grad: Tensor | None,  # [F, D]
    project_onto: Tensor | None,  # [F, D]
) -> tuple[Tensor, Tensor]:
    """The dense gradient [F, D] from its factors, and the coefficient sums [F]."""
    d_sae = latent_offsets.numel() - 1
    latents = torch.arange(d_sae, device=rows.device)
    latents = latents.repeat_interleave(latent_offsets.diff(), output_size=rows.numel())
    grad, sums = _sum_rows(coefficients, latents, rows, dense, shift, d_sae)
    if extra_grad is not None:
        grad.add_(extra_grad)
    if project_onto is not None:
        along = (grad * project_onto).sum(1, keepdim=True)
        grad.sub_(along * project_onto)
    return grad, sums
