"""Python programs in processes that are forked from one with torch, whose import takes seconds.

`run` and `Process` replace subprocess.run and subprocess.Popen in tests that need a process of
their own and not the start of an interpreter. A process has its own number, descriptors, folder,
variables and signals, and is a child of the test's process. Modules that are imported before the
fork are torch and the ones in `preload`; a test of what a command imports needs a real interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import inspect
import json
import os
import runpy
import secrets
import select
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

_HERE = str(Path(__file__).parent)
_SIZE = struct.Struct("=q")
_SET_CHILD_SUBREAPER = 36  # of prctl
_MOST_DESCRIPTORS = 4096
_sockets: list[socket.socket] = []  # of a server, which its forks leave
_POPEN = subprocess.Popen  # tests replace it by `popen`
# An interpreter, or a library that torch loads, reads these when it starts. The number of threads
# can be set later, and PYTHON alone is the name of a program. KMP_DUPLICATE_LIB_OK is set by
# scikit-learn when it is imported, which may be after the first process was forked.
_READ_AT_START = ("LD_", "OMP_", "MKL_", "KMP_", "PYTHON")
_SET_LATER = {
    *("OMP_NUM_THREADS", "PYTHON", "PYTHONPATH", "PYTHONUNBUFFERED"),
    "KMP_DUPLICATE_LIB_OK",
}


def run(
    arguments: Sequence[object], *, preload: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python with ["-c", code, …], ["-m", module, …] or [script, …].

    Options are passed to `Process`. Return the completed process, with its output as text.
    """
    return run_together([arguments], preload=preload, **options)[0]


def run_together(
    commands: Sequence[Sequence[object]], **options: Any
) -> list[subprocess.CompletedProcess[str]]:
    """Run several programs at once; return the completed process of each, its output as text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    running = [Process(arguments, **options) for arguments in commands]
    ends = [(process, *process.communicate()) for process in running]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, out, err in ends
    ]


def shell_command() -> str:
    """Return words of a shell that run Python with the arguments after them in a forked process.

    They start warm_client.py, which passes signals on and ends as the forked process does.
    """
    client = Path(__file__).with_name("warm_client.py")
    return shlex.join([sys.executable, "-S", "-E", str(client), _server(()).name])


def popen(command: Sequence[object], **options: Any) -> subprocess.Popen[Any]:
    """Start a command as subprocess.Popen does, in a forked process if it is this Python's."""
    program, *arguments = command
    if program == sys.executable:
        return Process(arguments, **options)
    return _POPEN(command, **options)


class Process(subprocess.Popen[Any]):
    """A forked process, with the options and methods of subprocess.Popen.

    Its signals and its exit code are real. An option that only the start of a program could follow
    raises ValueError.
    """

    def __init__(
        self, arguments: Sequence[object], *, preload: tuple[str, ...] = (), **options: Any
    ) -> None:
        self._preload = preload
        command = [sys.executable, *map(str, arguments)]
        super().__init__(command, **{"stdin": subprocess.DEVNULL, **options})

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(_POPEN._execute_child).bind(self, *arguments).arguments
        if given["preexec_fn"] or given["pass_fds"] or given["shell"]:
            raise ValueError("preexec_fn, pass_fds and shell need a real interpreter")
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        request = {
            "arguments": given["args"][1:],
            "cwd": str(given["cwd"] or Path.cwd()),
            "env": dict(os.environ if given["env"] is None else given["env"]),
            "session": bool(given.get("start_new_session")),
        }
        self.pid = _server(self._preload).start(
            request, [own if end == -1 else end for own, end in enumerate(ends)]
        )
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))


class _Server:
    """The process that forks, which ends with this one."""

    def __init__(self, preload: tuple[str, ...]) -> None:
        self._requests, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self.name = f"sae_fast-{secrets.token_hex(8)}"
        clients = socket.socket(socket.AF_UNIX)
        clients.bind("\0" + self.name)
        clients.listen()
        given = f"{theirs.fileno()}, {clients.fileno()}, {preload!r}"
        program = f"import warm_python; warm_python.serve({given})"
        self._process = _POPEN(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": _HERE},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), clients.fileno()],
        )
        theirs.close()
        clients.close()
        atexit.register(self._end, os.getpid())

    def start(self, request: dict[str, Any], streams: list[int]) -> int:
        """Start a program with these three descriptors; return the number of its process."""
        message = json.dumps(request).encode()
        with self._lock, _adopting_children():
            socket.send_fds(self._requests, [_SIZE.pack(len(message))], streams)
            self._requests.sendall(message)
            return int(_SIZE.unpack(_received(self._requests, _SIZE.size))[0])

    def _end(self, owner: int) -> None:
        """Close the socket of a server, at which it ends, unless this is a fork of its owner."""
        if os.getpid() == owner:
            self._requests.close()
            self._process.wait()


