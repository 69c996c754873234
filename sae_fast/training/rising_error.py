"""Notice a reconstruction error that rises and stays up, or stays above the error of the mean."""

from __future__ import annotations

import math
from collections import deque

_SMOOTHED = 5  # rows whose mean is compared, since batches differ
RISEN = 1.5  # times the lowest mean
DENSER = 1.05  # a code with an L0 so many times larger has a lower error by right
_LASTING = 10  # a rise is told when it has lasted for this fraction of the run


class RisingError:
    """Follow the error of a run from row to row.

    It is compared with the lowest one of codes that were not denser: while a penalty makes codes
    sparse the error rises, as it has to.

    Args:
        total_steps: of the run. What lasts for a tenth of them is no chance.

    Attributes:
        lowest: the error that the last one is well above, and its step; None unless that lasts.
        is_above_mean: whether the error has been above 1 for that long.
    """

    def __init__(self, total_steps: int) -> None:
        self._long = max(total_steps // _LASTING, 1)
        self._recent: deque[float] = deque(maxlen=_SMOOTHED)
        self._lowest: dict[int, tuple[float, int]] = {}  # by the logarithm of the L0
        self._rises_since: int | None = None
        self._above_since: int | None = None
        self.lowest: tuple[float, int] | None = None
        self.is_above_mean = False

    def add(self, step: int, error: float, l0: float) -> float:
        """Take in a row; return the mean error of the last rows."""
        self._recent.append(error)
        mean = sum(self._recent) / len(self._recent)
        self._above_since = self._since(self._above_since, step, holds=mean > 1)
        self.is_above_mean = self._lasts(self._above_since, step)
        place = math.floor(math.log(max(l0, 1e-3)) / math.log(DENSER))
        others = [found for key, found in self._lowest.items() if key <= place + 1]
        lowest = min(others, default=(math.inf, step))
        self._rises_since = self._since(self._rises_since, step, holds=mean > RISEN * lowest[0])
        self.lowest = lowest if self._lasts(self._rises_since, step) else None
        if len(self._recent) == _SMOOTHED:
            self._lowest[place] = min(self._lowest.get(place, (math.inf, step)), (mean, step))
        return mean

    def _since(self, since: int | None, step: int, *, holds: bool) -> int | None:
        """Return the first step of those up to this one at which something holds."""
        if not holds:
            return None
        return step if since is None else since

    def _lasts(self, since: int | None, step: int) -> bool:
        return since is not None and step - since >= self._long
