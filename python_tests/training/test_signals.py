"""Signals stop a training or ask for a checkpoint, and the previous handlers are restored."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

import pytest

from sae_fast.training.signals import StopOnSignal, run_program


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received is number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once() -> None:
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with StopOnSignal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_entered_again_it_keeps_the_handlers_of_the_outside() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopOnSignal() as stop:
        with stop:
            pass
        signal.raise_signal(signal.SIGINT)
        assert stop.received is signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("interrupts", "code"), [(0, 7), (1, 7), (2, 130), (5, 130)])
def test_a_program_leaves_at_its_second_interrupt(interrupts: int, code: int) -> None:
    def work() -> int:
        with StopOnSignal(), contextlib.suppress(KeyboardInterrupt):
            for _ in range(interrupts):
                signal.raise_signal(signal.SIGINT)
        return 7

    assert _exit_code(work) == code


def test_a_program_leaves_at_an_interrupt_that_nothing_waits_for() -> None:
    assert _exit_code(lambda: signal.raise_signal(signal.SIGINT) or 7) == 130


def _exit_code(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            run_program(work)
        except SystemExit as end:
            code = int(str(end.code))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.usefixtures("heeded_hangup")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_a_cluster_and_a_closed_terminal_stop_a_training(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        signal.raise_signal(number)
        assert stop.received is number
    assert signal.getsignal(number) is before


def test_a_checkpoint_is_asked_for_once_and_nothing_stops() -> None:
    with StopOnSignal() as stop:
        assert not stop.take_save()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.take_save()
        assert not stop.take_save()
        assert stop.received is None


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
