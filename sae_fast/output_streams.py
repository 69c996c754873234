"""Output streams of a command, which works to its end also when they are closed.

When the reader of a pipe ends first, as `… | head` does, the next print ends a Python program with
a BrokenPipeError; a stream that was closed from the start is None, which progress bars do not
expect.

Without memory, Python writes a traceback for each exception that it has to ignore: in a destructor,
or in C code that calls back, as a font library does. A command says in one line that it has no
memory, so these are left out; `memory_was_short` tells that there have been any.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator

_DESCRIPTORS = {"stdout": 1, "stderr": 2}
# Nothing reads the stream any more: no fault of what is written to it.
_GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET, errno.ESHUTDOWN)
EXIT_OUTPUT_LOST = 1


def run_command(main: Callable[[], int]) -> int:
    """Run the `main` of a command on streams that never fail; return its exit code.

    Output that is lost because its reader has gone or its stream was closed changes nothing. Where
    it is lost for another reason, a full disk for one, a line on stderr says so and a code of 0
    becomes 1. Characters that a stream's encoding lacks are written as escapes.
    """
    files = {name: _replace_stream(name, number) for name, number in _DESCRIPTORS.items()}
    try:
        with _without_ignored_memory_errors():
            code = main()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    for name, file in files.items():
        if file.error is not None and file.error.errno not in _GONE:
            print(f"error: {name}: {file.error.strerror}; output was lost", file=sys.stderr)
            code = code or EXIT_OUTPUT_LOST
    return code


def memory_was_short() -> bool:
    """Return whether a MemoryError was ignored in this process while a command ran."""
    return _SHORT.is_set()


_SHORT = threading.Event()


@contextlib.contextmanager
def _without_ignored_memory_errors() -> Iterator[None]:
    before = sys.unraisablehook

    def report(ignored: sys.UnraisableHookArgs) -> None:
        is_short = issubclass(ignored.exc_type, MemoryError)
        if is_short:
            _SHORT.set()
        # Nothing else says that a thread has ended.
        if not is_short or "thread" in (ignored.err_msg or ""):
            before(ignored)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = before


class _LastingFile(io.RawIOBase):
    """The file behind a stream; after the first failure everything written is dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: memoryview) -> int | None:  # type: ignore[override]
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            return None  # the buffer above waits
        except OSError as error:
            self.error = self.error or error
            _open_on(self._descriptor)  # for C code, which writes there too
            return len(data)


def _replace_stream(name: str, descriptor: int) -> _LastingFile:
    before = getattr(sys, name)
    if before is not None:
        with contextlib.suppress(OSError):
            before.flush()
        descriptor = before.fileno()
    elif not _is_open(descriptor):
        _open_on(descriptor)
    else:  # a file that was opened since has the number of the closed stream
        descriptor = os.open(os.devnull, os.O_WRONLY)
    file = _LastingFile(descriptor)
    stream = io.TextIOWrapper(
        io.BufferedWriter(file),  # type: ignore[type-var]
        encoding=getattr(before, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=getattr(before, "line_buffering", False),
        write_through=getattr(before, "write_through", False),
    )
    setattr(sys, name, stream)
    return file


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _open_on(descriptor: int) -> None:
    """Open a file that drops everything written to it on a descriptor."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
