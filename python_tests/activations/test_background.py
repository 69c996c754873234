"""Threads beside the caller: order, errors in their place, and threads that get no memory."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest

from sae_fast.activations import background
from sae_fast.activations.background import THREADS, BackgroundWriter, Workers, prefetch


def ahead(items, depth):
    return prefetch(items, depth, name="items", does="makes items")


def writer(write, depth=2):
    return BackgroundWriter(write, depth, name="writer", does="writes items")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def numbers(count):
    yield from range(count)


def test_what_is_made_ahead_is_what_the_generator_makes():
    assert list(ahead(numbers(20), 3)) == list(range(20))
    assert threads() == []


def test_an_error_comes_where_its_item_would_have_come():
    def failing():
        yield from range(5)
        raise ValueError("five")

    items = ahead(failing(), 3)
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="five"):
        next(items)


def test_closing_ends_the_thread_and_the_generator_in_it():
    closed = threading.Event()

    def endless():
        number = 0
        try:
            while True:
                yield number
                number += 1
        finally:
            closed.set()

    items = ahead(endless(), 2)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert closed.is_set()
    assert threads() == []


def test_what_is_handed_over_is_written_in_order_before_the_end():
    written: list[int] = []
    with writer(written.append) as items:
        for number in range(50):
            items.put(number)
    assert written == list(range(50))
    assert threads() == []


def test_an_error_of_writing_is_raised_and_nothing_more_is_written():
    written: list[int] = []

    def write(number):
        if number == 3:
            raise OSError("full")
        written.append(number)

    def put_many():
        with writer(write) as items:
            for number in range(1000):
                items.put(number)

    with pytest.raises(OSError, match="full"):
        put_many()
    assert written == [0, 1, 2]
    assert threads() == []


def test_tasks_give_their_results_and_their_errors():
    with Workers(3, name="tasks", does="works") as workers:
        futures = [workers.submit(lambda number=number: 1 // number) for number in range(20)]
        assert [workers.wait(future) for future in futures[1:]] == [1] + 18 * [0]
        with pytest.raises(ZeroDivisionError):
            workers.wait(futures[0])
    assert threads() == []


def test_tasks_that_have_not_begun_are_cancelled_at_the_end():
    begun, go_on, done = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        go_on.wait()
        done.append(1)

    workers = Workers(1, name="tasks", does="works")
    workers.submit(first)
    second = workers.submit(lambda: done.append(2))
    begun.wait()
    closing = threading.Thread(target=workers.close)
    closing.start()
    with pytest.raises(CancelledError):
        second.result()
    go_on.set()
    closing.join()
    assert done == [1]


def _prefetch() -> None:
    next(ahead(numbers(3), 2))


def _write() -> None:
    with writer(print) as items:
        for number in range(100):
            items.put(number)


def _work() -> None:
    with Workers(2, name="tasks", does="works") as workers:
        workers.wait(workers.submit(int))


@pytest.mark.slow
@pytest.mark.parametrize("use", [_prefetch, _write, _work])
@pytest.mark.parametrize("kind", ["no memory", "no line"])
def test_a_thread_that_cannot_begin_is_told(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[], None], kind: str
) -> None:
    run = threading.Thread.run

    def fails(thread: threading.Thread) -> None:
        if not thread.name.startswith(THREADS):
            return run(thread)
        if kind == "no memory":
            raise MemoryError
        return None

    monkeypatch.setattr(threading.Thread, "run", fails)
    with pytest.raises(MemoryError, match=r"the thread that .* has ended"):
        use()


@pytest.mark.slow
@pytest.mark.parametrize("use", [_prefetch, _write, _work])
def test_a_thread_that_ends_for_want_of_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[], None]
) -> None:
    """It has begun, and has taken nothing yet."""
    run = threading.Thread.run

    def fails(thread: threading.Thread) -> None:
        if not thread.name.startswith(THREADS):
            return run(thread)
        thread.begun.set()  # type: ignore[attr-defined]
        raise MemoryError

    monkeypatch.setattr(threading.Thread, "run", fails)
    with pytest.raises(MemoryError, match=r"the thread that .* has ended"):
        use()


def test_a_thread_that_ends_before_it_has_told_that_it_runs_is_an_error(monkeypatch):
    """In place of the want of memory: nothing of the thread's own code runs."""
    monkeypatch.setattr(threading.Thread, "_bootstrap", lambda self: None)
    monkeypatch.setattr(background, "_PATIENCE_AT_START", 0.05)
    with pytest.raises(MemoryError, match=r"a thread has not begun within"):
        background.start_thread(lambda: None, name="test", does="tests")
    with pytest.raises(MemoryError):
        next(ahead(numbers(3), 1))
    threading._limbo.clear()  # the two are listed there for ever
