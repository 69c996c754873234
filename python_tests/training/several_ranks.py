"""Starts the processes of a test as a launcher would, forked from one that has imported torch.

And compares what they leave with what one process leaves.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import warm_python
from safetensors.torch import load_file
from torch import Tensor

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


def tensors_of(run: Path) -> dict[str, Tensor]:
    """Return the tensors of the last checkpoint of a run, but for the generators' states."""
    files = [run / "checkpoints/latest" / name for name in ("sae", "trainer")]
    found = {**load_file(f"{files[0]}.safetensors"), **load_file(f"{files[1]}.safetensors")}
    return {name: tensor for name, tensor in found.items() if not name.startswith("rng.")}


def assert_near(first: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Assert that two states are of equal selections, and equal to float32 rounding."""
    assert first.keys() == other.keys()
    for name, tensor in first.items():
        near = 2e-6 * float(tensor.double().abs().max()) if tensor.is_floating_point() else 0
        difference = (tensor.double() - other[name].double()).abs().max()
        assert float(difference) <= near, name
