"""Threads beside their caller: they work before it or after it, or on tasks that it hands out.

A thread that gets no memory to begin ends without an error that anything could catch. So whatever
waits here for a thread looks from time to time whether it is alive, and raises MemoryError if not.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Generic, TypeVar

THREADS = "sae_fast-"  # how the names of the package's threads begin
_PATIENCE = 1.0  # seconds between two looks at whether a thread is alive
_PATIENCE_AT_START = 60.0  # seconds after which a thread is taken for one that cannot begin

Item = TypeVar("Item")
Result = TypeVar("Result")
_Task = tuple[Future[Any], Callable[[], Any]]


class _Started(threading.Event):
    """Replaces the event that `Thread.start` waits for, without a limit, until the thread runs.

    A thread that gets no memory before it has told that it runs ends without setting the event.
    """

    def wait(self, timeout: float | None = None) -> bool:
        if not super().wait(_PATIENCE_AT_START if timeout is None else timeout) and timeout is None:
            raise MemoryError(f"a thread has not begun within {_PATIENCE_AT_START:.0f} s")
        return self.is_set()


class _Thread(threading.Thread):
    """A thread that is told apart by what it does, and ends silently where it lacks memory."""

    def __init__(self, name: str, does: str, work: Callable[[], None], *, single: bool) -> None:
        super().__init__(target=self._begin, name=THREADS + name, daemon=True)
        self._does, self._work, self.single = does, work, single
        self.begun = threading.Event()
        self._started = _Started()  # an attribute of Thread, in Python 3.10 to 3.14

    def run(self) -> None:
        with suppress(MemoryError):
            super().run()

    def _begin(self) -> None:
        if self.single:
            import torch

            # A second team of OpenMP threads would fight the training step for its cores.
            torch.set_num_threads(1)
            torch.get_num_threads()  # without this, the first parallel op would set it back
        self.begun.set()
        self._work()

    def check_alive(self) -> None:
        """Raise MemoryError where the thread has ended."""
        if not self.is_alive():
            raise MemoryError(f"the thread that {self._does} has ended")


def _start(threads: Iterable[_Thread]) -> None:
    """Start threads, and return when all of them have begun."""
    for thread in threads:
        with _kept_number_of_threads() if thread.single else nullcontext():
            thread.start()
            while not thread.begun.wait(_PATIENCE):
                thread.check_alive()


@contextmanager
def _kept_number_of_threads() -> Iterator[None]:
    """Set torch's number of threads back, which a thread's own number changes for later threads."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start_thread(work: Callable[[], None], *, name: str, does: str) -> None:
    """Start a daemon thread that calls `work`; raise MemoryError if it cannot begin.

    Args:
        work: called without arguments.
        name: of the thread, after `THREADS`.
        does: what the thread does, for the error: "watches".
    """
    _start([_Thread(name, does, work, single=False)])


class Ended(Exception):
    """There are no more items."""


class Prefetcher(Generic[Item]):
    """The items of a generator in their order, made by a thread that is ahead of the caller.

    Args:
        items: makes the items; closed by the thread.
        depth: how many items the thread may be ahead.
        name: of the thread, after `THREADS`.
        does: what the thread does, for the error where it has ended: "reads".
        single: whether the thread keeps to one of torch's threads.
        stopping: set when the thread is to end; `items` may look at it.
    """

    def __init__(
        self,
        items: Generator[Item, None, None],
        depth: int,
        *,
        name: str,
        does: str,
        single: bool = False,
        stopping: threading.Event | None = None,
    ) -> None:
        self._items = items
        self._made: queue.Queue[Item | _Failure] = queue.Queue(depth)
        self._stopping = stopping or threading.Event()
        self._thread = _Thread(name, does, self._run, single=single)
        _start([self._thread])

    @property
    def ready(self) -> bool:
        """Whether `get` will not wait."""
        return not self._made.empty()

    def get(self) -> Item:
        """Wait for the next item; raise what kept it from being made, or Ended after the last."""
        while True:
            try:
                item = self._made.get(timeout=_PATIENCE)
                break
            except queue.Empty:
                if self._made.empty():
                    self._thread.check_alive()
        if isinstance(item, _Failure):
            self._made.put(item)  # it is raised again when `get` is called again
            raise item.error
        return item

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        if threading.current_thread().name.startswith(THREADS):
            return  # the owner was dropped in a cycle, and is collected by the thread itself
        while self._thread.is_alive():
            # Making room lets a thread that waits to hand over an item see that it should end.
            while not self._made.empty():
                self._made.get_nowait()
            self._thread.join(timeout=0.01)

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._hand_over(item):
                    return
            self._hand_over(_Failure(Ended()))
        except BaseException as error:
            self._hand_over(_Failure(error))
        finally:
            self._items.close()

    def _hand_over(self, item: Item | _Failure) -> bool:
        """Wait until there is room for an item; return False where the thread is to end."""
        while not self._stopping.is_set():
            with suppress(queue.Full):
                self._made.put(item, timeout=_PATIENCE)
                return True
        return False


