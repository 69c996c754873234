"""A setuptools build backend that compiles against the torch that is already installed.

pip builds in an isolated environment. A `torch` among the build requirements would be a second
download of several GB, and possibly of another version than the extension will run with. So the
build uses the torch of the target environment; without one it stops and says how to install it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that are not defined below)

OLDEST_TORCH = (2, 11)  # equal to TORCH_TARGET_VERSION in cmake/torch.cmake
OLDEST_SETUPTOOLS = (77, 0)  # the first that reads `license = "MIT"`; equal to pyproject.toml's
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
    """Exit with an error if setuptools is too old, as it can be in a build without isolation."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_SETUPTOOLS:
        oldest = ".".join(map(str, OLDEST_SETUPTOOLS))
        sys.exit(
            f"sae_fast: setuptools {oldest} or newer is needed, found {version}: "
            "run `pip install --upgrade setuptools`, or install without --no-build-isolation"
        )


refuse_old_setuptools(setuptools.__version__)


def native_wanted() -> bool:
    """Return whether to compile the kernels; SAE_FAST_NATIVE=0 selects pure PyTorch instead."""
    choice = os.environ.get("SAE_FAST_NATIVE", "1")
    if choice not in ("0", "1"):
        sys.exit(f"sae_fast: SAE_FAST_NATIVE must be 0 or 1, got {choice!r}")
    return choice == "1"


def is_recent(torch: Path) -> bool:
    """Return whether the torch in this folder has the stable ABI that the extension uses."""
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return version is not None and tuple(map(int, version.groups())) >= OLDEST_TORCH


def torch_root() -> Path | None:
    """Return the folder of the torch to compile against, without importing torch; None if none."""
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
    """Return a compiled build's requirements beside setuptools; exit if there is no torch."""
    if not native_wanted():
        return []
    if torch_root() is None:
        # Checked here, before pip downloads the dependencies of the package.
        sys.exit(NO_TORCH)
    return BUILD_TOOLS


def get_requires_for_build_wheel(config_settings: dict[str, object] | None = None) -> list[str]:
    return [*_build_tools(), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, object] | None = None) -> list[str]:
    return [*_build_tools(), *build_meta.get_requires_for_build_editable(config_settings)]
