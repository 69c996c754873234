"""Install the torch that the Makefile builds against: `python tools/install_torch.py`.

The environment variable TORCH replaces the torch of constraints.txt: by a version ("2.11.0"), a
requirement ("torch<2.13"), or any arguments of pip. Without an NVIDIA driver the CPU build is taken
from PyTorch's own index; pip's default index has the CUDA build for Linux. The constraints for
later installations are written to constraints.txt in the environment.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEADLINE = 5.0  # seconds for the index to answer
PINS = Path(__file__).resolve().parent.parent / "constraints.txt"
OTHER_TORCH_NEEDS = ("torch", "setuptools")  # pins that can contradict another torch


def wanted(choice: str) -> list[str]:
    """Return pip's arguments for a value of TORCH, which may be empty."""
    words = shlex.split(choice) or ["torch"]
    return [f"torch=={word}" if re.match(r"\d", word) else word for word in words]


def pins(choice: str) -> str:
    """Return constraints.txt, without the pins that would contradict a value of TORCH."""
    lines = PINS.read_text(encoding="utf-8").splitlines(keepends=True)
    names = OTHER_TORCH_NEEDS if choice.strip() else ()
    return "".join(line for line in lines if line.partition("==")[0] not in names)


def has_nvidia_driver() -> bool:
    """Return whether this machine has an NVIDIA driver, also under WSL."""
    places = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")
    return shutil.which("nvidia-smi") is not None or any(map(os.path.exists, places))


def why_unreachable(url: str, deadline: float = DEADLINE) -> str | None:
    """Return why an index does not answer within `deadline` seconds, or None if it does."""
    reasons = [f"no answer within {deadline:g} seconds"]

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{url}/torch/", method="HEAD")
            urllib.request.urlopen(request, timeout=deadline).close()
            reasons.clear()
        except (OSError, ValueError) as error:
            reasons[0] = str(getattr(error, "reason", error))

    # In a thread, because resolving a host name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(deadline)
    return reasons[0] if reasons else None


def index_arguments(arguments: list[str]) -> list[str]:
    """Return the options that add PyTorch's CPU index, if it is needed and answers."""
    chosen = any(word.startswith("-") for word in arguments)  # TORCH may name an index
    if chosen or not sys.platform.startswith("linux") or has_nvidia_driver():
        return []
    reason = why_unreachable(CPU_INDEX)
    if reason is None:
        # pip's default index stays in use, for the other packages. For one version pip prefers the
        # CPU build: it orders 2.13.0+cpu after 2.13.0.
        return ["--extra-index-url", CPU_INDEX]
    print(
        f"torch: {CPU_INDEX} cannot be reached ({reason}); taking the torch of pip's own index",
        flush=True,
    )
    return []


def main() -> int:
    """Install torch and write the constraints; return pip's exit code."""
    choice = os.environ.get("TORCH", "")
    constraints = Path(sys.prefix) / "constraints.txt"
    constraints.write_text(pins(choice), encoding="utf-8")
    arguments = wanted(choice)
    command = [*index_arguments(arguments), "-c", str(constraints), *arguments]
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    return subprocess.run([*pip, *command]).returncode


if __name__ == "__main__":
    sys.exit(main())