@functools.cache
def _server(preload: tuple[str, ...]) -> _Server:
    return _Server(preload)


@contextlib.contextmanager
def _adopting_children() -> Iterator[None]:
    """Let this process become the parent of descendants whose parent ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _received(requests: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = requests.recv(size - len(parts))
        if not part:
            raise EOFError("the other end of the socket is closed")
        parts += part
    return parts


def serve(of_requests: int, of_clients: int, preload: tuple[str, ...]) -> None:
    """Start the programs that are asked for on a socket, until its other end is closed.

    Connections to a second socket, both given by their descriptors, ask for programs too. A forked
    child leaves the loop by the SystemExit of its program.
    """
    import importlib

    import torch  # noqa: F401

    for module in preload:
        importlib.import_module(module)
    started_with = dict(os.environ)
    requests, clients = socket.socket(fileno=of_requests), socket.socket(fileno=of_clients)
    _sockets.extend((requests, clients))
    while True:
        ready, _, _ = select.select([requests, clients], [], [])
        if clients in ready:
            connection, _ = clients.accept()
            if os.fork() == 0:
                _watch(connection, started_with)
            connection.close()
        while _has_ended_child():
            pass
        if requests in ready:
            asked = _request(requests)
            if asked is None:
                return
            request, streams = asked
            number = _fork_away()
            if number == 0:
                _become(request, streams, started_with)
            for given in streams:
                os.close(given)
            requests.sendall(_SIZE.pack(number))


def _has_ended_child() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _watch(connection: socket.socket, started_with: dict[str, str]) -> None:
    """Start the program of a client, and send the number of its process and how it ended."""
    _sockets.append(connection)
    asked = _request(connection)
    if asked is None:
        os._exit(0)
    number = os.fork()
    if number == 0:
        _become(*asked, started_with)
    connection.sendall(_SIZE.pack(number))
    for given in asked[1]:
        os.close(given)
    _, status = os.waitpid(number, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(_SIZE.pack(status))
    os._exit(0)


def _request(requests: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return a request and its three descriptors, or None at the end of the socket."""
    header, streams, _, _ = socket.recv_fds(requests, _SIZE.size, 3)
    if not header:
        return None
    header += _received(requests, _SIZE.size - len(header))
    return json.loads(_received(requests, _SIZE.unpack(header)[0])), streams


def _fork_away() -> int:
    """Return 0 in a new process, which the parent of this one adopts, and its number here."""
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        here = os.getpid()
        number = os.fork()
        if number == 0:
            while os.getppid() == here:
                time.sleep(1e-4)
            return 0
        os.write(writer, _SIZE.pack(number))
        os._exit(0)
    os.waitpid(between, 0)
    number = _SIZE.unpack(os.read(reader, _SIZE.size))[0]
    os.close(reader)
    os.close(writer)
    return number


def _become(request: dict[str, Any], streams: list[int], started_with: dict[str, str]) -> NoReturn:
    """Run a program as the interpreter of this process would; raise SystemExit at its end."""
    for own, given in enumerate(streams):
        os.dup2(given, own)
    for left in _sockets:
        left.detach()  # its descriptor's number may become one of the program's own
    os.closerange(3, _MOST_DESCRIPTORS)
    environment, arguments = request["env"], request["arguments"]
    os.environ.clear()
    os.environ.update(environment)
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    if "OMP_NUM_THREADS" in environment:
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[0] == "-u":
        del arguments[0]
        environment["PYTHONUNBUFFERED"] = "1"
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    first = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*first, *(path for path in sys.path if path not in ("", _HERE))]
    kind, *rest = arguments
    try:
        _check(environment, started_with)
        if kind == "-m":
            sys.path.insert(0, request["cwd"])
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind in ("-c", "-"):
            program = sys.stdin.read() if kind == "-" else rest.pop(0)
            sys.path.insert(0, "")
            sys.argv = [kind, *rest]
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        elif kind.startswith("-"):
            print(f"{kind} needs a real interpreter", file=sys.stderr)
            raise SystemExit(2)
        else:
            if not Path(kind).is_dir():  # of a folder or an archive, runpy adds it itself
                sys.path.insert(0, str(Path(kind).resolve().parent))
            sys.argv = arguments
            runpy.run_path(kind, run_name="__main__")
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    raise SystemExit(0)


def _check(environment: dict[str, str], started_with: dict[str, str]) -> None:
    names = environment.keys() | started_with.keys()
    for name in sorted(name for name in names if name.startswith(_READ_AT_START)):
        if name not in _SET_LATER and environment.get(name) != started_with.get(name):
            raise ValueError(f"{name} needs a real interpreter, which reads it at its start")
