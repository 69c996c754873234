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
    numbers = (
        *(factor / loss_scale.double(), 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2),
        *(lr / (1 - beta1**step), (1 - beta2**step).sqrt(), eps),
    )
    scalars = torch.stack([torch.as_tensor(n, dtype=lr.dtype, device=lr.device) for n in numbers])
    return rounded_norm, torch.where(updates, scalars, torch.nan).to(loss_scale.dtype)


def update_vector_(
    w: Tensor,
    exp_avg: Tensor,  # the shape of w
    exp_avg_sq: Tensor,  # the shape of w
    grad: Tensor | None,  # the shape of w
    scalars: Tensor,  # [8]
) -> None:
    """One step in torch.optim.AdamW's order; nothing where the scale is not finite."""
    scale, decay, rest1, beta2, rest2, step_size, correction, eps = scalars.tolist()
    if not math.isfinite(scale):
        return
    grad = torch.zeros_like(w) if grad is None else grad * scale
    w.mul_(decay)
    exp_avg.lerp_(grad, rest1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=rest2)
    w.addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(correction).add_(eps), value=-step_size)
