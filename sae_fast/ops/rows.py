"""Ops on whole rows of a weight matrix: sums over the entries of a latent, and the update."""

import torch
from torch import Tensor

from sae_fast.ops.library import dynamic_size, fake, refuse_backward
from sae_fast.ops.update_checks import UPDATE_SCALARS
from sae_fast.ops.working_copies import copies_to_refresh, mark_updated

# Rows of partial sums in weighted_row_sum: enough for any number of threads, and fixed, so that the
# order of the sum does not depend on theirs.
_PARTIAL_SUMS = 64


@torch.no_grad()
def accumulate_rows(
    coefficients: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32, the shape of coefficients
    offsets: Tensor | None,  # [N + 1] int64
    dense: Tensor,  # [N, D]
    d_sae: int,
) -> tuple[Tensor, Tensor]:
    """Per latent: the sum of coefficient * dense[n], [d_sae, D], and the sum of coefficients."""
    op = torch.ops.sae_fast.accumulate_rows.default
    rows, sums = op(coefficients, indices, offsets, dense, d_sae)
    return rows, sums


@fake("accumulate_rows")
def _(
    coefficients: Tensor, indices: Tensor, offsets: Tensor | None, dense: Tensor, d_sae: int
) -> tuple[Tensor, Tensor]:
    return coefficients.new_empty(d_sae, dense.size(1)), coefficients.new_empty(d_sae)


refuse_backward("accumulate_rows")


def weighted_row_sum(
    weights: Tensor,  # [M]
    matrix: Tensor,  # [M, D]
) -> Tensor:
    """The sum over m of weights[m] * matrix[m], [D]; the same bits for any number of threads."""
    n_rows = weights.size(0)
    blocks = torch.arange(_PARTIAL_SUMS + 1, device=weights.device)
    offsets = blocks * n_rows // _PARTIAL_SUMS
    indices = torch.arange(n_rows, dtype=torch.int32, device=weights.device)
    partial = torch.ops.sae_fast.decode.default(weights, indices, offsets, matrix, None)
    total: Tensor = partial.sum(0)
    return total


