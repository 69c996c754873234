"""The compiled module `sae_fast._C`: loaded, declined, or missing with one clear reason.

There is no silent fallback. The pure-PyTorch reference runs where it was asked for, by
SAE_FAST_NATIVE=0 in the environment or when sae_fast was installed, and nowhere else.
"""

import functools
import importlib
import os
import platform
import re
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import torch  # loads libtorch, which _C links to

from sae_fast.import_errors import refuse

_REBUILD = "run `pip install .` in a checkout of sae_fast"
_VERSION = re.compile(r"cpython-(\d)(\d+)")  # in the name of a module
_REFERENCE = "or set SAE_FAST_NATIVE=0 for the pure-PyTorch reference, which is many times slower"


@functools.cache
def load() -> ModuleType | None:
    """Return the compiled module, or None if the reference was chosen.

    Raises:
        ImportError: if neither is available, in one line that names the cause and the remedy.
    """
    try:
        return _load()
    except ImportError as error:
        refuse(error)


def _load() -> ModuleType | None:
    choice = os.environ.get("SAE_FAST_NATIVE")
    if choice not in (None, "0", "1"):
        raise ImportError(f"SAE_FAST_NATIVE must be 0 or 1, got {choice!r}")
    if choice == "0":
        return None
    spec = _find("_C")
    if spec is None or spec.origin is None:
        if choice is None and _is_reference_install():
            return None
        raise ImportError(
            f"sae_fast has no compiled module for Python {platform.python_version()}"
            f"{_other_pythons()}: {_REBUILD}, {_REFERENCE}"
        )
    try:
        module = importlib.import_module("sae_fast._C")
    except ImportError as error:
        raise ImportError(_why_not(str(error), Path(spec.origin))) from error
    try:
        module.instruction_set()
    except RuntimeError as error:  # of SAE_FAST_ISA
        raise ImportError(str(error)) from None
    return module


def reference_reason() -> str | None:
    """Return why the pure-PyTorch reference is in use, or None if the compiled module is."""
    if load() is not None:
        return None
    if os.environ.get("SAE_FAST_NATIVE") == "0":
        return "SAE_FAST_NATIVE=0 is set"
    return "installed with SAE_FAST_NATIVE=0"


def describe_kernels() -> str:
    """Return one line on the kernels in use."""
    info = build_info()
    if info["backend"] == "reference":
        return f"kernels: pure-PyTorch reference, many times slower: {info['reason']}"
    cuda = f", CUDA {info['cuda']}" if info["cuda"] else ""
    return f"kernels: compiled, {info['instruction_set']}{cuda}"


def build_info() -> dict[str, object]:
    """Return how the ops in use were built.

    `backend` is "native" or "reference". A native build adds `compiler`, `torch` (compiled
    against), `instruction_sets` (compiled in), `instruction_set` (in use),
    `refused_instruction_set` (one that this CPU has and the operating system refuses, with the
    reason, or empty), `cuda` (version, or empty), `cuda_architectures` and `why_no_cuda`; the
    reference adds `reason`.
    """
    module = load()
    if module is None:
        return {"backend": "reference", "reason": reference_reason()}
    return {
        "backend": "native",
        **module.build_info(),
        "instruction_set": module.instruction_set(),
        "available_instruction_sets": module.available_instruction_sets(),
        "refused_instruction_set": module.refused_instruction_set(),
    }


def _is_reference_install() -> bool:
    return _find("_reference_install") is not None


def _why_not(error: str, module: Path) -> str:
    """Name the cause that the dynamic linker's message gives, and the remedy that helps."""
    error = " ".join(error.split())
    start, end = "sae_fast's compiled module", f"({error})"
    missing = re.search(r"(\S+): version `(\S+)' not found", error)
    if missing and "libstdc++" in missing[1]:
        return (
            f"{start} needs {missing[2]}, and the C++ library that was found first, {missing[1]}, "
            "is older than the compiler's: put the newer libstdc++.so.6 first in "
            f"LD_LIBRARY_PATH or update it (conda: `conda install libstdcxx-ng`), {_REFERENCE} "
            f"{end}"
        )
    if missing:
        return (
            f"{start} needs {missing[2]} of {missing[1]}, which is older: this system is older "
            f"than the one that it was built on; {_REBUILD}, {_REFERENCE} {end}"
        )
    library = re.search(r"(\S+): cannot open shared object file", error)
    if library:
        return (
            f"{start}, {_built_with(module)}, needs {library[1]}, which is not there with torch "
            f"{torch.__version__}: {_REBUILD} with this torch, {_REFERENCE} {end}"
        )
    if re.search("file too short|invalid ELF header|wrong ELF class|cannot read file", error):
        return f"{start} is damaged or of another machine: {_REBUILD}, {_REFERENCE} {end}"
    return (
        f"{start}, {_built_with(module)}, does not load with torch {torch.__version__} ({error}): "
        f"{_REBUILD}, {_REFERENCE}"
    )


def _other_pythons() -> str:
    """Name the versions of Python for which there is a module."""
    names = [path.name for path in Path(__file__).parents[1].glob("_C.*.so")]
    matches = [match for name in names if (match := _VERSION.search(name)) is not None]
    versions = sorted({f"{match[1]}.{match[2]}" for match in matches})
    return f", only for {', '.join(versions)}" if versions else ""


def _built_with(module: Path) -> str:
    match = re.search(rb"sae_fast (built with torch [\w.+]+)", module.read_bytes())
    return match[1].decode() if match else "of an unknown build"


def _find(name: str) -> ModuleSpec | None:
    """Return a module of this very package: an editable install elsewhere would offer another."""
    return PathFinder.find_spec(f"sae_fast.{name}", [str(Path(__file__).parents[1])])
