"""The optimizer's ops in plain PyTorch: a gradient's norm, a step's numbers, the step."""

import math

import torch
from torch import Tensor

from sae_fast.ops.reference.moments import (
    EXP_AVG,
    EXP_AVG_SQ,
    decode_moment,
    encode_moment_,
    moment_random,
)
from sae_fast.ops.reference.row_factors import sum_rows

_SMALLEST_NORM = 1e-12


def row_gradient_norm(
    latent_offsets: Tensor,  # [F + 1] int64
    rows: Tensor,  # [entries] int32
    coefficients: Tensor,  # [entries], latent-major
    dense: Tensor,  # [N, D]
    shift: Tensor | None,  # [D]
    project_onto: Tensor | None,  # [F, D], unit rows
    extra_grad: Tensor | None,  # [F, D]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a factored gradient's squared norm, its coefficient sums, and rows (here none)."""
    factors = (latent_offsets, rows, coefficients, dense, shift)
    grad, sums = _row_gradients(*factors, extra_grad, project_onto)
    norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
    cache_slots = rows.new_full((latent_offsets.numel() - 1,), -1)
    return norm.square(), sums, grad.new_empty(0, dense.size(1)), cache_slots


def update_scalars(
    squared_norm: Tensor,  # 0-d float64
    lr: Tensor,  # 0-d float64
    loss_scale: Tensor,  # 0-d
    step_count: Tensor,  # 0-d int64
    halted: Tensor,  # 0-d int64
    lr_squares: Tensor | None,  # 0-d float64, of schedule_free_signum
    rule: str,
    grad_clip: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip_overflow: bool,
    fault: Tensor | None = None,  # 0-d
    losses: Tensor | None = None,  # [M]
) -> tuple[Tensor, Tensor]:
    """Return the gradient's norm, and the numbers of a step that all parameters share."""
    if fault is not None:
        loss_scale = loss_scale + 0 * fault
    if losses is not None:
        loss_scale = loss_scale + 0 * losses[0]
    norm = squared_norm.sqrt() / loss_scale.double()
    rounded_norm = norm.to(loss_scale.dtype)
    updates = rounded_norm.isfinite() & (halted < 0)
    if not skip_overflow:
        halted.copy_(torch.where(updates | (halted >= 0), halted, step_count))
    step_count.add_(updates)
    factor = (grad_clip / (norm + 1e-6)).clamp_max(1.0) if grad_clip else torch.ones_like(norm)
    step = step_count.double()
    # decay, 1 - beta1, beta2, 1 - beta2, step size, root of the bias correction, eps, beta1, decay
    # of the gradient, share of the average: UpdateStep of csrc/kernels/common/update_rule.h
    numbers: tuple[float | Tensor, ...]
    if rule == "adam":
        step_size, correction = lr / (1 - beta1**step), (1 - beta2**step).sqrt()
        numbers = (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, step_size, correction, eps)
        numbers = (*numbers, 0.0, 0.0, 0.0)
    elif rule == "sgd":
        numbers = (1.0, 0.0, 0.0, 0.0, lr, 0.0, 0.0, beta1, weight_decay, 0.0)
    elif rule == "signum":
        numbers = (1 - lr * weight_decay, 1 - beta1, 0.0, 0.0, lr, 0.0, 0.0, 0.0, 0.0, 0.0)
    else:
        assert lr_squares is not None
        lr_squares.add_(torch.where(updates, lr * lr, 0.0))
        share = torch.where(lr_squares > 0, lr * lr / lr_squares, 0.0)
        numbers = (1.0, 1 - beta1, 0.0, 0.0, lr, 0.0, 0.0, beta1, weight_decay, share)
    numbers = (factor / loss_scale.double(), *numbers)
    scalars = torch.stack([torch.as_tensor(n, dtype=lr.dtype, device=lr.device) for n in numbers])
    return rounded_norm, torch.where(updates, scalars, torch.nan).to(loss_scale.dtype)


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
    """Update every row of W from the factors of its gradient, in the order of torch.optim."""
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


def update_vector_(
    w: Tensor,
    exp_avg: Tensor,  # the shape of w
    exp_avg_sq: Tensor | None,  # the shape of w; of adam
    grad: Tensor | None,  # the shape of w
    scalars: Tensor,  # [11]
    rule: str,
    second_w: Tensor | None = None,
    second_exp_avg: Tensor | None = None,  # the shape of second_w
    second_exp_avg_sq: Tensor | None = None,  # the shape of second_w; of adam
    second_grad: Tensor | None = None,  # the shape of second_w
) -> None:
    """Update w in the order of torch.optim; change nothing where the scale is not finite.

    With `second_w` update that too.
    """
    if second_w is not None:
        assert second_exp_avg is not None
        moments = second_exp_avg, second_exp_avg_sq
        update_vector_(second_w, *moments, second_grad, scalars, rule)
    scale, decay, rest1, beta2, rest2, *others = scalars.tolist()
    step_size, correction, eps, beta1, grad_decay, share = others
    if not math.isfinite(scale):
        return
    grad = torch.zeros_like(w) if grad is None else grad * scale
    if rule == "sgd":
        exp_avg.mul_(beta1).add_(grad.add(w, alpha=grad_decay))
        w.add_(exp_avg, alpha=-step_size)
        return
    if rule == "schedule_free_signum":
        direction = grad.sign().add_(w, alpha=grad_decay)
        moved = exp_avg.sub_(direction, alpha=step_size * beta1)
        w.sub_(direction, alpha=step_size * rest1).add_(moved, alpha=share)
        moved.sub_(moved, alpha=share)
        return
    w.mul_(decay)
    exp_avg.lerp_(grad, rest1)
    if rule == "signum":
        w.add_(exp_avg.sign(), alpha=-step_size)
        return
    assert exp_avg_sq is not None
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=rest2)
    w.addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(correction).add_(eps), value=-step_size)


