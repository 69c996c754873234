"""Signum on dense gradients, also schedule-free: what torch.optim does not have."""

from __future__ import annotations

from typing import Any

import torch


class Signum(torch.optim.Optimizer):
    """Steps of one size along the sign of a momentum.

    m ← β·m + (1 − β)·g, w ← (1 − lr·weight_decay)·w − lr·sign(m): algorithm 2 of Bernstein et al.
    2018, "signSGD: Compressed Optimisation for Non-Convex Problems" (arXiv:1802.04434), its weight
    decay decoupled.

    Args:
        params: parameters or groups of them.
        lr: learning rate, the size of every step.
        momentum: β.
        weight_decay: per step and unit of learning rate.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, and its state "exp_avg"."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(state["exp_avg"].sign(), alpha=-group["lr"])


class ScheduleFreeSignum(torch.optim.Optimizer):
    """Sign descent on z, averaged in x, with gradients at y = (1 − β)·z + β·x.

    z ← z − lr·(sign(g) + weight_decay·y), x ← (1 − c)·x + c·z: Defazio et al. 2024, "The Road Less
    Scheduled" (arXiv:2405.15682), round the step of signSGD. A parameter holds y, and its state
    "z_minus_y" the rest: with d = sign(g) + weight_decay·y and u = (z − y) − lr·β·d,
    y ← y − lr·(1 − β)·d + c·u, z − y ← (1 − c)·u. The result is x = y − (1 − β)/β·(z − y).

    Args:
        params: parameters or groups of them.
        lr: learning rate, the size of every step of z.
        momentum: β, above 0: where x cannot be told from y and z otherwise.
        weight_decay: per step and unit of learning rate.
        average_share: c, set before every step: its lr² over the sum of lr² of all steps so far,
            so that c = 1 at the first.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        average_share: float = 1.0,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**options, "average_share": average_share})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, and its state "z_minus_y"."""
        for group in self.param_groups:
            lr, beta, share = group["lr"], group["momentum"], group["average_share"]
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if "z_minus_y" not in state:
                    state["z_minus_y"] = torch.zeros_like(y)
                direction = y.grad.sign().add_(y, alpha=group["weight_decay"])
                moved = state["z_minus_y"].sub_(direction, alpha=lr * beta)
                y.sub_(direction, alpha=lr * (1 - beta)).add_(moved, alpha=share)
                moved.mul_(1 - share)
