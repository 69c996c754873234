"""How long the steps take, evaluations and checkpoints left out."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass
class Window:
    """The steps since the last row of metrics."""

    steps: int = 0
    seconds: float = 0.0
    stalled: float = 0.0


class Stopwatch:
    """Time between `resume` and `pause`.

    Both are called when the device has nothing left to do: on a GPU a step that was launched has
    not been made yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resumed: float | None = None

    def resume(self) -> None:
        """Starts, or goes on."""
        self._resumed = time.perf_counter()

    def pause(self) -> float:
        """Waits for the device; returns the seconds since `resume`, 0 when paused already."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        resumed, self._resumed = self._resumed, None
        return 0.0 if resumed is None else time.perf_counter() - resumed
