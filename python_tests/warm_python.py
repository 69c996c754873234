"""Python programs in processes that are forked from one with torch, whose import takes seconds.

`run` is for tests that need a process of their own and not the start of an interpreter. Variables
that torch's libraries read when they are loaded, such as OMP_NUM_THREADS, have no effect on it.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

_SERVE = "import warm_python; warm_python.serve()"


def run(arguments, *, cwd=None, env=None):
    """Run Python with ["-c", code, …] or ["-m", module, …]; return what subprocess.run returns."""
    return run_together([arguments], cwd=cwd, env=env)[0]


def run_together(commands, *, cwd=None, env=None):
    """Run several programs at once; return the completed process of each, its output as text."""
    server = _server()
    request = {"commands": commands, "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    ends = json.loads(server.stdout.readline())
    return [subprocess.CompletedProcess(*end) for end in ends]


@functools.cache
def _server():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(_end, server, os.getpid())
    return server


def _end(server, owner):
    """Close the stdin of a server, at which it ends, unless this is a fork of its owner."""
    if os.getpid() == owner:
        server.communicate()


def serve():
    """Run the programs that are asked for on stdin, until that ends.

    A forked child leaves the loop by the SystemExit of its program.
    """
    import torch  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        running = [
            _start(arguments, request["cwd"], request["env"]) for arguments in request["commands"]
        ]
        ends = [
            (command, _code(child), _text(out), _text(err)) for command, child, out, err in running
        ]
        print(json.dumps(ends), file=answers, flush=True)


def _start(arguments, cwd, env):
    """Start a program in a forked process; return command, process number and files of output."""
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        _become(arguments, cwd, env)
    return [sys.executable, *arguments], child, out, err


def _code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _text(file):
    with file:
        file.seek(0)
        return file.read().decode()


def _become(arguments, cwd, env):
    """Run a program as the interpreter of this process would; raise SystemExit at its end."""
    import runpy

    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    kind, program, *rest = arguments
    sys.orig_argv = [sys.executable, *arguments]
    sys.argv = [kind, *rest]
    own = str(Path(__file__).parent)
    first = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = ["", *first, *(path for path in sys.path if path not in ("", own))]
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    raise SystemExit(0)
