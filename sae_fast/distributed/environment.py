"""The place of this process among those that a launcher such as torchrun has started."""

from __future__ import annotations

import os
from typing import NamedTuple


class Place(NamedTuple):
    """The place of a process.

    Attributes:
        rank: its number.
        size: the number of processes.
        local_rank: its number on this machine; None where no launcher has started it.
        local_size: the number of processes on this machine.
    """

    rank: int
    size: int
    local_rank: int | None
    local_size: int


def launched() -> Place:
    """Return rank and number of processes as a launcher gives them, or one process alone."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ or not size.isdigit() or int(size) < 2:
        return Place(0, 1, None, 1)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Place(int(os.environ["RANK"]), int(size), local_rank, local_size)