def normalize_rows_(W: Tensor) -> None:  # [F, D]
    """Divide every row by its L2 norm, or by 1e-12 where that is larger."""
    W.div_(row_norms(W))


def row_norms(W: Tensor) -> Tensor:  # [F, D]
    """Return the L2 norm of every row, at least 1e-12, [F, 1]."""
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return norms.clamp_min(_SMALLEST_NORM)


def _row_gradients(
    latent_offsets: Tensor,  # [F + 1] int64
    rows: Tensor,  # [entries] int32
    coefficients: Tensor,  # [entries]
    dense: Tensor,  # [N, D]
    shift: Tensor | None,  # [D]
    extra_grad: Tensor | None,  # [F, D]
    project_onto: Tensor | None,  # [F, D]
) -> tuple[Tensor, Tensor]:
    """Return the dense gradient [F, D] from its factors, and the coefficient sums [F]."""
    d_sae = latent_offsets.numel() - 1
    latents = torch.arange(d_sae, device=rows.device)
    latents = latents.repeat_interleave(latent_offsets.diff(), output_size=rows.numel())
    grad, sums = sum_rows(coefficients, latents, rows, dense, shift, d_sae)
    if extra_grad is not None:
        grad.add_(extra_grad)
    if project_onto is not None:
        along = (grad * project_onto).sum(1, keepdim=True)
        grad.sub_(along * project_onto)
    return grad, sums


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
    """Update W with moments that are numbers, or codes that are decoded and encoded again."""
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
    """Update W, then normalize rows if `unit_norm`; exp_avg too where it is in units of W."""
    update_vector_(W, exp_avg, exp_avg_sq, grad, scalars, rule)
    if unit_norm:
        norms = row_norms(W)
        W.div_(norms)
        if rule == "schedule_free_signum":
            exp_avg.div_(norms)
