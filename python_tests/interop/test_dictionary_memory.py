"""Reading and writing a large dictionary takes little memory beside the dictionary itself."""

import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys
from pathlib import Path
from sae_fast import SAEConfig, SparseAutoencoder

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

source, out = sys.argv[1:]
SparseAutoencoder(SAEConfig(arch="relu", d_in=8, d_sae=16)).export(f"{out}/small", "saelens")
before = status("VmRSS")
sae = SparseAutoencoder.from_pretrained(source)
print(status("VmHWM") - before)
sae.export(f"{out}/large", "saelens")
print(status("VmHWM") - before)
"""
D_IN, D_SAE = 512, 32768
WEIGHTS = 2 * D_IN * D_SAE * 4 / 1024  # KiB


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the memory is read from /proc")
def test_the_peak_is_near_the_weights(tmp_path):
    state = {
        "encoder.weight": torch.rand(D_SAE, D_IN) - 0.5,
        "encoder.bias": torch.zeros(D_SAE),
        "decoder.weight": torch.rand(D_IN, D_SAE) - 0.5,
        "bias": torch.zeros(D_IN),
    }
    torch.save(state, tmp_path / "ae.pt")
    line = [sys.executable, "-c", PROGRAM, str(tmp_path / "ae.pt"), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, written = (float(peak) / WEIGHTS for peak in done.stdout.split())
    assert read < 1.6
    assert written < 3.2  # with the codes of the rows that are compared, half of all latents
