"""The compiled module `sae_fast._C`: found, refused by choice, or missing with one clear reason.

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

_REBUILD = "run `pip install .` in a checkout of sae_fast"
_REFERENCE = "or set SAE_FAST_NATIVE=0 for the pure-PyTorch reference, which is many times slower"


@functools.cache
def load() -> ModuleType | None:
    """The compiled module, or None where the reference was chosen; ImportError where neither."""
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
            f"sae_fast has no compiled module for Python {platform.python_version()}: "
            f"{_REBUILD}, {_REFERENCE}"
        )
    try:
        return importlib.import_module("sae_fast._C")
    except ImportError as error:
        raise ImportError(
            f"sae_fast's compiled module, {_built_with(Path(spec.origin))}, does not load with "
            f"torch {torch.__version__} ({error}): {_REBUILD}, {_REFERENCE}"
        ) from error


def reference_reason() -> str | None:
    """Why the pure-PyTorch reference is in use, or None where the compiled module is."""
    if load() is not None:
        return None
    if os.environ.get("SAE_FAST_NATIVE") == "0":
        return "SAE_FAST_NATIVE=0 is set"
    return "installed with SAE_FAST_NATIVE=0"


def build_info() -> dict[str, object]:
    """How the ops in use were built.

    `backend` is "native" or "reference". A native build adds `compiler`, `torch` (compiled
    against), `instruction_sets` (compiled in), `instruction_set` (in use), `cuda` (version, or
    empty), `cuda_architectures` and `why_no_cuda`; the reference adds `reason`.
    """
    module = load()
    if module is None:
        return {"backend": "reference", "reason": reference_reason()}
    return {
        "backend": "native",
        **module.build_info(),
        "instruction_set": module.instruction_set(),
        "available_instruction_sets": module.available_instruction_sets(),
    }


def _is_reference_install() -> bool:
    return _find("_reference_install") is not None


def _built_with(module: Path) -> str:
    found = re.search(rb"sae_fast (built with torch [\w.+]+)", module.read_bytes())
    return found[1].decode() if found else "of an unknown build"


def _find(name: str) -> ModuleSpec | None:
    """A module of this very package: an editable install elsewhere would offer its own."""
    return PathFinder.find_spec(f"sae_fast.{name}", [str(Path(__file__).parents[1])])
