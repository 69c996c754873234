"""Peak memory of a process since a chosen moment: resident, or allocated on a CUDA device.

Linux reports the peak since that moment; other systems only since the start of the process.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from pathlib import Path
from typing import Protocol

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Peak(Protocol):
    """A moment since which memory is counted."""

    def above(self) -> int:
        """Return the bytes between the state at the start and the highest state since then."""


def peak_since_now(device: torch.device) -> Peak:
    """Start to count memory on the device that holds the tensors."""
    return PeakMemory() if device.type == "cpu" else CudaPeakMemory(device)


class CudaPeakMemory:
    """The growth of torch's allocated memory on a device from now on, without cached memory."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        self.device = device
        self.start = torch.cuda.memory_allocated(device)

    def above(self) -> int:
        """Return the bytes between the state at the start and the highest state since then."""
        return max(0, torch.cuda.max_memory_allocated(self.device) - self.start)


class PeakMemory:
    """The growth of this process's resident memory from now on."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # resets the kernel's high-water mark of this process
        self.start = peak_bytes()

    def above(self) -> int:
        """Return the bytes between the state at the start and the highest state since then."""
        return max(0, peak_bytes() - self.start)


def available_bytes(device: torch.device) -> int:
    """Return the bytes that new processes can use; on a CPU without making others swap."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_bytes() -> int:
    """Return the highest resident memory since the last reset, in bytes."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
