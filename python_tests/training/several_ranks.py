"""Starts the processes of a test as a launcher would, forked from one that has imported torch."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import warm_python

_HERE = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def run(module: str, directory: Path, size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Call `main(directory)` of a module in `size` processes; return how each has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        f"import sys; sys.path[:0] = {_HERE}\n"
        f"import pathlib, several_ranks, {module}\n"
        f"several_ranks.be_rank({{rank}}, {size}, {port})\n"
        f"{module}.main(pathlib.Path({str(directory)!r}))"
    )
    commands = [["-c", program.format(rank=rank)] for rank in range(size)]
    return warm_python.run_together(commands)


def be_rank(rank: int, size: int, port: int) -> None:
    """Set the variables of a launcher for this process, which computes with one thread."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)


def error_of(make: Callable[[], Any]) -> str:
    """Return the error of a call; "" for none."""
    try:
        make()
    except ValueError as error:
        return str(error)
    return ""
