"""setuptools' build backend, compiling against the torch that is already installed.

pip builds in an isolated environment. A `torch` among the build requirements would be a second
download of several GB, and possibly another version than the one the extension will run with.
So the target environment's torch is used, and where there is none the build says how to get one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (every hook not defined below is setuptools')

OLDEST_TORCH = (2, 11)  # as TORCH_TARGET_VERSION in CMakeLists.txt
OLDEST_SETUPTOOLS = (77, 0)  # the first that reads `license = "MIT"`; as in pyproject.toml
BUILD_TOOLS = ["pybind11>=2.13", "cmake>=3.26", "ninja"]
NO_TORCH = (
    "sae_fast: the kernels are compiled against torch, and this environment has none of version "
    f"{'.'.join(map(str, OLDEST_TORCH))} or newer: install it first (`pip install torch`; for a "
    "machine without a GPU `pip install torch --index-url https://download.pytorch.org/whl/cpu`), "
    "or name the folder of one in SAE_FAST_TORCH_ROOT (uv and `python -m build` hide it), or set "
    "SAE_FAST_NATIVE=0 for the pure-PyTorch reference, which is many times slower"
)
_PROBE = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"


def refuse_old_setuptools(version: str) -> None:
    """Stops a build without isolation where setuptools is older than any that can do it."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_SETUPTOOLS:
        oldest = ".".join(map(str, OLDEST_SETUPTOOLS))
        sys.exit(
            f"sae_fast: setuptools {oldest} or newer is needed, found {version}: "
            "run `pip install --upgrade setuptools`, or install without --no-build-isolation"
        )


refuse_old_setuptools(setuptools.__version__)


def native_wanted() -> bool:
    """False for the pure-PyTorch reference, which is chosen by SAE_FAST_NATIVE=0 only."""
    choice = os.environ.get("SAE_FAST_NATIVE", "1")
    if choice not in ("0", "1"):
        sys.exit(f"sae_fast: SAE_FAST_NATIVE must be 0 or 1, got {choice!r}")
    return choice == "1"


def is_recent(torch: Path) -> bool:
    """Whether the torch in this folder has the stable ABI that the extension is written for."""
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return version is not None and tuple(map(int, version.groups())) >= OLDEST_TORCH


def torch_root() -> Path | None:
    """The folder of the torch to compile against. Torch itself is never imported."""
    if root := os.environ.get("SAE_FAST_TORCH_ROOT"):
        return Path(root)
    # pip hides the target environment through PYTHONPATH, which -E makes Python ignore.
    for flags in ([], ["-E"]):
        probe = [sys.executable, *flags, "-c", _PROBE]
        origin = subprocess.run(probe, check=True, capture_output=True, text=True).stdout.strip()
        if origin and is_recent(Path(origin).parent):
            return Path(origin).parent
    return None


def _build_tools() -> list[str]:
    """Return what a compiled build needs beside setuptools; stop where there is no torch."""
    if not native_wanted():
        return []
    if torch_root() is None:
        # Here, because later pip has downloaded all that the package depends on.
        sys.exit(NO_TORCH)
    return BUILD_TOOLS


def get_requires_for_build_wheel(config_settings: dict[str, object] | None = None) -> list[str]:
    return [*_build_tools(), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, object] | None = None) -> list[str]:
    return [*_build_tools(), *build_meta.get_requires_for_build_editable(config_settings)]
