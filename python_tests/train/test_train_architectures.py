"""`python -m sae_fast.train --arch …` on real activations, for the architectures without a k."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.train import main

SAMPLE = Path(__file__).resolve().parents[2] / "examples" / "activations"
RUN = (
    *("--shard-dir", str(SAMPLE), "--d-sae", "256", "--batch-size", "256", "--max-steps", "120"),
    *("--lr", "3e-3", "--log-every", "20", "--eval-every", "0", "--checkpoint-every", "0"),
    *("--num-threads", "1"),
)
MODELS: dict[str, tuple[str, ...]] = {
    "relu": ("--arch", "relu"),
    "relu, unit rows": ("--arch", "relu", "--decoder-norm", "unit", "--l1-penalty-coeff", "2"),
    "jumprelu": ("--arch", "jumprelu", "--jumprelu-threshold-lr", "3"),
    "jumprelu, Anthropic's": (
        *("--arch", "jumprelu", "--sparsity-penalty", "tanh", "--decoder-norm", "free"),
        *("--jumprelu-init-threshold", "0.1", "--jumprelu-bandwidth", "2"),
        *("--jumprelu-ste-to-input", "--pre-act-loss-coeff", "3e-6"),
    ),
    "gated": ("--arch", "gated"),
    "gated, fvu": ("--arch", "gated", "--loss-fn", "fvu"),
}


def _rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_training_on_real_activations_ends_sparse_and_far_better_than_the_mean(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, *MODELS[model], "--checkpoint-dir", str(tmp_path)]) == 0
    rows = _rows(tmp_path)
    numbers = [value for row in rows for name, value in row.items() if name != "dead_fraction"]
    assert all(map(math.isfinite, numbers))
    assert rows[-1]["l0"] < rows[0]["l0"]
    assert 1 < rows[-1]["l0"] < 64  # of 256, half of which a new relu model has
    assert rows[-1]["heldout_fvu"] < 0.6
    terms = sum(value for name, value in rows[-1].items() if name.endswith("_loss"))
    assert terms == pytest.approx(rows[-1]["loss"], rel=1e-4)
    sae = SparseAutoencoder.from_pretrained(tmp_path / "checkpoints" / "latest")
    code = sae.encode(torch.zeros(3, 384))
    assert sae.decode(code).isfinite().all()
    assert "trained 120 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--arch", "relu", "--k", "32"), "k belongs to arch topk or batch_topk"),
        (("--arch", "relu", "--aux-k-coeff", "0.03"), "aux_k_coeff belongs to arch topk"),
        (("--arch", "jumprelu", "--k", "32"), "k belongs to arch topk or batch_topk"),
        (("--arch", "jumprelu", "--l1-penalty-coeff", "5"), "l1_penalty_coeff belongs to arch"),
        (("--arch", "gated", "--jumprelu-bandwidth", "1"), "jumprelu_bandwidth belongs to arch"),
        (("--arch", "topk", "--target-l0", "8"), "target_l0 belongs to arch relu or"),
        (("--arch", "gated", "--target-l0", "9999"), "target_l0 must be at most d_sae = 256"),
    ],
)
def test_contradictory_flags_are_one_line(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
