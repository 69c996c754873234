"""Signals to a training: stop at the next step boundary, or write a checkpoint and continue."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

EXIT_INTERRUPTED = 128 + signal.SIGINT
INTERRUPTED = "error: interrupted; what was saved before is intact\n"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
SAVING = signal.SIGUSR1


class StopOnSignal:
    """Context manager: note signals, on which the training acts between two steps.

    SIGINT, SIGTERM, SIGHUP and SIGUSR2 stop the training, which writes a checkpoint first; SIGUSR1
    asks for a checkpoint and lets it continue. SIGHUP does nothing where it is ignored already, as
    behind nohup.

    A second SIGINT interrupts at once: it is handed to the handler that was there before. Python's
    own handler raises KeyboardInterrupt, the one of `run_program` ends the process. Entered again
    inside itself, the context manager changes nothing.

    Outside the main thread, where Python delivers no signals, it does nothing.

    Attributes:
        received: the last signal that stops the training; None: there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_save_asked = False
        self._depth = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (*STOPPING, SAVING):
                if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()

    def take_save(self) -> bool:
        """Return whether SIGUSR1 has asked for a checkpoint since the last call."""
        asked, self._is_save_asked = self._is_save_asked, False
        return asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == SAVING:
            self._is_save_asked = True
            return
        if self.received is signal.SIGINT and number == signal.SIGINT:
            previous = self._previous.get(signal.SIGINT)
            if callable(previous):
                previous(number, frame)
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a command as this process, and end the process with the exit code that it returns.

    An interrupt that the command does not wait for ends the process at once, with code 130. Nothing
    is torn down then: threads that compute or read are alive and must not outlive what they use.
    """
    signal.signal(signal.SIGINT, _leave)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
    sys.exit(code)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, INTERRUPTED.encode())  # a stream of Python's may be in use just now
    os._exit(EXIT_INTERRUPTED)
