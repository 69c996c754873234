"""`TopEntries`: the entries with the largest priorities of each of many slots."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Priorities = npt.NDArray[np.int32]

EMPTY = -1  # priority and row of a place that holds nothing
MOST_ROWS = 1 << 32
_ROW_BITS = 32
_LAST_ROW = MOST_ROWS - 1


class TopEntries:
    """Keeps for each slot the `count` entries with the largest priorities, in O(slots · count).

    Of equal priorities the entries with the lower rows stay, and come first. Rows are added in
    ascending order, so the result does not depend on how entries are cut into calls.

    A slot has twice `count` places. It is sorted when all of them are taken, and its lower half is
    dropped; from then on only larger entries than the last one that stayed are taken.

    Attributes:
        least: [slots] int32: entries of a slot with this priority or a lower one are not kept.
        priorities: [slots, count] int32, descending, EMPTY at the end; complete after `merge`.
        rows: [slots, count] int64, EMPTY at the end; complete after `merge`.
    """

    def __init__(self, slots: int, count: int) -> None:
        self.least = np.full(slots, EMPTY, np.int32)
        self.priorities = np.full((slots, count), EMPTY, np.int32)
        self.rows = np.full((slots, count), EMPTY, np.int64)
        self._count = count
        # The priority in the upper half of a key, the row counted from the last one in the lower.
        self._keys = np.full((slots, 2 * count), EMPTY, np.int64)
        self._filled = np.zeros(slots, np.int64)

    def add(
        self,
        slots: Integers,  # [n] ascending
        priorities: Priorities,  # [n], at least 0
        rows: Integers,  # [n], below MOST_ROWS, ascending within a slot
    ) -> None:
        """Add entries; the ones that are too small already are not kept."""
        if not self._count:
            return
        places = 2 * self._count
        keys = (priorities.astype(np.int64) << _ROW_BITS) | (_LAST_ROW - rows)
        while slots.size:
            is_kept = priorities > self.least[slots]
            slots, priorities, keys = slots[is_kept], priorities[is_kept], keys[is_kept]
            place = self._filled[slots] + place_in_run(slots)
            is_placed = place < places
            touched, place = slots[is_placed], place[is_placed]
            self._keys[touched, place] = keys[is_placed]
            self._filled[touched] = place + 1  # of one slot in ascending order: the last one stays
            self._drop_lower_half(touched[place == places - 1])
            left = ~is_placed
            slots, priorities, keys = slots[left], priorities[left], keys[left]

    def merge(self) -> None:
        """Sort all slots; `priorities` and `rows` are complete then."""
        if not self._count:
            return
        self._drop_lower_half(np.arange(len(self._keys)))
        keys = self._keys[:, : self._count]
        is_empty = keys == EMPTY
        self.priorities = np.where(is_empty, EMPTY, keys >> _ROW_BITS).astype(np.int32)
        self.rows = np.where(is_empty, EMPTY, _LAST_ROW - (keys & _LAST_ROW))

    def _drop_lower_half(self, slots: Integers) -> None:
        """Sort slots, and keep their `count` largest entries."""
        count = self._count
        keys = np.sort(self._keys[slots])[:, ::-1][:, :count]
        self._keys[slots, :count] = keys
        self._keys[slots, count:] = EMPTY
        self._filled[slots] = np.minimum(self._filled[slots], count)
        self.least[slots] = keys[:, -1] >> _ROW_BITS  # EMPTY stays EMPTY


def place_in_run(
    numbers: Integers,  # [n] ascending
) -> Integers:
    """Return for each number how many equal ones are in front of it."""
    is_start = np.ones(len(numbers), bool)
    is_start[1:] = numbers[1:] != numbers[:-1]
    starts = np.flatnonzero(is_start)
    lengths = np.diff(np.append(starts, len(numbers)))
    places: Integers = np.arange(len(numbers)) - np.repeat(starts, lengths)
    return places


def priority_of(strengths: npt.NDArray[np.float32]) -> Priorities:
    """Return whole numbers that are ordered as these values, which are 0 or greater, are."""
    return np.ascontiguousarray(strengths, np.float32).view(np.int32)


def strengths_of(priorities: Priorities) -> npt.NDArray[np.float32]:
    """Return the values that have these priorities; 0 where a place holds nothing."""
    return np.where(priorities == EMPTY, 0, priorities).astype(np.int32).view(np.float32)


def hashed(numbers: Integers, seed: int) -> npt.NDArray[np.uint64]:
    """Return 64 random-looking bits for each number, by splitmix64; equal on every machine."""
    with np.errstate(over="ignore"):
        bits = numbers.astype(np.uint64) + np.uint64(((2 * seed + 1) * 0x9E3779B97F4A7C15) % 2**64)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: npt.NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed
