"""The frame of commands with flags of output: one line for an error, the log file, exit codes."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable

from sae_fast.command_errors import EXIT_BAD_INPUT, refusal
from sae_fast.log_output import CommandOutput, command_output
from sae_fast.training.signals import StopOnSignal


def run_framed(
    body: Callable[[CommandOutput], int], told: Callable[[Exception], str] = refusal
) -> int:
    """Run a command and return its exit code, 2 after an error, which is told in one line.

    Args:
        body: the command; it returns the exit code.
        told: gives the line of an error, and raises a fault of the program itself again.
    """
    with command_output(logging.WARNING) as output:
        try:
            return body(output)
        except Exception as error:
            line = told(error)
            print(line, file=sys.stderr)
            output.note(line, logging.ERROR)
            return EXIT_BAD_INPUT


def run_resumable(
    body: Callable[[StopOnSignal, CommandOutput], object],
    told: Callable[[Exception], str] = refusal,
) -> int:
    """Run a command that the same command continues; return 128 and the number after a signal.

    Args:
        body: the command; it returns soon after a signal has come.
        told: see `run_framed`.
    """

    def stoppable(output: CommandOutput) -> int:
        with StopOnSignal() as stop:
            body(stop, output)
        return 0 if stop.received is None else 128 + stop.received

    try:
        return run_framed(stoppable, told)
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
