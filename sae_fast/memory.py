"""Test allocations ahead of libraries that end the process where they get no memory."""

from __future__ import annotations

import mmap

# Memory of HDF5 and safetensors beside the numbers they read or write. HDF5 2.0 dereferences null
# where the 0.6 MB of a file's cache are refused, Rust aborts where any memory is.
LIBRARY_BYTES = 8 << 20


def require_memory(size: int = LIBRARY_BYTES) -> None:
    """Raise MemoryError unless the system gives this process `size` bytes more just now.

    Nothing stays allocated, and no page of it is touched, so that it takes some microseconds.
    """
    try:
        mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        raise MemoryError(f"{size:,} bytes more are needed") from error
