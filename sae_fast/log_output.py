"""Log lines of the package: on stderr above a progress bar, and in a file.

A program that sets up `logging` itself gets the lines of the logger "sae_fast" there and nowhere
else. Where nothing is set up, as in a notebook, `show_log` lets the package show its own lines.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

_PACKAGE = logging.getLogger("sae_fast")
_FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"
BESIDE_BAR = "beside_bar"  # attribute of a record whose figures a progress bar shows already


class BarHandler(logging.Handler):
    """Writes log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, unless a progress bar shows what it says."""
        if not record.__dict__.get(BESIDE_BAR):
            tqdm.write(self.format(record), file=sys.stderr)


def show_log() -> None:
    """Write the log lines of the package to stderr, unless logging is set up already."""
    if not _PACKAGE.hasHandlers():
        _PACKAGE.addHandler(BarHandler())
        if _PACKAGE.level == logging.NOTSET:
            _PACKAGE.setLevel(logging.INFO)


class CommandOutput:
    """The output of a command: printed unless it is quiet, and written to its log file.

    Args:
        handler: writes the log lines to stderr.
    """

    def __init__(self, handler: logging.Handler) -> None:
        self.is_quiet = False
        self._handler = handler
        self._file: logging.FileHandler | None = None

    def configure(self, *, quiet: bool, log_file: Path | None, is_shown: bool = True) -> None:
        """Follow the flags of a command; raise OSError where the file cannot be written.

        Args:
            quiet: whether to show nothing but warnings and errors.
            log_file: a file to which log lines and output are appended, each line with its time.
            is_shown: False in a process beside which another one shows all.
        """
        self.is_quiet = quiet or not is_shown
        if quiet:
            self._handler.setLevel(logging.WARNING)
        if not is_shown:
            self._handler.setLevel(logging.CRITICAL)
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._file = logging.FileHandler(log_file, encoding="utf-8")
            self._file.setFormatter(logging.Formatter(_FILE_FORMAT))
            _PACKAGE.addHandler(self._file)
            _files.add(self._file)

    def say(self, text: object) -> None:
        """Print a line on stdout unless the command is quiet, and write it to the log file."""
        if not self.is_quiet:
            print(text, flush=True)
        self.note(text)

    def note(self, text: object, level: int = logging.INFO) -> None:
        """Write a line to the log file, if there is one."""
        if self._file is not None:
            for line in str(text).splitlines():
                self._file.handle(_PACKAGE.makeRecord("sae_fast", level, "", 0, line, (), None))

    def close(self) -> None:
        """Close the log file."""
        self._handler.setLevel(logging.NOTSET)
        if self._file is not None:
            _files.discard(self._file)
            _PACKAGE.removeHandler(self._file)
            self._file.close()


_files: set[logging.FileHandler] = set()  # the log files of commands


def has_log_file() -> bool:
    """Return whether a command writes its log to a file, beside what it shows."""
    return bool(_files)


@contextmanager
def command_output(level: int = logging.INFO) -> Iterator[CommandOutput]:
    """Show the log lines of the package on stderr while a command runs, and yield its output.

    Args:
        level: the least level that is shown; a log file has all lines from INFO on.
    """
    handlers = [item for item in _PACKAGE.handlers if isinstance(item, BarHandler)]
    handler = handlers[0] if handlers else BarHandler()
    if not handlers and not _PACKAGE.handlers:
        _PACKAGE.addHandler(handler)
    handler.setLevel(level)
    _PACKAGE.setLevel(logging.INFO)
    output = CommandOutput(handler)
    try:
        yield output
    finally:
        output.close()
