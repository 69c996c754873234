"""The work of a training step beside the passes over the weights, in plain PyTorch."""

import torch
from torch import Tensor


def batch_statistics(
    squared_error: Tensor,  # [N]
    target: Tensor,  # [N, D]
    values: Tensor,  # any shape
    indices: Tensor,  # int32, the shape of values
    variance: Tensor | None,  # 0-d
    d_sae: int,
    is_signed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a batch's share of variance unexplained, L0 and variance, and which latents fired."""
    if variance is None:
        # The first row is as good as any: so the mean is not far from the origin.
        moved = target.double() - target[:1].double()
        found = moved.square().sum() - moved.sum(0).square().sum() / len(target)
        found = torch.where(found < 0, 0.0, found)
    else:
        found = variance.double()
    fires = (values.abs() if is_signed else values) > 0
    fired = torch.zeros(d_sae + 1, dtype=torch.bool, device=values.device)
    latents = torch.where(fires, indices, d_sae).flatten().long()
    fvu = squared_error.double().sum() / found
    l0 = fires.sum().to(squared_error.dtype) / squared_error.new_full((), len(squared_error))
    fired = fired.index_fill_(0, latents, True)[:-1].clone()
    return fvu.to(squared_error.dtype), l0, found.to(squared_error.dtype), fired


def code_gradients(
    residual_dot: Tensor,  # [N, K]
    values: Tensor,  # [N, K]
    grad_error: Tensor,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a squared error's gradients of a code's values, its coefficients and their scale."""
    scale = 2 * grad_error
    return residual_dot * scale[:, None], values * scale[:, None], scale


def weighted_row_sum(
    weights: Tensor,  # [M]
    matrix: Tensor,  # [M, D] float32, bfloat16 or float16
    factor: float,
) -> Tensor:
    """Return `factor` times the sum of a matrix's rows, each times its weight."""
    return (weights @ matrix.to(weights.dtype)) * factor


def add_squares_(
    total: Tensor,  # 0-d float64
    grad: Tensor,  # any shape
    second: Tensor | None = None,  # any shape
    more: Tensor | None = None,  # 0-d float64
) -> None:
    """Add a number and the sums of the squares of two tensors to `total`."""
    if more is not None:
        total.add_(more)
    total.add_(grad.double().square().sum())
    if second is not None:
        total.add_(second.double().square().sum())


def finish_step_(
    poison: Tensor,  # 0-d
    steps: Tensor,  # 0-d int64
    metrics: Tensor,  # [M + 2]
    tokens_since_fired: Tensor,  # [F] int64
    fault: Tensor | None,  # 0-d
    losses: Tensor,  # [M]
    norm: Tensor,  # 0-d
    variance: Tensor,  # 0-d
    fired: Tensor,  # [F] bool
    n_tokens: int,
    norm_poisons: bool,
) -> None:
    """Write down a training step: its metrics, whether it failed, and how long latents are silent.

    Metrics are only written while no earlier step has failed.
    """
    was_healthy = poison == poison
    values = torch.cat([losses, norm[None], variance[None]])
    metrics.copy_(torch.where(was_healthy, values, metrics))
    steps.add_(was_healthy)
    if norm_poisons:
        poison.add_(0 * norm)
    poison.add_(0 * losses[:1].sum())
    if fault is not None:
        poison.add_(0 * fault)
    tokens_since_fired.add_(n_tokens).masked_fill_(fired, 0)
