"""Signum on dense gradients, as an optimiser of torch: what torch.optim does not have."""

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
