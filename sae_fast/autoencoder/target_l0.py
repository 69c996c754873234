"""A controller that finds the sparsity coefficient for a wanted L0, as a factor of the given one.

Its logarithm is moved by the logarithm of L0 / target after every step: proportionally, which
damps, and integrated, which ends at the target. Both numbers are buffers on the device, so the
host does not wait for them, and a resumed run continues as it would have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCALE = "sparsity_scale"
_INTEGRAL = "sparsity_integral"
_WINDOW = 1.0  # of log(L0 / target): a step beyond a factor of e counts as one of e
_PROPORTIONAL = 0.3
LARGEST_SCALE = 1000.0  # and the smallest is its reciprocal


def start() -> dict[str, Tensor]:
    """Return the buffers: `sparsity_scale`, the factor, and `sparsity_integral`; both 0-d."""
    return {
        SCALE: torch.ones((), dtype=torch.float32),
        _INTEGRAL: torch.zeros((), dtype=torch.float32),
    }


def steer_(
    own: dict[str, Tensor],
    l0: Tensor,  # 0-d
    target: float,
    rate: float,
    is_on: Tensor,  # 0-d bool
) -> None:
    """Follow a step of training.

    Args:
        own: the buffers.
        l0: of all tokens of the step.
        target: the wanted L0.
        rate: of the integral: so far it moves in a step whose L0 is off by a factor of e.
        is_on: while the sparsity terms warm up L0 says nothing about their coefficient.
    """
    error = (l0 / target).log().clamp(-_WINDOW, _WINDOW)
    bound = math.log(LARGEST_SCALE)
    integral = (own[_INTEGRAL] + rate * error).clamp(-bound, bound)
    scale = (integral + _PROPORTIONAL * error).clamp(-bound, bound).exp()
    own[_INTEGRAL].copy_(torch.where(is_on, integral, own[_INTEGRAL]))
    own[SCALE].copy_(torch.where(is_on, scale, own[SCALE]))


def saturation(scale: float, coefficient: float, target: float) -> str | None:
    """Return a warning when the factor has reached a bound; else None."""
    if (1 + 1e-5) / LARGEST_SCALE < scale < (1 - 1e-5) * LARGEST_SCALE:
        return None
    side = "largest" if scale > 1 else "smallest"
    return (
        f"target_l0 = {target:g} is out of reach: the sparsity coefficient is at the {side} that "
        f"l1_penalty_coeff = {coefficient:g} allows ({coefficient * scale:g})"
    )
