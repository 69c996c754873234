"""Losses of short trainings equal the losses in the file beside this one.

A change that should alter them writes the file again, in a commit of its own:
python python_tests/training/test_golden_losses.py
"""

import json
import sys
from pathlib import Path

import pytest

from sae_fast import train

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "tools"))

import compare_losses  # noqa: E402

GOLDEN = HERE / "golden_losses.json"
NAMES = (
    *("topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated", "transcoder, skip"),
    *("8-bit states", "schedule free"),
)
# Instruction sets differ by 1.5e-7 in 20 steps; a selection that differs changes more than this.
RTOL = 1e-5


def losses(name: str) -> list[float]:
    """Return the loss of each step of a training of compare_losses, in the current folder."""
    flags = (*compare_losses.COMMON, *compare_losses.TRAININGS[name])
    assert train.main([*flags, "--checkpoint-dir", f"runs/{name}"]) == 0
    lines = Path("runs", name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_what_they_were(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compare_losses.write_data(tmp_path)
    expected = json.loads(GOLDEN.read_text())[name]
    assert len(expected) == compare_losses.STEPS
    assert losses(name) == pytest.approx(expected, rel=RTOL)


if __name__ == "__main__":
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        compare_losses.write_data(Path(folder))
        found = {name: losses(name) for name in NAMES}
        os.chdir(HERE)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
