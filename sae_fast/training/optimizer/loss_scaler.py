"""Loss scaling for fp16: gradients too small for half precision are scaled up, overflows skipped.

The rule is the one of torch.amp.GradScaler. The numbers stay on the device, where the step needs
them: an update never waits to see whether the gradient overflowed.
"""

import torch
from torch import Tensor

GROWTH_INTERVAL = 2000
_SMALLEST_SCALE = 2.0**-14


class LossScaler:
    """The scale by which the loss is multiplied; 1 and constant unless `enabled`.

    Attributes:
        scale: 0-d float32, whether or not it is in use.
        steps_since_overflow: 0-d int64.
        skipped_steps: 0-d int64.
    """

    def __init__(self, enabled: bool, device: torch.device | str = "cpu") -> None:
        self.enabled = enabled
        self.scale = torch.full((), 2.0**16, dtype=torch.float32, device=device)
        self.steps_since_overflow = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._one = torch.ones((), dtype=torch.float32, device=device)

    @property
    def factor(self) -> Tensor:
        """The factor of the loss: 0-d, the same tensor in every step."""
        return self.scale if self.enabled else self._one

    @torch.no_grad()
    def update(
        self,
        norm: Tensor,  # 0-d, of the gradient
    ) -> None:
        """Lower the scale by half where the norm is not finite; double it after 2000 that were."""
        if not self.enabled:
            return
        fits = norm.isfinite()
        self.steps_since_overflow.add_(1).mul_(fits)
        grows = self.steps_since_overflow == GROWTH_INTERVAL
        self.steps_since_overflow.mul_(~grows)
        self.skipped_steps.add_(~fits)
        smaller = (self.scale / 2).clamp_min(_SMALLEST_SCALE)
        doubled = self.scale * 2
        # As in torch, never to infinity, from which halving does not lead back.
        larger = torch.where(grows & doubled.isfinite(), doubled, self.scale)
        self.scale.copy_(torch.where(fits, larger, smaller))

    def state(self) -> dict[str, float]:
        """Return the values that a checkpoint holds, as plain numbers; waits for the device."""
        return {
            "enabled": self.enabled,
            "scale": float(self.scale),
            "steps_since_overflow": int(self.steps_since_overflow),
            "skipped_steps": int(self.skipped_steps),
        }

    def load(self, state: dict[str, float]) -> None:
        """Take over the values of a checkpoint; whether scaling is on is this run's own choice."""
        self.scale.fill_(state["scale"])
        self.steps_since_overflow.fill_(int(state["steps_since_overflow"]))
        self.skipped_steps.fill_(int(state["skipped_steps"]))
