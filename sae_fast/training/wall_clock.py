"""The time that passes while a process trains: the end of its share, and when checkpoints are due.

Step counts decide all else, so that a run gives the same results on a slower machine.
"""

from __future__ import annotations

import time

from sae_fast.config import TrainConfig


class WallClock:
    """The time since the trainer was made, and since its last checkpoint.

    Args:
        config: has `max_hours` and `checkpoint_minutes`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._max_hours, self._minutes = config.max_hours, config.checkpoint_minutes
        self._started = self._saved = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether `max_hours` have passed."""
        hours = (time.monotonic() - self._started) / 3600
        return self._max_hours is not None and hours >= self._max_hours

    @property
    def is_save_due(self) -> bool:
        """Whether `checkpoint_minutes` have passed since the last checkpoint."""
        minutes = (time.monotonic() - self._saved) / 60
        return self._minutes is not None and minutes >= self._minutes

    def note_save(self) -> None:
        """Count the minutes from now on: a checkpoint has been written."""
        self._saved = time.monotonic()
