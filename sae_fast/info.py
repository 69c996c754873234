"""Print versions, how the kernels were built and what runs here: `python -m sae_fast.info`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import sae_fast
from sae_fast.config.command_line import CommandLine
from sae_fast.machine import cpu_name, usable_cores
from sae_fast.output_streams import run_command

_PACKAGES = ("numpy", "h5py", "safetensors")


def describe() -> str:
    """Return the report as text, one fact a line."""
    import torch

    lines = [
        ("sae_fast", f"{sae_fast.__version__}, {Path(sae_fast.__file__).parent}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", torch.__version__),  # its package metadata may leave out which build it is
        *((name, _version(name)) for name in _PACKAGES),
        *_kernel_lines(sae_fast.build_info()),
        ("CPU", f"{cpu_name()}, {usable_cores()} usable cores"),
        ("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS or torch.set_num_threads)"),
        *_cuda_device_lines(),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernel_lines(info: dict[str, object]) -> list[tuple[str, str]]:
    if info["backend"] == "reference":
        return [("kernels", f"pure-PyTorch reference, many times slower: {info['reason']}")]
    cuda = f"none; reason at the build: {info['why_no_cuda']}"
    if info["cuda"]:
        cuda = f"CUDA {info['cuda']}, architectures {_words(info['cuda_architectures'])}"
    lines = [
        ("kernels", f"compiled by {info['compiler']} against torch {info['torch']}"),
        ("instruction set", f"{info['instruction_set']} (SAE_FAST_ISA chooses another)"),
        ("  this CPU has", _words(info["available_instruction_sets"])),
        ("  compiled in", _words(info["instruction_sets"])),
    ]
    if info["refused_instruction_set"]:
        lines.append(("  refused", str(info["refused_instruction_set"])))
    return [*lines, ("CUDA kernels", cuda)]


def _words(names: object) -> str:
    return " ".join(map(str, names)) if isinstance(names, (list, tuple)) else str(names)


def _cuda_device_lines() -> list[tuple[str, str]]:
    import torch

    if torch.version.cuda is None:
        return [("CUDA devices", "none: the installed torch is a CPU build")]
    if not torch.cuda.is_available():
        return [("CUDA devices", "none found by torch")]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        name = f"{device.name}, sm_{device.major}{device.minor}, {memory:.1f} GiB"
        lines.append((f"cuda:{index}", name))
    return lines


def command_lines() -> list[CommandLine]:
    """Return no command line: the command has no flags."""
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    print(__doc__ if {"-h", "--help", "--help-all"} & set(arguments) else describe())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
