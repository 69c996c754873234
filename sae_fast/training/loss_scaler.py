"""Loss scaling for fp16: gradients too small for half precision are scaled up, overflows skipped.

The rule is that of torch.amp.GradScaler, kept as plain numbers so that it goes into a checkpoint.
"""

from dataclasses import asdict, dataclass

GROWTH_INTERVAL = 2000


@dataclass
class LossScaler:
    """The scale by which the loss is multiplied; 1 and constant unless `enabled`."""

    enabled: bool
    scale: float = 2.0**16
    steps_since_overflow: int = 0
    skipped_steps: int = 0

    @property
    def factor(self) -> float:
        """What to multiply the loss with."""
        return self.scale if self.enabled else 1.0

    def update(self, overflowed: bool) -> None:
        """Halves the scale after an overflow, doubles it after 2000 steps without one."""
        if not self.enabled:
            return
        if overflowed:
            self.scale = max(self.scale / 2, 2.0**-14)
            self.steps_since_overflow = 0
            self.skipped_steps += 1
            return
        self.steps_since_overflow += 1
        if self.steps_since_overflow == GROWTH_INTERVAL:
            self.scale *= 2
            self.steps_since_overflow = 0

    def state(self) -> dict[str, float]:
        """The values that a checkpoint holds."""
        return asdict(self)

    def load(self, state: dict[str, float]) -> None:
        """Takes over the values of a checkpoint; whether scaling is on is this run's own choice."""
        self.scale = float(state["scale"])
        self.steps_since_overflow = int(state["steps_since_overflow"])
        self.skipped_steps = int(state["skipped_steps"])
