"""The variants of TopK from the command line, on real activations."""

import json
import math
from pathlib import Path

import pytest
from slow_cases import slow_after

from sae_fast.train import main

ACTIVATIONS = Path(__file__).parents[2] / "examples" / "activations"
VARIANTS = {
    "annealed k": ("--k-anneal-start", "160", "--k-anneal-steps", "40"),
    "gram_sum": ("--decorrelation", "gram_sum", "--decorrelation-coeff", "1e-6"),
    "chunked_max": ("--decorrelation", "chunked_max", "--decorrelation-coeff", "1"),
    "kaiming": ("--decoder-init", "kaiming"),
    "active_subspace": ("--decoder-init", "active_subspace", "--b-dec-init", "geometric_median"),
    "multi_topk": ("--multi-topk",),
    "abs_topk": ("--activation", "abs_topk"),
    "groupmax": ("--activation", "groupmax"),
    "fvu": ("--loss-fn", "fvu"),
    "matryoshka": ("--arch", "matryoshka", "--matryoshka-prefixes", "64", "256", "768"),
}
COMMON = (
    *("--shard-dir", str(ACTIVATIONS), "--checkpoint-dir", "run", "--d-sae", "768", "--k", "16"),
    *("--batch-size", "512", "--max-steps", "80", "--lr", "3e-3", "--num-threads", "1"),
    *("--dead-after-tokens", "4000", "--eval-every", "0", "--checkpoint-every", "0"),
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", slow_after(2, VARIANTS))
def test_variant_trains_from_the_command_line(variant: str) -> None:
    assert main([*COMMON, *VARIANTS[variant]]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["heldout_fvu"] < 0.5  # the mean predictor has 1
