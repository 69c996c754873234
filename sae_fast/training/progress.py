"""The progress bar of a run, its lines where there is no terminal, and how long steps take."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from sae_fast.training.metrics import Row

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


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


class Progress:
    """Shows tokens/s, loss, FVU, L0, dead or silent latents, reader stall and the time left.

    Args:
        total_tokens: tokens of the whole run.
        tokens: tokens already seen, when resuming.
        shown: False shows nothing.
    """

    def __init__(self, total_tokens: int, tokens: int, *, shown: bool) -> None:
        self._shown = shown
        self._bar = tqdm(
            total=total_tokens,
            initial=tokens,
            unit="tok",
            unit_scale=True,
            disable=not shown or not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self._last_line = time.monotonic()

    def advance(self, tokens: int) -> None:
        """Counts one step's tokens."""
        self._bar.update(tokens)

    def show(self, row: Row, *, last: bool = False, runs: int = 1) -> None:
        """Shows the figures of a logged step; those of several runs are their means."""
        text = _describe(row)
        if runs > 1:
            text = f"mean of {runs} trainings: {text}"
        self._bar.set_postfix_str(text, refresh=False)
        due = time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES
        if self._shown and self._bar.disable and (due or last):
            self._last_line = time.monotonic()
            rate = row.get("tokens_per_second", 0.0)
            logger.info("step %d: %s, %.0f tokens/s", row["step"], text, rate)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


def _describe(row: Row) -> str:
    parts = [
        ("loss {:.4g}", "loss", 1.0),
        ("FVU {:.4f}", "fvu", 1.0),
        ("L0 {:.1f}", "l0", 1.0),
        # The dead share is 0 until the tokens for which a latent must be silent have been seen.
        ("dead {:.1f} %", "dead_fraction", 100.0)
        if row.get("dead_fraction")
        else ("silent so far {:.1f} %", "silent_fraction", 100.0),
        ("stall {:.1f} %", "reader_stall_fraction", 100.0),
        ("held-out FVU {:.4f}", "heldout_fvu", 1.0),
    ]
    return ", ".join(text.format(row[name] * scale) for text, name, scale in parts if name in row)
