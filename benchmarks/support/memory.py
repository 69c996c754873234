"""Peak resident memory of a process since a chosen moment (Linux; elsewhere since its start)."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Remembers the resident memory now; `above()` tells how far the peak rose since."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # resets the kernel's high-water mark of this process
        self.start = peak_bytes()

    def above(self) -> int:
        """Bytes between the state at the start and the highest state since."""
        return max(0, peak_bytes() - self.start)


def available_bytes() -> int:
    """Memory that new processes can have without pushing others out."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_bytes() -> int:
    """The highest resident memory since the last reset."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
