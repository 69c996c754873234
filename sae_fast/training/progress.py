"""The progress bar of a run, its lines where there is no terminal, and how long steps take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from sae_fast.log_output import BESIDE_BAR, has_log_file
from sae_fast.progress_bar import progress_bar
from sae_fast.training.metrics import Row

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Window:
    """The steps since the last row of metrics."""

    steps: int = 0
    seconds: float = 0.0
    stalled: float = 0.0


class StepClock:
    """The time that steps take, without evaluations and checkpoints.

    It runs between `resume` and `pause`. Call both when the device has nothing left to do: on a GPU
    a step that was launched has not been made yet.

    Attributes:
        seconds: of all steps of the run so far.
        stalled: the part of them in which steps waited for their batches.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = self.stalled = 0.0
        self._device = device
        self._resumed: float | None = None
        self._window = Window()

    def set(self, seconds: float, stalled: float) -> None:
        """Set both times, as a resumed run has them."""
        self.seconds, self.stalled = seconds, stalled

    def count_step(self) -> None:
        """Count one step."""
        self._window.steps += 1

    def resume(self) -> None:
        """Start the clock, or start it again."""
        self._resumed = time.perf_counter()

    def pause(self, take_stalled_seconds: Callable[[], float]) -> None:
        """Wait for the device and stop the clock; do nothing more if it stands already.

        Args:
            take_stalled_seconds: called when the device is done, returns for how many seconds steps
                have waited for their batches since its last call.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        resumed, self._resumed = self._resumed, None
        seconds = 0.0 if resumed is None else time.perf_counter() - resumed
        stalled = take_stalled_seconds()
        self.seconds += seconds
        self.stalled += stalled
        self._window.seconds += seconds
        self._window.stalled += stalled

    def take_window(self) -> Window:
        """Return the steps since the last call, and begin a new window."""
        window, self._window = self._window, Window()
        return window


class ProgressBar:
    """Context manager: a progress bar with tokens/s, loss, FVU, L0 and the time left.

    Where there is neither a terminal nor a notebook the figures are logged instead, a line every
    few seconds; a log file gets these lines in any case.

    Args:
        total_tokens: tokens of the whole run.
        tokens: tokens already seen, when resuming.
        shown: False shows nothing.
    """

    def __init__(self, total_tokens: int, tokens: int, *, shown: bool) -> None:
        self._shown = shown
        self._bar = progress_bar(
            total=total_tokens,
            initial=tokens,
            unit="tok",
            unit_scale=True,
            shown=shown,
            smoothing=0.1,
        )
        self._last_line = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def advance(self, tokens: int) -> None:
        """Count the tokens of one step."""
        self._bar.update(tokens)

    def show(self, rows: Sequence[Row], *, last: bool = False) -> None:
        """Show the figures of a step.

        Args:
            rows: the metrics that the trainings of a sweep have logged, of which means are shown,
                or the row of one training; empty ones are left out.
            last: whether it is the last step, of which a line is logged in any case.
        """
        logged = [row for row in rows if row]
        if not logged:
            return
        row = logged[0] if len(logged) == 1 else _mean(logged)
        text = _describe(row)
        if len(logged) > 1:
            text = f"mean of {len(logged)} trainings: {text}"
        self._bar.set_postfix_str(text, refresh=False)
        due = time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES
        is_logged = (self._shown and self._bar.disable) or has_log_file()
        if is_logged and (due or last):
            self._last_line = time.monotonic()
            rate = row.get("tokens_per_second", 0.0)
            beside = {BESIDE_BAR: not self._bar.disable}
            logger.info("step %d: %s, %.0f tokens/s", row["step"], text, rate, extra=beside)


def _mean(rows: Sequence[Row]) -> Row:
    """Return the mean of the figures of several trainings, which take their steps in turn.

    The tokens per second are added up, because each training measures the time of all of them.
    """
    names = [name for name in rows[0] if all(row.get(name) is not None for row in rows)]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    rate = sum(row.get("tokens_per_second", 0.0) for row in rows)
    return {**mean, "step": rows[0]["step"], "tokens_per_second": rate}


def _describe(row: Row) -> str:
    """Return the figures of a row as the progress bar has them."""
    parts = [
        ("loss {:.4g}", "loss", 1.0),
        ("FVU {:.4f}", "fvu", 1.0),
        ("L0 {:.1f}", "l0", 1.0),
        ("dead {:.1f} %", "dead_fraction", 100.0)
        if row.get("dead_fraction") is not None
        else ("silent so far {:.1f} %", "silent_fraction", 100.0),
        ("stall {:.1f} %", "reader_stall_fraction", 100.0),
        ("held-out FVU {:.4f}", "heldout_fvu", 1.0),
    ]
    shown = [part for part in parts if row.get(part[1]) is not None]
    return ", ".join(text.format(row[name] * scale) for text, name, scale in shown)
