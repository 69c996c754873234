"""The common parts of all campaigns: tries in child processes, outcomes, commands run in children.

A campaign is a module beside this one with a `CAMPAIGN`. Its parent process imports all modules and
computes nothing, so that forking it is safe and cheap; every try runs in a forked child, where a
crash, a hang or a leaked descriptor fails only that try.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

LONGEST_LINE = 2000  # most characters of an error message, so that it fits on a screen
# A process hangs if it has computed longer than its limit in seconds, or if it has neither computed
# nor waited for a processor for PATIENCE times the limit. The time from begin to end is no measure,
# because it is long on a busy machine.
PATIENCE = 20


class Failed(Exception):
    """A try that went wrong, in one line."""


@dataclass(frozen=True)
class Try:
    """One try: its number, its own random numbers and its own folder.

    `folder` is empty at the start and removed afterwards; `shared` is one folder for all tries,
    filled by `Campaign.prepare` and `made`, and otherwise left unchanged by tries.
    """

    number: int
    random: random.Random
    folder: Path
    shared: Path

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return a folder in `shared`, which `make` fills for the first try that asks for it.

        A try that ends before it is filled leaves it to the next one.
        """
        folder = self.shared / name
        if not folder.exists():
            with temporary_folder(self.shared, "unfinished-") as aside:
                make(aside)
                aside.rename(folder)
        return folder


@dataclass(frozen=True)
class Campaign:
    """A kind of try, and the numbers of tries in its short and its long form.

    Args:
        attempt: makes one try; returns its outcome as a short label, which is counted, and raises
            `Failed` or any other exception on a failure.
        tries: number of tries in the long form.
        short: number of tries in the short form, which takes a few seconds.
        prepare: fills the folder shared by all tries, in a child process of its own.
        seconds: longest time that one try may compute.
        block: number of tries that one child process makes, one after the other.
    """

    attempt: Callable[[Try], str]
    tries: int
    short: int
    prepare: Callable[[Path], object] | None = None
    seconds: float = 20.0
    block: int = 25


@dataclass
class Report:
    """Outcomes of a campaign by label, and its failures by number of the try."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """The end of a child process: an exit code, a signal, or killed because it hung."""

    code: int | None
    signal: int | None
    hung: bool
    out: str
    err: str

    def __str__(self) -> str:
        how = "hung" if self.hung else f"code {self.code}" if self.signal is None else ""
        how = how or f"signal {self.signal}"
        return f"{how}: {' | '.join(self.err.splitlines()[-6:])[-LONGEST_LINE:]}"


def run(
    campaign: Campaign, numbers: Sequence[int], seed: int, root: Path, log: IO[str] | None = None
) -> Report:
    """Make the tries with these numbers; `root` is an empty folder for their files.

    Every failure is written to `log` at once, and the number of tries every half minute.
    """
    report, shared = Report(), root / "shared"
    shared.mkdir()
    prepare = campaign.prepare
    if prepare is not None:
        ended = run_aside(lambda: prepare(shared), seconds=600)
        if ended.code != 0:
            raise Failed(f"the preparation failed, {ended}")
    left, started = list(numbers), time.monotonic()
    while left:
        block, left = left[: campaign.block], left[campaign.block :]
        done = _run_block(campaign, block, seed, root, report)
        left = block[done:] + left
        if log is None:
            continue
        for number in sorted(report.failures.keys() & set(block[:done])):
            print(f"try {number} failed: {report.failures[number]}", file=log, flush=True)
        if time.monotonic() - started > 30:
            started = time.monotonic()
            made = len(numbers) - len(left)
            print(f"{made:,} tries, {len(report.failures)} failed", file=log, flush=True)
    return report


def _run_block(
    campaign: Campaign, numbers: Sequence[int], seed: int, root: Path, report: Report
) -> int:
    """Make these tries in one child, up to one that ends it; return how many were made."""
    receiver, sender = os.pipe()
    child = _fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(receiver)
        _leave(lambda: _attempt_all(campaign, numbers, seed, root, sender))
    os.close(sender)
    done, ended = 0, False
    with open(receiver, encoding="utf-8") as lines:
        # The child sends one message per try.
        while not ended and done < len(numbers):
            ready = _is_ready(lines, child, campaign.seconds)
            if not ready:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # with its children, which hold the pipe too
            message = lines.readline()
            ended = not message
            if not ended:
                kind, text = json.loads(message)
                if kind == "outcome":
                    report.outcomes[text] += 1
                else:
                    report.failures[numbers[done]] = text
                done += 1
            elif not ready:
                report.failures[numbers[done]] = f"no end within {campaign.seconds:g} s computed"
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that a try has left behind
    if done < len(numbers) and numbers[done] not in report.failures:
        code = os.waitstatus_to_exitcode(status)
        report.failures[numbers[done]] = f"ended by signal {-code}" if code < 0 else f"code {code}"
    return min(done + 1, len(numbers)) if ended else done


def _attempt_all(
    campaign: Campaign, numbers: Sequence[int], seed: int, root: Path, sender: int
) -> None:
    for number in numbers:
        kind, text = _attempt(campaign, number, seed, root)
        os.write(sender, (json.dumps([kind, text]) + "\n").encode())


def _attempt(campaign: Campaign, number: int, seed: int, root: Path) -> tuple[str, str]:
    generator = random.Random(f"{seed}:{number}")
    try:
        with temporary_folder(root) as folder:
            attempt = Try(number, generator, folder, root / "shared")
            before = _descriptors()
            outcome = campaign.attempt(attempt)
            if leaked := _descriptors() - before:
                raise Failed(f"{outcome}, and {leaked} descriptors stay open")
            return "outcome", outcome
    except Failed as failure:
        return "failure", str(failure)
    except Exception:
        return "failure", traceback.format_exc()


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str = "try-") -> Iterator[Path]:
    """Make a folder and remove it at the end of the block.

    Unlike tempfile.TemporaryDirectory, it is not removed when a forked child ends.
    """
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def run_aside(
    work: Callable[[], object],
    *,
    folder: Path | None = None,
    seconds: float = 20.0,
    limits: Mapping[int, int] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Ended:
    """Run `work` in a forked child; return how it ended, with its output.

    Args:
        work: the function to run; an integer that it returns is the exit code, like a command's.
        folder: the child's current directory.
        seconds: the child is killed after computing for this time, or after neither computing nor
            waiting for a processor for PATIENCE times this time.
        limits: limits of resources, as for `resource.setrlimit`.
        variables: environment variables of the child.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = _fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            # The parent's streams may be redirected, for example by a test that captures output.
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
            os.environ.update(variables or {})
            if folder is not None:
                os.chdir(folder)
            for what, value in (limits or {}).items():
                resource.setrlimit(what, (value, value))
            _leave(work)
        waiting = os.pidfd_open(child)
        hung = not _is_ready(waiting, child, seconds)
        os.close(waiting)
        if hung:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    number = -code if code < 0 else None
    return Ended(None if code < 0 else code, number, hung, texts[0], texts[1])


