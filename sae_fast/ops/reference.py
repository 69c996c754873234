"""Every op in plain PyTorch: its definition, its oracle, and what runs without the compiled module.

Any float dtype goes in, float64 included, and sums are taken in at least float32. Work is cut into
chunks, so that neither an [N, F] nor an [N, K, D] array is ever whole in memory.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

ROUNDED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Elements of the largest temporary: 16 MiB of float32, which stays near the cache.
_CHUNK_ELEMENTS = 1 << 22
_SMALLEST_NORM = 1e-12


def pack_encoder(W_enc: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Three empty tensors: the reference needs no working copy of the encoder."""
    return W_enc.new_empty(0), W_enc.new_empty(0), W_enc.new_empty(0)


def encode_topk(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    k: int,
    precision: str,
    dead_mask: Tensor | None,  # [F] bool
    k_aux: int,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest pre-activations of every row, and the k_aux largest among dead latents."""
    n_rows = x.size(0)
    values = x.new_empty(n_rows, k)
    indices = x.new_empty(n_rows, k, dtype=torch.int32)
    aux = _AuxCode(x, dead_mask, k_aux)
    for rows, pre_acts in _pre_activations(x, W_enc, b_enc, b_dec, precision):
        top, chosen = _largest(pre_acts, k)
        values[rows], indices[rows] = _relu(top), chosen.int()
        aux.fill(rows, pre_acts)
    return values, indices, aux.values, aux.indices


def encode_batch_topk(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    k: int,
    precision: str,
    dead_mask: Tensor | None,  # [F] bool
    k_aux: int,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The N*k largest positive pre-activations of the batch as CSR rows, and aux of encode_topk."""
    n_rows, d_sae = x.size(0), W_enc.size(0)
    budget = n_rows * k
    values, places = x.new_empty(0), x.new_empty(0, dtype=torch.int64)
    aux = _AuxCode(x, dead_mask, k_aux)
    for rows, pre_acts in _pre_activations(x, W_enc, b_enc, b_dec, precision):
        keep = (pre_acts > 0) | pre_acts.isnan()
        values = torch.cat([values, pre_acts[keep]])
        places = torch.cat([places, keep.flatten().nonzero().flatten() + rows.start * d_sae])
        # Stable, so that of equal values the first places win; NaN sorts before everything.
        best = values.sort(descending=True, stable=True).indices[:budget].sort().values
        values, places = values[best], places[best]
        aux.fill(rows, pre_acts)
    counts = torch.bincount(places // d_sae, minlength=n_rows)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    missing = budget - values.numel()
    if missing > 0:
        values = torch.cat([values, values.new_zeros(missing)])
        places = torch.cat([places, places.new_zeros(missing)])
        offsets[-1] = budget
    return values, (places % d_sae).int(), offsets, aux.values, aux.indices


def encode_threshold(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    threshold: Tensor,  # [F]
    precision: str,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations above threshold and above 0 (NaN is kept), as CSR rows."""
    values = [x.new_empty(0)]
    indices = [x.new_empty(0, dtype=torch.int32)]
    counts = x.new_zeros(x.size(0), dtype=torch.int64)
    for rows, pre_acts in _pre_activations(x, W_enc, b_enc, b_dec, precision):
        keep = ((pre_acts > threshold) & (pre_acts > 0)) | pre_acts.isnan()
        values.append(pre_acts[keep])
        indices.append(keep.nonzero()[:, 1].int())
        counts[rows] = keep.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.cat(values), torch.cat(indices), offsets


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
    for part in _chunks(indices.numel(), W_dec.size(1)):
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
    exp_avg: Tensor,  # [F, D]
    exp_avg_sq: Tensor,  # [F, D]
    latent_offsets: Tensor,  # [F + 1] int64
    rows: Tensor,  # [entries] int32
    coefficients: Tensor,  # [entries], latent-major
    dense: Tensor,  # [N, D]
    shift: Tensor | None,  # [D]
    extra_grad: Tensor | None,  # [F, D]
    sums: Tensor,  # [F]
    cached: Tensor,
    cache_slots: Tensor,
    grad_scale: Tensor,  # 0-d
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    project: bool,
    unit_norm: bool,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
    precision: str,
) -> None:
    """One step of every row from the factors of its gradient, in torch.optim.AdamW's order."""
    factors = (latent_offsets, rows, coefficients, dense, shift)
    grad, _ = _row_gradients(*factors, extra_grad, W if project else None)
    grad.mul_(grad_scale)
    W.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    W.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if unit_norm:
        normalize_rows_(W)
    # The reference's own encoder copy is empty; only a rounded W_dec is there to be refreshed.
    if rounded is not None and rounded.shape == W.shape:
        rounded.copy_(W)


def normalize_rows_(W: Tensor) -> None:  # [F, D]
    """Divide every row by its L2 norm, or by 1e-12 where that is larger."""
    W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min(_SMALLEST_NORM))


def decorrelation(W: Tensor) -> tuple[Tensor, Tensor]:  # [F, D]
    """The sum over i != j of (ŵ_i·ŵ_j)² and its gradient, by the D×D Gram matrix.

    With S = ŴᵀŴ the sum over all pairs is |S|², from which the diagonal |ŵ_j|⁴ is taken off.
    """
    norms = torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min(_SMALLEST_NORM)
    unit = W / norms
    gram = unit.t() @ unit
    squared = unit.square().sum(1, keepdim=True)
    # Both terms are near F²/D; their difference needs the wider sum.
    loss = gram.double().square().sum() - squared.double().square().sum()
    grad = (unit @ gram).sub_(squared * unit).mul_(4)
    along = (grad * unit).sum(1, keepdim=True)
    return loss.to(W.dtype), grad.sub_(along * unit).div_(norms)


def _chunks(count: int, width: int) -> Iterator[slice]:
    """Slices that cover range(count), each of a bounded number of elements of the given width."""
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _pre_activations(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    precision: str,
) -> Iterator[tuple[slice, Tensor]]:
    """(x - b_dec) W_encᵀ + b_enc, some rows at a time."""
    rounded = ROUNDED_DTYPES.get(precision)
    weights = W_enc if rounded is None else W_enc.to(rounded).to(W_enc.dtype)
    for rows in _chunks(x.size(0), W_enc.size(0)):
        centred = x[rows] - b_dec
        if rounded is not None:
            centred = centred.to(rounded).to(x.dtype)
        yield rows, (centred @ weights.t()).add_(b_enc)


class _AuxCode:
    """The k_aux largest among the dead latents of every row; (0, 0) where there are fewer."""

    def __init__(self, x: Tensor, dead_mask: Tensor | None, k_aux: int) -> None:
        self.values = x.new_zeros(x.size(0), k_aux)
        self.indices = x.new_zeros(x.size(0), k_aux, dtype=torch.int32)
        self._dead = None if dead_mask is None else dead_mask.nonzero().flatten()

    def fill(self, rows: slice, pre_acts: Tensor) -> None:
        k_aux = self.values.size(1)
        if self._dead is None or k_aux == 0:
            return
        width = min(k_aux, self._dead.numel())
        top, chosen = _largest(pre_acts[:, self._dead], width)
        self.values[rows, :width] = _relu(top)
        self.indices[rows, :width] = self._dead[chosen].int()


def _largest(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row: value descending, equal values by ascending index, NaN first."""
    pre_acts = pre_acts + 0.0  # -0 becomes +0: a radix sort would tell them apart
    values, indices = pre_acts.topk(k, dim=1)
    if k == 0:
        return values, indices
    # topk breaks ties as it likes. Where exactly k values reach the k-th, the set is right and only
    # its order is open; the other rows go through a stable sort of the whole row.
    indices, by_index = indices.sort(dim=1)
    values, order = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    unsure = (~(pre_acts < values[:, -1:])).sum(1) != k  # NaN is not below anything
    if bool(unsure.any()):
        everything, order = pre_acts[unsure].sort(dim=1, descending=True, stable=True)
        values[unsure], indices[unsure] = everything[:, :k], order[:, :k]
    return values, indices


def _relu(values: Tensor) -> Tensor:
    """ReLU that keeps NaN and never returns -0."""
    return torch.where((values > 0) | values.isnan(), values, torch.zeros_like(values))


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
    for part in _chunks(latents.numel(), dense.size(1)):
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
