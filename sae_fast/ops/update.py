"""The optimizer's ops: a gradient's norm, the numbers of a step, and the step itself."""

import torch
from torch import Tensor

from sae_fast.ops.working_copies import copies_to_refresh, mark_updated


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
    """Return the squared norm of a factored gradient, and what `fused_update_` needs of it.

    Row j is g_j = Σ_p coefficients[p] · (dense[rows[p]] − shift) + extra_grad[j], minus its
    projection on project_onto[j]. Returns Σ_j |g_j|² (0-d float64), the coefficient sums [F], and
    two tensors for `fused_update_`: some of the gradient's rows, and where they are.
    """
    op = torch.ops.sae_fast.row_gradient_norm.default
    squared_norm, sums, cached, cache_slots = op(
        latent_offsets, rows, coefficients, dense, shift, project_onto, extra_grad
    )
    return squared_norm, sums, cached, cache_slots


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
    fault: Tensor | None = None,  # 0-d
    losses: Tensor | None = None,  # [M]
) -> tuple[Tensor, Tensor]:
    """Return the gradient's norm (0-d), and the numbers that every update of a step needs, [11].

    `squared_norm` belongs to the gradients of `loss_scale` times the loss. A finite norm counts a
    step: `step_count` goes up by one. If the norm is not finite, updates with these scalars change
    nothing; and unless `skip_overflow`, `halted` becomes the number of steps made so far, and no
    later step changes anything either. While `halted` is negative this has not happened.

    `rule` is the update's, "adam", "sgd", "signum" or "schedule_free_signum"; all but "adam" have
    the momentum `beta1` and ignore `beta2` and `eps`. `lr_squares` is for "schedule_free_signum"
    alone and grows by lr² with every counted step: the sum of the weights of its average.

    Where `fault` or the first of `losses` is given and not finite, the norm is NaN.
    """
    op = torch.ops.sae_fast.update_scalars.default
    norm, scalars = op(
        *(squared_norm, lr, loss_scale, step_count, halted, lr_squares, rule),
        *(grad_clip, beta1, beta2, eps, weight_decay, skip_overflow, fault, losses),
    )
    written = (step_count, halted, lr_squares)
    torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])
    return norm, scalars


@torch.no_grad()
def fused_update_(
    W: Tensor,  # [F, D]
    exp_avg: Tensor,  # [F, D] float32, bfloat16 or uint8
    exp_avg_sq: Tensor | None,  # [F, D], the dtype of exp_avg; only with adam
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
    exp_avg_scale: Tensor | None = None,  # [F, ceil(D / 256)], only with uint8
    exp_avg_sq_scale: Tensor | None = None,  # [F, ceil(D / 256)], only with uint8
    step_count: Tensor | None = None,  # 0-d int64, needed with bfloat16 and uint8
) -> None:
    """Make one optimizer step of W, row by row, from the factors of its gradient.

    The gradient g has the rows of `row_gradient_norm`, minus their projection on W's rows if
    `project`, times the clipping factor in `scalars`, which `update_scalars` made for the same
    `rule`. Then comes the step of the rule:

    - "adam" exactly as torch.optim.AdamW;
    - "sgd" exactly as torch.optim.SGD, neither dampened nor Nesterov's:
      m ← β₁·m + (g + weight_decay·W), W ← W − lr·m;
    - "signum" (Bernstein et al. 2018, arXiv:1802.04434) with decoupled weight decay:
      m ← β₁·m + (1 − β₁)·g, W ← (1 − lr·weight_decay)·W − lr·sign(m);
    - "schedule_free_signum" (Defazio et al. 2024, arXiv:2405.15682, round sign descent): W is the
      point y = (1 − β₁)·z + β₁·x between the walk z and its average x, `exp_avg` is e = z − y. With
      d = sign(g) + weight_decay·y, u = e − lr·β₁·d and c = lr² / Σ lr² (from `lr_squares`):
      y ← y − lr·(1 − β₁)·d + c·u, e ← (1 − c)·u. Evaluate x = y − (1 − β₁)/β₁·e;

    then, if `unit_norm`, every row is divided by its length (and e by the length of its row). m is
    `exp_avg`; only "adam" has `exp_avg_sq`. `sums`, `cached` and `cache_slots` come from
    `row_gradient_norm` of the same factors. The working copy of W in this precision, if there is
    one, is refreshed in the same pass. Nothing changes if the gradient's norm was not finite.

    Moments in bfloat16, or in 8 bits with one scale for 256 columns (`reference/moments.py`), are
    float32 during the update and then rounded at random, such that the mean is kept. The random
    bits depend on `step_count`, as update_scalars left it, on row and column alone.
    """
    packed, stats, rounded = copies_to_refresh(W, precision)
    torch.ops.sae_fast.fused_update_.default(
        *(W, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale),
        *(latent_offsets, rows, coefficients, dense, shift, extra_grad),
        *(sums, cached, cache_slots, scalars, step_count, rule, project, unit_norm),
        *(packed, stats, rounded, precision),
    )
    mark_updated(W, packed, stats, rounded)


@torch.no_grad()
def update_vector_(
    w: Tensor,
    exp_avg: Tensor,  # the shape of w
    exp_avg_sq: Tensor | None,  # the shape of w; only with adam
    grad: Tensor | None,  # the shape of w; None: zeros
    scalars: Tensor,  # [11]
    *,
    rule: str = "adam",
    second: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
) -> None:
    """Make the step of `fused_update_` for a parameter whose gradient is a tensor.

    `second` is w, exp_avg, exp_avg_sq and grad of a second one.
    """
    arguments = (w, exp_avg, exp_avg_sq, grad, scalars, rule)
    torch.ops.sae_fast.update_vector_.default(*arguments, *(second or (None,) * 4))
    mark_updated(w)
    if second is not None:
        mark_updated(second[0])


@torch.no_grad()
def normalize_rows_(
    W: Tensor,  # [F, D]
) -> None:
    """Scale every row to unit L2 norm, in place: w / max(|w|, 1e-12)."""
    torch.ops.sae_fast.normalize_rows_.default(W)
    mark_updated(W)
