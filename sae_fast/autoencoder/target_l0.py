"""A sparsity coefficient and a shift of all thresholds, which lead a training to a wanted L0.

The coefficient is found as a factor of the given one. Its logarithm is moved by the logarithm of
L0 / target after every step: proportionally, which damps, and integrated, which ends at the target.
But it acts through many steps of the optimiser, and not at all once the learning rate has fallen.

The shift acts at once: the thresholds of all latents rise while more latents are active than is
wanted. Where pre-activations above a threshold exceed it by m on average, a shift of m changes the
logarithm of L0 by about 1, exactly with an exponential tail.

All numbers are on the device, so the host does not wait for them, and a resumed run continues as it
would have.
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
_SHIFT = 0.1  # share of the error in log L0 that a step's shift takes away


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
        rate: of the integral: so far it moves in a step whose L0 is off by 10 % or more.
        is_on: while the sparsity terms warm up L0 says nothing about their coefficient.
    """
    error = (l0 / target).log()
    bound = math.log(LARGEST_SCALE)
    # The shift leaves the share `_SHIFT` of what a wrong coefficient would make of the L0.
    lasting = (error / _SHIFT).clamp(-1, 1)
    integral = (own[_INTEGRAL] + rate * lasting).clamp(-bound, bound)
    damping = _PROPORTIONAL * error.clamp(-_WINDOW, _WINDOW)
    scale = (integral + damping).clamp(-bound, bound).exp()
    own[_INTEGRAL].copy_(torch.where(is_on, integral, own[_INTEGRAL]))
    own[SCALE].copy_(torch.where(is_on, scale, own[SCALE]))


def shift(
    l0: Tensor,  # 0-d
    target: float,
    d_sae: int,
    excess: Tensor,  # 0-d
    sparsity_weight: Tensor,  # 0-d
) -> Tensor:
    """Return by how much thresholds are to rise after a step, 0-d; 0 where that is not known.

    Args:
        l0: of all tokens of the step.
        target: the wanted L0.
        d_sae: the number of latents.
        excess: by how much the active pre-activations are above their thresholds, on average.
        sparsity_weight: while it is below 1 the wanted L0 falls evenly, in its logarithm, from half
            of the latents, and an L0 below that is left alone. NaN: nothing moves.
    """
    missing = (1 - sparsity_weight) * math.log(max(d_sae / 2 / target, 1.0))
    error = ((l0 / target).log() - missing).clamp(-_WINDOW, _WINDOW)
    error = torch.where(sparsity_weight < 1, error.clamp_min(0), error)
    rise: Tensor = _SHIFT * error * excess
    return torch.where(torch.isfinite(rise), rise, 0.0)


def saturation(scale: float, coefficient: float, target: float) -> str | None:
    """Return a warning when the factor has reached a bound; else None."""
    if (1 + 1e-5) / LARGEST_SCALE < scale < (1 - 1e-5) * LARGEST_SCALE:
        return None
    side = "largest" if scale > 1 else "smallest"
    return (
        f"target_l0 = {target:g} is out of reach: the sparsity coefficient is at the {side} that "
        f"l1_penalty_coeff = {coefficient:g} allows ({coefficient * scale:g})"
    )
