"""`TopEntries`: the entries with the largest priorities of each of many slots."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int64]
Priorities = npt.NDArray[np.int32]

EMPTY = -1  # priority and row of a place that holds nothing
_LARGEST = 2**31 - 1
_LEAST_PENDING = 1 << 16  # entries that wait before they are sorted in


class TopEntries:
    """Keeps for each slot the `count` entries with the largest priorities, in O(slots · count).

    Of equal priorities the entries that were added first stay, and come first: with rows in
    ascending order, the lower ones. So the result does not depend on how entries are cut into
    calls.
    """

    def __init__(self, slots: int, count: int) -> None:
        self.priorities = np.full((slots, count), EMPTY, np.int32)
        self.rows = np.full((slots, count), EMPTY, np.int64)
        self._pending: list[tuple[Integers, Priorities, Integers]] = []
        self._n_pending = 0

    def add(
        self,
        slots: Integers,  # [n]
        priorities: Priorities,  # [n], at least 0
        rows: Integers,  # [n], ascending within a slot
    ) -> None:
        """Add entries; the ones that are too small already are not kept."""
        if not self.priorities.size:
            return
        kept = np.flatnonzero(priorities > self.priorities[:, -1][slots])
        if not kept.size:
            return
        self._pending.append((slots[kept], priorities[kept], rows[kept]))
        self._n_pending += kept.size
        if self._n_pending > max(self.priorities.size, _LEAST_PENDING):
            self.merge()

    def merge(self) -> None:
        """Sort in what waits; `priorities` and `rows` are complete then."""
        if not self._pending:
            return
        waiting = np.concatenate([part[0] for part in self._pending])
        touched = np.flatnonzero(np.bincount(waiting))
        count = self.priorities.shape[1]
        old = np.repeat(touched, count)
        slots = np.concatenate([old, waiting])
        priorities = np.concatenate(
            [self.priorities[touched].ravel(), *(part[1] for part in self._pending)]
        )
        rows = np.concatenate([self.rows[touched].ravel(), *(part[2] for part in self._pending)])
        self._pending, self._n_pending = [], 0
        # By slot, then by descending priority; a stable sort keeps the order of equal ones.
        keys = (slots << 32) | (_LARGEST - priorities.astype(np.int64))
        order = torch.sort(torch.from_numpy(keys), stable=True).indices.numpy()
        slots = slots[order]
        begins = np.searchsorted(slots, touched)  # of at least `count` entries each
        chosen = order[(begins[:, None] + np.arange(count)).ravel()]
        self.priorities[touched] = priorities[chosen].reshape(-1, count)
        self.rows[touched] = rows[chosen].reshape(-1, count)


def priority_of(strengths: npt.NDArray[np.float32]) -> Priorities:
    """Return whole numbers that are ordered as these values, which are 0 or greater, are."""
    return np.ascontiguousarray(strengths, np.float32).view(np.int32)


def hashed(numbers: Integers, seed: int) -> npt.NDArray[np.uint64]:
    """Return 64 random-looking bits for each number, by splitmix64; equal on every machine."""
    with np.errstate(over="ignore"):
        bits = numbers.astype(np.uint64) + np.uint64(((2 * seed + 1) * 0x9E3779B97F4A7C15) % 2**64)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: npt.NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed
