"""Run commands short of memory, descriptors, file size, threads, disk space or permission.

Each command must end with exit code 0, or with 2 and one line, and leave no temporary file. A run
without the limit must then continue to the weights of an undisturbed run, to the bit. Some
libraries end the process if they get no memory; `LIBRARIES` recognises them by their messages.
These tries are counted separately, and the next run removes their files, as after a kill.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import functools
import importlib
import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import matplotlib.pyplot
import numpy as np
import torch
from safetensors.torch import load_file

from campaign.frame import Campaign, Ended, Failed, Try, leftovers, refusal, run_aside, success
from sae_fast import train
from sae_fast.activations import write_shard
from sae_fast.output_streams import run_command

D_IN = 8
SMALL = (
    *("--d-sae", "32", "--batch-size", "32", "--lr", "1e-2", "--log-every", "2"),
    *("--eval-every", "4", "--checkpoint-every", "3", "--num-threads", "1"),
)
TRAIN = ("--k", "2", *SMALL, "--max-steps", "10")
# The command and its flags, by name. All write to "out" and read from "shared".
COMMANDS = {
    "train": ("train", "--shard-dir", "shared/shards", "--checkpoint-dir", "out/run", *TRAIN),
    "train in memory": (
        *("train", "--shard-dir", "shared/shards", "--checkpoint-dir", "out/run", *TRAIN),
        "--keep-in-memory",
    ),
    "sweep": (
        *("train", "--shard-dir", "shared/shards", "--checkpoint-dir", "out/run", *SMALL),
        *("--max-steps", "10", "--sweep", "shared/sweep.json"),
    ),
    "convert": (
        *("convert_shards", "shared/rows.npy", "out/run", "--shard-rows", "300"),
        *("--heldout-rows", "100"),
    ),
    "plot": ("plot", "shared/train/run", "--out", "out/run.png"),
}
# Imported without limits, because sae_fast cannot report failures before a command begins.
for _name in ("train", "convert_shards", "plot"):
    importlib.import_module(f"sae_fast.{_name}")
# The parser of flags caches parts of the sources: read once here, not in every child process.
train.parse_arguments(["--k", "2"])
MIB = 1 << 20
SIZE = 64 * MIB  # size of the file system without the limit
_MS_RDONLY, _MS_REMOUNT, _CLONE_NEWNS, _MNT_DETACH = 1, 32, 0x20000, 2
_libc = ctypes.CDLL(None, use_errno=True)


def prepare(shared: Path) -> None:
    """Make shards and rows to convert."""
    (shared / "shards").mkdir()
    for number, name in enumerate(("train_00", "train_01", "heldout_00")):
        rows = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(number))
        write_shard(shared / "shards" / f"{name}.h5", rows)
    np.save(shared / "rows.npy", rows.repeat(3, 1).numpy())
    (shared / "sweep.json").write_text(json.dumps({"k": [1, 2]}))


def unlimited(given: Try, name: str) -> Path:
    """Return a folder with the results of a command without limits."""

    def make(folder: Path) -> None:
        (folder / "shared").symlink_to(given.shared)
        flags = [word.replace("out/run", "run") for word in COMMANDS[name]]
        success(run_aside(functools.partial(_main, flags), folder=folder, seconds=120))

    return given.made(name, make)


def attempt(given: Try) -> str:
    """Run one command under one limit, and again without it."""
    name = given.random.choice([*COMMANDS])
    kind = given.random.choice([*LIMITS])
    try:
        return _attempt(given, name, kind)
    finally:
        _libc.umount2(os.fsencode(given.folder / "out"), _MNT_DETACH)  # if one is mounted


def _attempt(given: Try, name: str, kind: str) -> str:
    (given.folder / "shared").symlink_to(given.shared)
    if name == "plot":
        unlimited(given, "train")  # the run that it draws
    out = given.folder / "out"
    out.mkdir()
    ended = LIMITS[kind](given, COMMANDS[name])
    library = _library_that_ended(ended) if kind in MEMORY else None
    if library is not None:
        said = f"ended by {library}"
    elif ended.code != 0:
        said = "was refused"
        refusal(ended)
    else:
        said = "went through"
        success(ended)
    if library is None:
        leftovers(out, KNOWN)
    again = list(COMMANDS[name])
    if again[0] == "train":
        again += ["--resume-from", "latest"]
    if ended.code != 0 or again[0] != "convert_shards":
        success(_aside(given, again))
    leftovers(out, KNOWN)
    _compare(name, given)
    return f"{name}, {kind}: {said}"


# The file of a lock remains after its process ends, and the next run uses it again.
KNOWN = (".run.lock", ".conversion.lock")

# Libraries that end a process, or let it hang, if they get no memory: the signal, None for a
# process that hangs, and their message at the end of stderr. Only limits of memory cause this.
_FIRST_FRAME = r"Fatal Python error: {}\n\n(Current t|T)hread \w+ \(most recent call first\):\n"
LIBRARIES: dict[str, tuple[signal.Signals | None, str]] = {
    # safetensors and tokenizers abort if an allocation fails.
    "Rust": (signal.SIGABRT, r"^memory allocation of \d+ bytes failed$"),
    # The first use of a thread_local with a destructor in a new thread, for example in torch.
    "glibc": (signal.SIGABRT, r"^Fatal glibc error: failed to register TLS destructor: out of m"),
    # Dereferences null if the cache of a file cannot be allocated (H5AC_create in 2.0).
    "HDF5": (
        signal.SIGSEGV,
        _FIRST_FRAME.format("Segmentation fault") + r'  File "[^"]*/h5py/[^"]*", line \d+',
    ),
    # Thread.start waits for ever if its thread ends by MemoryError before it reports its start.
    "Thread.start of Python": (None, r"^Exception ignored in thread started by: .*\nMemoryError"),
}


def _library_that_ended(ended: Ended) -> str | None:
    """Return the name of the library that ended a process; None if none of LIBRARIES did."""
    for name, (number, words) in LIBRARIES.items():
        is_so = ended.hung if number is None else ended.signal == number
        if is_so and re.search(words, ended.err, re.MULTILINE):
            return name
    return None


def _compare(name: str, given: Try) -> None:
    """Raise Failed if the files written differ from the files of an undisturbed run."""
    if name == "plot":
        return
    place = unlimited(given, name.split()[0])
    pattern = "*.h5" if name == "convert" else "**/step-00000010/sae.safetensors"
    names = sorted(str(path.relative_to(place)) for path in (place / "run").glob(pattern))
    for file in names:
        one, other = place / file, given.folder / "out" / file
        if not other.exists():
            raise Failed(f"{file} is missing")
        if file.endswith(".h5"):
            with h5py.File(one) as first, h5py.File(other) as second:
                is_equal = np.array_equal(first["activations"], second["activations"])
        else:  # the order of names in a header may differ
            first, second = load_file(one), load_file(other)
            is_equal = all(torch.equal(first[key], second[key]) for key in first | second)
        if not is_equal:
            raise Failed(f"{file} is another than without the limit")


def _main(words: tuple[str, ...] | list[str]) -> int:
    command, *flags = words
    main = importlib.import_module(f"sae_fast.{command}").main
    return run_command(lambda: main(flags))


def _aside(
    given: Try, words: tuple[str, ...] | list[str], prepare: Callable[[], object] | None = None
) -> Ended:
    def work() -> int:
        faulthandler.enable()  # prints the traceback at a signal
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if prepare is not None:
            prepare()
        return _main(words)

    return run_aside(work, folder=given.folder, seconds=20)


def _under(what: int, lowest: int, highest: int, used: Callable[[], int]) -> Callable[..., Ended]:
    """Return a limit of a resource, counted above the use at the process's start."""

    def limited(given: Try, words: tuple[str, ...]) -> Ended:
        more = given.random.randint(lowest, highest)

        def restrict() -> None:
            limit = used() + more
            resource.setrlimit(what, (limit, limit))

        return _aside(given, words, restrict)

    return limited