class OnDemand(Generic[Item]):
    """The items of a generator, made when they are asked for, in place of a `Prefetcher`."""

    ready = False  # what `get` takes is time that its caller waits

    def __init__(self, items: Generator[Item, None, None]) -> None:
        self._items = items
        self._error: Exception | None = None

    def get(self) -> Item:
        """Make the next item; raise, from then on, what keeps it from being made."""
        if self._error is not None:
            raise self._error
        try:
            return next(self._items)
        except Exception as error:
            self._error = error
            raise

    def stop(self) -> None:
        """Close the generator."""
        self._items.close()


class _Failure:
    """An error in place of an item."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def prefetch(
    items: Generator[Item, None, None], depth: int, *, name: str, does: str
) -> Generator[Item, None, None]:
    """Yield the items of a generator, which a thread makes up to `depth` of them ahead.

    An error comes where its item would have come; closing the iterator ends the thread. For `name`
    and `does` see `Prefetcher`.
    """
    made = Prefetcher(items, depth, name=name, does=does)
    try:
        while True:
            try:
                item = made.get()
            except Ended:
                return
            yield item
    finally:
        made.stop()


class BackgroundWriter(Generic[Item]):
    """Writes items in a thread of its own; used with `with`, which waits until all are written.

    An error of `write` is raised by the next `put`, or at the end.

    Args:
        write: called in the thread with one item after another.
        depth: how many items may wait to be written.
        name: of the thread, after `THREADS`.
        does: what the thread does, for the error where it has ended: "writes shards".
    """

    def __init__(self, write: Callable[[Item], None], depth: int, *, name: str, does: str) -> None:
        self._write = write
        self._waiting: queue.Queue[Item | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._all_written = False
        self._thread = _Thread(name, does, self._run, single=False)

    def __enter__(self) -> BackgroundWriter[Item]:
        _start([self._thread])
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._hand_over(None)
            self._thread.join()
            if not self._all_written:
                self._thread.check_alive()
        except MemoryError:
            if kind is None:
                raise
        if kind is None:
            self._raise()

    def put(self, item: Item) -> None:
        """Add an item to those to be written; wait where too many wait already."""
        self._raise()
        self._hand_over(item)

    def _hand_over(self, item: Item | None) -> None:
        while True:
            try:
                return self._waiting.put(item, timeout=_PATIENCE)
            except queue.Full:
                self._thread.check_alive()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # emptied, so that `put` does not wait for ever
            try:
                self._write(item)
            except BaseException as error:  # raised where items are handed over
                self._error = error
        self._all_written = True


class Workers:
    """Threads that run tasks in the order in which they are given; used with `with`, or closed.

    Args:
        count: how many threads.
        name: of each thread, after `THREADS`.
        does: what a thread does, for the error where one has ended: "reads a disk".
        single: whether each thread keeps to one of torch's threads.
    """

    def __init__(self, count: int, *, name: str, does: str, single: bool = False) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads = [_Thread(name, does, self._run, single=single) for _ in range(count)]
        try:
            _start(self._threads)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: Callable[[], Result]) -> Future[Result]:
        """Give a task to the threads; return its future result, see `wait`."""
        future: Future[Result] = Future()
        self._tasks.put((future, task))
        return future

    def wait(self, future: Future[Result]) -> Result:
        """Return the result of a task, or raise its error."""
        while True:
            try:
                return future.result(timeout=_PATIENCE)
            except TimeoutError:
                if future.done():
                    raise  # it is the task's own
                for thread in self._threads:
                    thread.check_alive()

    def close(self) -> None:
        """End the threads, with the tasks that they are at; the other tasks are cancelled."""
        with suppress(queue.Empty):
            while (waiting := self._tasks.get_nowait()) is not None:
                waiting[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _run(self) -> None:
        while (waiting := self._tasks.get()) is not None:
            future, task = waiting
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:
                    future.set_exception(error)
            del waiting, future, task  # a thread that waits must not hold what it has made
