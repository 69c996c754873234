"""Compile the CUDA sources and report each kernel's registers and memory.

    python tools/cuda_resources.py [--build-dir build/cuda] [--architectures 80 90a]

The check fails if a kernel uses local memory, or declares more shared memory than launch.cuh counts
on. Any torch suffices, and no GPU is needed, because nothing is linked or run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_LAUNCH = ROOT / "csrc/kernels/cuda/launch.cuh"
_MOST_STATIC = re.compile(r"kMostStaticShared = (\d+) \* 1024;")


@dataclass(frozen=True)
class Usage:
    """The resources of one kernel on one architecture by ptxas, in registers and bytes."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether registers spill, or arrays lie in local memory."""
        return self.spills > 0 or self.stack > 0


def parse(log: str) -> list[Usage]:
    """Return the kernels in the log of a build whose compiler ran with -Xptxas=-v.

    Raises ValueError for a log that ptxas writes in another form.
    """
    usages = []
    for entry in re.split(r"(?=Compiling entry function)", log)[1:]:
        head, frame, registers = _ENTRY.match(entry), _FRAME.search(entry), _REGISTERS.search(entry)
        if head is None or frame is None or registers is None:
            raise ValueError(f"ptxas wrote something new: {entry[:300]!r}")
        stack, stores, loads = map(int, frame.groups())
        # Later lines of the text belong to other functions.
        shared = _SHARED.search(entry[: entry.find("\n", registers.start())])
        shared_bytes = int(shared[1]) if shared else 0
        usages.append(
            Usage(head["name"], head["architecture"], int(registers[1]), shared_bytes, stack,
                  stores + loads)
        )  # fmt: skip
    return usages


def demangle(names: list[str]) -> list[str]:
    """Return C++ names without their arguments; without c++filt the mangled names."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    text = subprocess.run([tool, *names], check=True, capture_output=True, text=True).stdout
    return [_short(name) for name in text.splitlines()]


def _short(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\(.*\)$", "", re.sub(r"\((\w|:| )+\)(?=\d)", "", name))


def table(usages: list[Usage]) -> str:
    """Return a table with a line per kernel.

    Where architectures differ, a cell has their numbers in the order of the heading.
    """
    architectures = list(dict.fromkeys(usage.architecture for usage in usages))
    names = demangle([usage.kernel for usage in usages])
    kernels: dict[str, list[Usage]] = {}
    for name, usage in sorted(zip(names, usages, strict=True), key=lambda pair: pair[0]):
        kernels.setdefault(name, []).append(usage)
    rows = [("kernel", "registers", "shared", "stack", "spills")]
    for name, group in kernels.items():
        group.sort(key=lambda usage: architectures.index(usage.architecture))
        rows.append((
            name,
            _numbers([usage.registers for usage in group]),
            _numbers([usage.shared for usage in group]),
            _numbers([usage.stack for usage in group]),
            _numbers([usage.spills for usage in group]),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([f"CUDA kernels for {', '.join(architectures)}:", *lines])


def _numbers(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))


def faults(usages: list[Usage]) -> list[str]:
    """Return a line for each kernel that is compiled in a way it must not be."""
    counted_on = _MOST_STATIC.search(_LAUNCH.read_text("utf-8"))
    if counted_on is None:
        raise ValueError(f"{_LAUNCH} does not say how much shared memory kernels may declare")
    most = 1024 * int(counted_on[1])
    lines = []
    for name, usage in zip(demangle([usage.kernel for usage in usages]), usages, strict=True):
        if usage.uses_local_memory:
            lines.append(f"{name} spills registers or uses local memory for {usage.architecture}")
        if usage.shared > most:
            lines.append(f"{name} declares {usage.shared} bytes of shared memory, above {most}")
    return lines


def build(directory: Path, nvcc: str, architectures: list[str]) -> str:
    """Compile all CUDA sources again, because only then the compiler reports; return its output."""
    chosen = ";".join(f"{name}-real" for name in architectures)
    configure = [
        *["cmake", "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"],
        *["-DSAE_FAST_MODULE=OFF", "-DSAE_FAST_CUDA_CHECK=ON", "-DSAE_FAST_WERROR=ON"],
        *[f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={nvcc}"],
        f"-DCMAKE_CUDA_ARCHITECTURES={chosen}",
    ]
    make = ["cmake", "--build", str(directory), "--target", "cuda_check", "--clean-first"]
    log = ""
    for command in (configure, make):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}\nthe CUDA sources do not compile: {' '.join(command)}")
        log = done.stdout
    return log


def main() -> None:
    """Compile, print the table, and exit with an error if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "cuda")
    parser.add_argument("--architectures", nargs="+", default=["80", "90a", "100"])
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tools"))
    from toolchain import find_nvcc

    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("no nvcc found (set CUDA_HOME)")
    usages = parse(build(arguments.build_dir, nvcc, arguments.architectures))
    if not usages:
        sys.exit("no kernel was compiled")
    print(table(usages))
    if found := faults(usages):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
