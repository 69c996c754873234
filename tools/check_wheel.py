"""Install a wheel into clean environments and train with it: `python tools/check_wheel.py WHEEL`.

Each `--torch` adds an environment with that torch: a version or a requirement, like TORCH in the
Makefile. Without it there is one environment, with the torch of constraints.txt.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

INSTALL_TORCH = Path(__file__).resolve().parent / "install_torch.py"
TRAIN = """
import torch
import sae_fast
from sae_fast import RunConfig, SparseAutoencoder, Trainer

built = sae_fast.build_info()
assert built["backend"] == "native", built
data = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
config = RunConfig(k=8, expansion_factor=4, lr=1e-3, batch_size=512, max_steps=4)
sae = Trainer(config, data=data).train()
sae.save("model")
x_hat = SparseAutoencoder.from_pretrained("model")(data[:8])
assert torch.equal(x_hat, sae(data[:8])) and x_hat.isfinite().all()
print(f"trained with torch {torch.__version__}; built with {built['torch']}")
"""


def check(wheel: Path, torch: str) -> None:
    """Install a wheel beside a torch into a clean environment, and train outside any checkout."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / "env", with_pip=True)
        python = str(place / "env" / "bin" / "python")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SAE_", "PYTHON"))}

        def run(*arguments: str, **variables: str) -> None:
            line = [python, *arguments]
            subprocess.run(line, cwd=place, env={**environment, **variables}, check=True)

        run(str(INSTALL_TORCH), TORCH=torch)
        pins = str(place / "env" / "constraints.txt")
        run("-m", "pip", "install", "--disable-pip-version-check", "-c", pins, str(wheel.resolve()))
        run("-m", "sae_fast.info")
        run("-c", TRAIN)


def main() -> int:
    """Check the wheels one after the other; the first failed check ends the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument(
        "--torch", action="append", help="version or requirement; can be given several times"
    )
    options = parser.parse_args()
    for wheel in options.wheels:
        for torch in options.torch or [""]:
            print(f"checking {wheel.name} with {torch or 'the pinned torch'}", flush=True)
            check(wheel, torch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