def _without_threads(given: Try, words: tuple[str, ...]) -> Ended:
    """Run a command that can start only a few threads."""
    allowed = given.random.randint(0, 6)

    def restrict() -> None:
        start, started = threading.Thread.start, [0]

        def refused(thread: threading.Thread) -> None:
            started[0] += 1
            if started[0] > allowed:
                raise RuntimeError("can't start new thread")
            start(thread)

        threading.Thread.start = refused  # type: ignore[method-assign, assignment]

    return _aside(given, words, restrict)


def _on_small_disk(given: Try, words: tuple[str, ...]) -> Ended:
    """Run a command that writes to a file system which fills up."""
    out = given.folder / "out"
    if not _mounted(out, given.random.choice((16, 64, 128, 256, 512)) * 1024):
        return _under(resource.RLIMIT_FSIZE, 0, 40_000, lambda: 0)(given, words)
    ended = _aside(given, words)
    _remount(out, 0)
    return ended


def _read_only(given: Try, words: tuple[str, ...]) -> Ended:
    """Run a command that writes to a read-only file system."""
    out = given.folder / "out"
    if not _mounted(out, SIZE):
        return _under(resource.RLIMIT_FSIZE, 0, 0, lambda: 0)(given, words)
    _remount(out, _MS_RDONLY)
    ended = _aside(given, words)
    _remount(out, 0)
    return ended


def _mounted(path: Path, size: int) -> bool:
    """Mount a file system of `size` bytes until this process ends; return False if not allowed."""
    if _libc.unshare(_CLONE_NEWNS) != 0:
        return False
    _libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # private, with all below
    return bool(_libc.mount(b"none", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode()) == 0)


def _remount(path: Path, flags: int) -> None:
    options = f"size={SIZE}".encode()
    flags |= _MS_REMOUNT
    if _libc.mount(b"none", os.fsencode(path), b"tmpfs", flags, options) != 0:
        raise OSError(ctypes.get_errno(), errno.errorcode.get(ctypes.get_errno(), ""), str(path))


def _pages(place: int) -> int:
    """Return a field of /proc/self/statm in bytes: 0 for mapped, 5 for private memory."""
    number = Path("/proc/self/statm").read_text(encoding="ascii").split()[place]
    return int(number) * resource.getpagesize()


MEMORY: dict[str, Callable[[Try, tuple[str, ...]], Ended]] = {
    "address space": _under(resource.RLIMIT_AS, 0, 64 * MIB, functools.partial(_pages, 0)),
    "data": _under(resource.RLIMIT_DATA, 0, 64 * MIB, functools.partial(_pages, 5)),
}
LIMITS: dict[str, Callable[[Try, tuple[str, ...]], Ended]] = {
    "descriptors": _under(
        resource.RLIMIT_NOFILE, 0, 24, lambda: max(map(int, os.listdir("/proc/self/fd")))
    ),
    "file size": _under(resource.RLIMIT_FSIZE, 0, 60_000, lambda: 0),
    "threads": _without_threads,
    "small disk": _on_small_disk,
    "read-only": _read_only,
    **MEMORY,
}
CAMPAIGN = Campaign(attempt, tries=300, short=3, prepare=prepare, seconds=180, block=5)
matplotlib.pyplot.switch_backend("agg")
