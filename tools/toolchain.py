"""The compilers that a build of sae_fast can use; setup.py and the tests call this."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

NO_COMPILER = """\
sae_fast: no C++ compiler found ($CXX, c++, g++ and clang++ were tried). Either
  install one and run pip again (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), or
  install the pure-PyTorch reference, many times slower: SAE_FAST_NATIVE=0 pip install ."""


def find_compiler() -> str | None:
    """Return the C++ compiler that CMake will find: $CXX without its arguments, or a usual name."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for name in chosen[:1] or ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    return None


def find_nvcc() -> str | None:
    """Return nvcc from $CUDA_HOME, $CUDACXX or PATH, in this order; None if none is set.

    The file named by the environment variables may be missing.
    """
    if home := os.environ.get("CUDA_HOME"):
        return str(Path(home) / "bin" / "nvcc")
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def why_no_cuda(torch: Path, nvcc: str | None) -> str | None:
    """Return the reason why the CUDA backend cannot be built, or None if it can."""
    built = re.search(r"^cuda\b.*= '([\d.]+)'", (torch / "version.py").read_text(), re.M)
    if built is None:
        return "the installed torch is a CPU build"
    if nvcc is None or not Path(nvcc).exists():
        return "no nvcc found (set CUDA_HOME)"
    banner = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    toolkit = re.search(r"release ([\d.]+)", banner)
    if toolkit is None:
        return f"{nvcc} --version names no release"
    if toolkit[1].split(".")[0] != built[1].split(".")[0]:
        return f"nvcc {toolkit[1]} does not match torch's CUDA {built[1]}"
    return None
