"""The machine, the versions and the command behind a table."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

CPU = torch.device("cpu")
# Environment variables that change what is measured.
VARIABLES = (
    *("SAE_FAST_ISA", "SAE_FAST_NATIVE"),
    *("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA"),
)
DISTRIBUTIONS = {
    "sparsify": "eai-sparsify",
    "saelens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
}


def device_or_exit(name: str) -> torch.device:
    """Return the device of that name; exit with a one-line error if there is none."""
    from sae_fast.training.device import checked_device

    try:
        return checked_device(name)
    except ValueError as error:
        sys.exit(str(error))


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """Return the name of the instruction set that sae_fast's kernels use here."""
    try:
        from sae_fast import _C
    except ImportError:
        return "none (PyTorch reference)"
    return str(_C.instruction_set())


def describe_machine(device: torch.device = CPU) -> dict[str, str | int]:
    """Return the machine's facts and the versions, which are stored with the numbers."""
    import sae_fast  # here, because the peers' interpreters import this file without it

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "sae_fast_instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sae_fast": sae_fast.__version__,
        **({} if device.type == "cpu" else describe_gpu(device)),
    }


def describe_gpu(device: torch.device) -> dict[str, str | int]:
    """Return the GPU, its driver and its current clocks, as nvidia-smi reports them."""
    properties = torch.cuda.get_device_properties(device)
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        line = ""
    index = device.index or 0
    rows = [row.split(", ") for row in line.strip().splitlines()]
    values = rows[index] if index < len(rows) else []
    known = dict(zip(fields, values, strict=False))
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30),
        "gpu_multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or "none",
        **{field.replace(".", "_"): known.get(field, "unknown") for field in fields},
    }


def distribution_version(name: str) -> str:
    """Return the version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def command_line(module: str) -> str:
    """Return the command of this run, with paths shortened to their last part."""
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    arguments = [shorten(argument) for argument in sys.argv[1:]]
    return shlex.join([*variables, "python", "-m", module, *arguments])


def shorten(argument: str) -> str:
    """Return an argument with an absolute path cut to its last part; NAME=PATH keeps NAME."""
    name, separator, path = argument.rpartition("=")
    if not os.path.isabs(path):
        return argument
    return f"{name}{separator}{Path(path).name}"
