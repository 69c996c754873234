"""The terms of the training loss, as pure functions: sums over d_in, means over tokens.

The squared errors come from `ops.reconstruct`; every function here is differentiable in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_fast import ops

_LP_SHIFT = 1e-3
_BLOCK = 4096  # entries that one thread sums; torch divides sums from 32,768 on


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of a batch: `total` to call backward on, `components` to log, `code` for statistics.

    The `*_loss` components carry their coefficients, so that they add up to `total`. All components
    are 0-d and detached, and so is `variance`, Σ (x − mean(x))², of a transcoder with its targets'
    variance added: not finite where a number of the batch is not. `fired` [F] bool says which
    latents fired.
    """

    total: Tensor
    components: dict[str, Tensor]
    code: ops.Code
    variance: Tensor
    fired: Tensor


def lp_loss(
    code: ops.Code,
    p: float,
    row_norms: Tensor | None = None,  # [F], of the decoder; None: all 1
) -> Tensor:
    """Return Σ_i a_i with a_i = f_i |W_dec,i|, averaged over tokens.

    With p below 1 it is the sum of (a_i + s)^p − s^p.

    Of a signed code f_i is a magnitude. With s = 1e-3 the slope at 0 is finite. Weighted by
    |W_dec,i|, the term does not change where a decoder row grows and its latent shrinks in return,
    which is how a free decoder would escape.
    """
    magnitudes = code.values.abs() if code.signed else code.values
    if isinstance(code, ops.DenseCode) and row_norms is not None and p == 1:
        # Sums over tokens first: neither this nor its gradient is a second [N, F].
        return deterministic_sum(magnitudes.sum(0) * row_norms) / code.n_rows
    amounts = magnitudes if row_norms is None else magnitudes * code.spread(row_norms)
    return deterministic_sum(lp_values(amounts, p)) / code.n_rows


def lp_values(amounts: Tensor, p: float) -> Tensor:
    """Return (a + s)^p − s^p of every amount, for p = 1 the amounts."""
    return amounts if p == 1 else (amounts + _LP_SHIFT).pow(p) - _LP_SHIFT**p


def aux_k_loss(
    squared_error: Tensor,  # [N], Σ_d (ê − e)², with ê the dead latents' model of the residual e
    residual: Tensor,  # [N, D], e or −e
    n_dead: Tensor,  # 0-d, so that the host does not wait for it
    full_k_aux: int,
    variance: Tensor | None = None,  # 0-d
) -> Tensor:
    """Return AuxK, arXiv:2406.04093: the share of the residual's variance that dead latents miss.

    Scaled down while fewer than `full_k_aux` latents are dead; 0 for a residual without variance.
    `variance` is the residual's total variance, which is measured where None is given. Of a batch
    that is one of n parts of a step it is the n-th part of the variance of all their rows.
    """
    residual = residual.detach().to(squared_error.dtype)
    variance = total_variance(residual) if variance is None else variance.to(residual.dtype)
    per_variance = inverse_variance(residual, variance)
    share = (n_dead.to(per_variance.dtype) / full_k_aux).clamp_max(1.0)
    return deterministic_sum(squared_error) * (share * per_variance)


def inverse_variance(
    x: Tensor,  # [N, D]
    variance: Tensor,  # 0-d, its total_variance
) -> Tensor:
    """Return the factor that makes a squared error a share of the variance; 0 without variance."""
    # Below this it is the rounding of the mean, and dividing by it would blow the term up.
    rounding = torch.finfo(x.dtype).eps * deterministic_sum(
        torch.linalg.vector_norm(x, dim=1).square()
    )
    return torch.where(variance <= rounding, 0.0, variance.reciprocal())


def batch_statistics(
    code: ops.Code,
    squared_error: Tensor,  # [N]
    target: Tensor,  # [N, D]
    variance: Tensor | None,  # 0-d
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `ops.batch_statistics` does, of any code and in any dtype."""
    floats = squared_error.dtype == target.dtype == torch.float32
    if isinstance(code, ops.SparseCode) and floats:
        return ops.batch_statistics(squared_error, target, code, variance)
    variance = total_variance(target) if variance is None else variance
    fvu = deterministic_sum(squared_error) / variance
    return fvu, ratio(code.n_active(), code.n_rows), variance, code.fired()


def ratio(
    count: Tensor,  # whole numbers
    of: int | Tensor,
) -> Tensor:
    """Divide whole numbers in float32, whatever torch's default dtype is."""
    return count.float() / of


def is_on_gpu(x: Tensor) -> bool:
    """Return whether a sum is made by a GPU, which has no threads whose number would count."""
    return x.is_cuda


def deterministic_sum(
    x: Tensor,  # any shape
) -> Tensor:
    """Return the sum of all entries, in an order that does not depend on the number of threads.

    torch splits a long sum between its threads, but never one row of a matrix.
    """
    if is_on_gpu(x):
        return x.sum()
    flat = x.flatten()
    whole = len(flat) // _BLOCK * _BLOCK
    if whole == 0:
        return flat.sum()
    return deterministic_sum(flat[:whole].view(-1, _BLOCK).sum(1)) + flat[whole:].sum()


def deterministic_mean(
    x: Tensor,  # [N]
) -> Tensor:
    """Return the mean, summed as by `deterministic_sum`."""
    return x.mean() if is_on_gpu(x) else deterministic_sum(x) / len(x)


_zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # kept by `constant_zero`


def constant_zero(like: Tensor) -> Tensor:
    """Return a 0 of the device and dtype of `like`, 0-d, which must not be changed.

    On a GPU it is one tensor, so that a step does not make a zero each time. One made while a CUDA
    graph is recorded would belong to the graph, and is not kept.
    """
    if not is_on_gpu(like):
        return like.new_zeros(())
    key = like.device, like.dtype
    if key in _zeros:
        return _zeros[key]
    with torch.inference_mode(False):
        zero = like.new_zeros(())
    if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        _zeros[key] = zero
    return zero


def moments(
    x: Tensor,  # [N, D]
) -> tuple[Tensor, Tensor]:
    """Return the mean [D] of rows and their `total_variance`, 0-d."""
    return x.mean(0), total_variance(x)


def pooled_variance(
    means: Sequence[Tensor],  # each [D]
    variances: Sequence[Tensor],  # each 0-d
    n_rows: int,
) -> Tensor:
    """Return Σ (x − mean(x))² over the rows of all parts, 0-d, by the `moments` of each.

    Args:
        means: of the parts.
        variances: of the parts.
        n_rows: of each part.
    """
    share = n_rows / (n_rows * len(means))
    centre = torch.stack([mean * share for mean in means]).sum(0)
    between = [n_rows * deterministic_sum((mean - centre).square()) for mean in means]
    return torch.stack([v + b for v, b in zip(variances, between, strict=True)]).sum()


def total_variance(
    x: Tensor,  # [N, D]
) -> Tensor:
    """Return Σ (x − mean(x))² over all entries, 0-d, the mean taken per dimension."""
    if is_on_gpu(x):  # in one pass
        return len(x) * torch.var(x, dim=0, correction=0).sum()
    mean = x.mean(0)
    # |x|² − N |mean|² writes nothing; where the mean is most of x it would cancel to rounding.
    total = deterministic_sum(torch.linalg.vector_norm(x, dim=1).square())
    centre = len(x) * deterministic_sum(mean.square())
    if bool(centre < 0.5 * total):
        return total - centre
    return deterministic_sum((x - mean).square_())
