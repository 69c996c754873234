"""The optimiser's step in plain PyTorch, as far as no weight row is concerned: see reference.py."""

import math

import torch
from torch import Tensor


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
) -> tuple[Tensor, Tensor]:
    """The gradient's norm, and the numbers of a step that do not depend on the parameter."""
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


def update_vector_(
    w: Tensor,
    exp_avg: Tensor,  # the shape of w
    exp_avg_sq: Tensor | None,  # the shape of w; of adam
    grad: Tensor | None,  # the shape of w
    scalars: Tensor,  # [11]
    rule: str,
) -> None:
    """One step, in the order of torch.optim; nothing where the scale is not finite."""
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