def run_here(work: Callable[[], object], *, folder: Path, address_space: int) -> Ended:
    """Run `work` in this process, as `run_aside` does in a child of its own.

    It saves the fork and the end of a process, 20 ms. A crash or a hang ends this process, which is
    a failure of the try too.

    Args:
        work: see `run_aside`.
        folder: the current directory meanwhile.
        address_space: bytes by which the address space may grow meanwhile.
    """
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    limit = int(pages) * resource.getpagesize() + address_space
    before, place = resource.getrlimit(resource.RLIMIT_AS), Path.cwd()
    code: Any = 1
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = [os.dup(1), os.dup(2)]
        streams = sys.stdout, sys.stderr
        try:
            for number, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), number)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
            code = _code_of(work)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            os.chdir(place)
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ended(code & 0xFF, None, False, texts[0], texts[1])


def _is_ready(stream: IO[str] | int, child: int, seconds: float) -> bool:
    """Wait until a child's stream can be read; return False if the child hangs."""
    start, before = time.monotonic(), _computed(child)
    first = _kept_waiting(child)
    last = dict(first)
    while not select.select([stream], [], [], min(1.0, seconds))[0]:
        last |= _kept_waiting(child)  # threads that have ended keep their last value
        kept = sum(last.values()) - sum(first.values())
        idle = time.monotonic() - start - kept
        if _computed(child) - before > seconds or idle > PATIENCE * seconds:
            return bool(select.select([stream], [], [], 0)[0])
    return True


def _computed(child: int) -> float:
    """Return the seconds that a child and the children it has waited for have computed."""
    text = Path(f"/proc/{child}/stat").read_text(encoding="ascii", errors="replace")
    ticks = text.rpartition(")")[2].split()[11:15]  # after the name, which may contain spaces
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _kept_waiting(child: int) -> dict[int, float]:
    """Return the seconds that each thread of a child and of its children waited for a processor."""
    found: dict[int, float] = {}
    left = [child]
    while left:
        for task in Path(f"/proc/{left.pop()}/task").glob("*"):
            with contextlib.suppress(OSError):  # the thread may have ended
                left += map(int, (task / "children").read_text(encoding="ascii").split())
                statistics = (task / "schedstat").read_text(encoding="ascii").split()
                found[int(task.name)] = int(statistics[1]) / 1e9
    return found


def refusal(ended: Ended) -> str:
    """Return the single line with which a command refused its input; raise Failed otherwise."""
    lines = ended.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if ended.code != 2 or len(errors) != 1 or errors[0] != lines[-1] or "Traceback" in ended.err:
        raise Failed(f"no refusal in one line, {ended}")
    if len(errors[0]) > LONGEST_LINE:
        raise Failed(f"a line of {len(errors[0]):,} characters: {errors[0][:LONGEST_LINE]}")
    return errors[0]


def success(ended: Ended) -> str:
    """Return the stderr of a command that succeeded; raise Failed if it did not."""
    if ended.code != 0 or "Traceback" in ended.err:
        raise Failed(f"no success, {ended}")
    return ended.err


def leftovers(folder: Path, known: Sequence[str] = ()) -> None:
    """Raise Failed if temporary files are left below `folder`, except names in `known`."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))]
    hidden = [name for name in names if Path(name).name.startswith(".") or name.endswith(".tmp")]
    if found := [name for name in hidden if Path(name).name not in known]:
        raise Failed(f"left behind: {', '.join(found)}")


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        # A child must not remove the parent's temporary folders at its exit.
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        gc.freeze()  # the parent's objects are not collected, which would copy their pages
    return child


def _leave(work: Callable[[], object]) -> None:
    """Run `work` and end this process with its result as the exit code, like a program."""
    code = 1
    try:
        code = _code_of(work)
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _code_of(work: Callable[[], object]) -> int:
    """Run `work` and return its result as an exit code, like a program's; errors are printed."""
    try:
        result = work()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return result if isinstance(result, int) else 0