@torch.no_grad()
def latent_major(
    values: Tensor,  # [N, K], or [nnz] with offsets
    indices: Tensor,  # int32, the shape of values
    offsets: Tensor | None,  # [N + 1] int64
    d_sae: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries with a value other than 0, by latent: (latent_offsets, entries, rows).

    latent_offsets [d_sae + 1] int64; entries, flat positions in values, and their rows n, int32;
    inside a latent they ascend.
    """
    op = torch.ops.sae_fast.latent_major.default
    latent_offsets, entries, rows = op(values, indices, offsets, d_sae)
    return latent_offsets, entries, rows


@fake("latent_major")
def _(
    values: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int
) -> tuple[Tensor, Tensor, Tensor]:
    active = dynamic_size()
    latent_offsets = indices.new_empty(d_sae + 1, dtype=torch.int64)
    return latent_offsets, indices.new_empty(active), indices.new_empty(active)


refuse_backward("latent_major")


@torch.no_grad()
def gather_entries(
    source: Tensor,
    entries: Tensor,  # [M] int32
) -> Tensor:
    """The numbers at these flat positions of `source`, in their order, [M]."""
    ordered: Tensor = torch.ops.sae_fast.gather_entries.default(source, entries)
    return ordered


@fake("gather_entries")
def _(source: Tensor, entries: Tensor) -> Tensor:
    return source.new_empty(entries.size(0))


refuse_backward("gather_entries")


@torch.no_grad()
def latent_sums(
    latent_offsets: Tensor,  # [F + 1] int64
    entries: Tensor,  # [entries] int32
    coefficients: Tensor,
) -> Tensor:
    """Per latent: the sum of the coefficients at the flat positions of its entries, [F]."""
    sums: Tensor = torch.ops.sae_fast.latent_sums.default(latent_offsets, entries, coefficients)
    return sums


@fake("latent_sums")
def _(latent_offsets: Tensor, entries: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients.new_empty(latent_offsets.size(0) - 1)


refuse_backward("latent_sums")


@torch.no_grad()
def row_gradient_norm(
    latent_offsets: Tensor,  # [F + 1] int64
    rows: Tensor,  # [entries] int32
    coefficients: Tensor,  # [entries], latent-major
    dense: Tensor,  # [N, D]
    shift: Tensor | None = None,  # [D]
    project_onto: Tensor | None = None,  # [F, D], unit rows
    extra_grad: Tensor | None = None,  # [F, D]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The squared norm of a factored gradient, and what `fused_update_` wants to know of it.

    Row j is g_j = Σ_p coefficients[p] · (dense[rows[p]] − shift) + extra_grad[j], less its part
    along project_onto[j]. Returns Σ_j |g_j|² (0-d float64), the coefficient sums [F], and two
    tensors for `fused_update_`: gradient rows that were kept, and where.
    """
    op = torch.ops.sae_fast.row_gradient_norm.default
    squared_norm, sums, cached, cache_slots = op(
        latent_offsets, rows, coefficients, dense, shift, project_onto, extra_grad
    )
    return squared_norm, sums, cached, cache_slots


@fake("row_gradient_norm")
def _(
    latent_offsets: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    dense: Tensor,
    shift: Tensor | None,
    project_onto: Tensor | None,
    extra_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_sae = latent_offsets.size(0) - 1
    return (
        coefficients.new_empty((), dtype=torch.float64),
        coefficients.new_empty(d_sae),
        coefficients.new_empty(dynamic_size(), dense.size(1)),
        rows.new_empty(d_sae),
    )


refuse_backward("row_gradient_norm")


@torch.no_grad()
def update_scalars(
    squared_norm: Tensor,  # 0-d float64
    lr: Tensor,  # 0-d float64
    loss_scale: Tensor,  # 0-d
    step_count: Tensor,  # 0-d int64
    halted: Tensor,  # 0-d int64
    *,
    lr_squares: Tensor | None = None,  # 0-d float64, of schedule_free_signum
    rule: str = "adam",
    grad_clip: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip_overflow: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient's norm (0-d), and what an update needs to know of it: scalars [11].

    `rule` is that of the update, "adam", "sgd", "signum" or "schedule_free_signum"; `beta1` is the
    momentum of the others, which have no use for `beta2` and `eps`.

    `squared_norm` is that of the gradients of `loss_scale` times the loss. A finite norm counts a
    step: `step_count` goes up by one. With one that is not, updates with these scalars change
    nothing; and unless `skip_overflow`, `halted` becomes the number of steps made so far, and no
    later step changes anything either. Negative, it says that this has not happened.
    `lr_squares` goes up by lr² with `step_count`: the weights of the average so far.
    """
    op = torch.ops.sae_fast.update_scalars.default
    norm, scalars = op(
        *(squared_norm, lr, loss_scale, step_count, halted, lr_squares, rule),
        *(grad_clip, beta1, beta2, eps, weight_decay, skip_overflow),
    )
    written = (step_count, halted, lr_squares)
    torch.autograd.graph.increment_version([one for one in written if one is not None])
    return norm, scalars


@fake("update_scalars")
def _(squared_norm: Tensor, lr: Tensor, loss_scale: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return loss_scale.new_empty(()), loss_scale.new_empty(UPDATE_SCALARS)


@torch.no_grad()
def fused_update_(
    W: Tensor,  # [F, D]
    exp_avg: Tensor,  # [F, D] float32, bfloat16 or uint8
    exp_avg_sq: Tensor | None,  # [F, D], the dtype of exp_avg; of adam
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
    *,
    rule: str = "adam",
    project: bool,
    unit_norm: bool,
    precision: str,
    exp_avg_scale: Tensor | None = None,  # [F, ceil(D / 256)], of uint8
    exp_avg_sq_scale: Tensor | None = None,  # [F, ceil(D / 256)], of uint8
    step_count: Tensor | None = None,  # 0-d int64, of bfloat16 and uint8
) -> None:
    """One optimiser step of W, row by row, from the factors of its gradient.

    The gradient g is that of `row_gradient_norm` (projected onto W's own rows if `project`),
    clipped as `scalars` of `update_scalars` for the same `rule` say; then the step of the rule:

    - "adam" exactly as torch.optim.AdamW;
    - "sgd" exactly as torch.optim.SGD, neither dampened nor Nesterov's:
      m ← β₁·m + (g + weight_decay·W), W ← W − lr·m;
    - "signum" (Bernstein et al. 2018, arXiv:1802.04434) with decoupled weight decay:
      m ← β₁·m + (1 − β₁)·g, W ← (1 − lr·weight_decay)·W − lr·sign(m);
    - "schedule_free_signum" (Defazio et al. 2024, arXiv:2405.15682, round sign descent): W is the
      point y = (1 − β₁)·z + β₁·x between the walk z and its average x, `exp_avg` is e = z − y. With
      d = sign(g) + weight_decay·y, u = e − lr·β₁·d and c = lr² / Σ lr² (of `lr_squares`):
      y ← y − lr·(1 − β₁)·d + c·u, e ← (1 − c)·u. What is to be evaluated is x = y − (1 − β₁)/β₁·e;

    then, if `unit_norm`, rows of unit length (and e divided by the same). m is `exp_avg`; only
    "adam" has `exp_avg_sq`. `sums`, `cached` and `cache_slots` come from `row_gradient_norm` of the
    same factors. The working copy of W in this precision, if there is one, is refreshed in the same
    pass. Nothing changes where the gradient's norm was not finite.

    Moments in bfloat16, or in 8 bits with one scale for 256 columns (`moments.py`), are float32 for
    the time of the update and then rounded at random: up as often as keeps the mean. What is drawn
    depends on `step_count`, as update_scalars left it, row and column alone.
    """
    packed, stats, rounded = copies_to_refresh(W, precision)
    torch.ops.sae_fast.fused_update_.default(
        *(W, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale),
        *(latent_offsets, rows, coefficients, dense, shift, extra_grad),
        *(sums, cached, cache_slots, scalars, step_count, rule, project, unit_norm),
        *(packed, stats, rounded, precision),
    )
    mark_updated(W, packed, stats, rounded)


@fake("fused_update_")
def _(*arguments: object) -> None:
    return None


@torch.no_grad()
def update_vector_(
    w: Tensor,
    exp_avg: Tensor,  # the shape of w
    exp_avg_sq: Tensor | None,  # the shape of w; of adam
    grad: Tensor | None,  # the shape of w; None: zeros
    scalars: Tensor,  # [11]
    *,
    rule: str = "adam",
) -> None:
    """The step of `fused_update_` for a parameter whose gradient is at hand."""
    torch.ops.sae_fast.update_vector_.default(w, exp_avg, exp_avg_sq, grad, scalars, rule)
    mark_updated(w)


@fake("update_vector_")
def _(*arguments: object) -> None:
    return None


@torch.no_grad()
def normalize_rows_(
    W: Tensor,  # [F, D]
) -> None:
    """Scale every row to unit L2 norm, in place: w / max(|w|, 1e-12)."""
    torch.ops.sae_fast.normalize_rows_.default(W)
    mark_updated(W)


@fake("normalize_rows_")
def _(W: Tensor) -> None:
    return None
