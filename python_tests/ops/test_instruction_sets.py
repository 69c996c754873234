"""All instruction sets of this processor give equal codes."""

import os

import pytest
import torch
import warm_python
from slow_cases import slow_after

import sae_fast

AVAILABLE = sae_fast.build_info().get("available_instruction_sets", [])

CODES = """
import sys, torch, sae_fast
from sae_fast import ops
torch.manual_seed(0)
codes = []
for n, d_in, d_sae, k in ((300, 96, 1000, 24), (70, 200, 3000, 300), (40, 33, 500, 5)):
    x, W = torch.randn(n, d_in), torch.randn(d_sae, d_in)
    b_enc, b_dec = torch.randn(d_sae), torch.randn(d_in)
    for precision in ("screened", "bf16", "fp16"):
        code = ops.encode_topk(x, W, b_enc, b_dec, k, precision=precision)
        codes.append((code.values, code.indices))
    threshold = torch.full((d_sae,), 12.0)
    code = ops.encode_threshold(x, W, b_enc, b_dec, threshold, precision="screened")
    codes.append((code.values, code.indices))
products = []
for m, depth, p in ((40, 300, 70), (33, 1700, 20), (5, 60, 7)):
    left, right = torch.randn(m, depth), torch.randn(depth, p)
    products += [ops.dense_product(left, right, p) for p in ("screened", "bf16", "fp16")]
torch.save((sae_fast.build_info()["instruction_set"], codes, products), sys.argv[1])
"""


@pytest.fixture(scope="module")
def codes_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")

    def codes(level):
        path = folder / level
        if not path.exists():
            environment = {**os.environ, "SAE_FAST_ISA": level}
            done = warm_python.run(["-c", CODES, str(path)], env=environment)
            assert done.returncode == 0, done.stderr
        used, made, products = torch.load(path)
        assert used == level
        return made, products

    return codes


@pytest.mark.slow
@pytest.mark.skipif(len(AVAILABLE) < 2, reason="one instruction set at most")
@pytest.mark.parametrize("level", slow_after(1, AVAILABLE[:0:-1]))
def test_codes_are_those_of_the_portable_kernels(codes_of, level):
    for (values, indices), (wanted, wanted_indices) in zip(
        codes_of(level)[0], codes_of("portable")[0], strict=True
    ):
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
        # Latents may change places only if rounding decides between equal values.
        assert (indices != wanted_indices).sum() <= 2e-4 * indices.numel()


@pytest.mark.skipif(len(AVAILABLE) < 2, reason="one instruction set at most")
@pytest.mark.parametrize("level", slow_after(1, AVAILABLE[:0:-1]))
def test_dense_products_are_those_of_the_portable_kernels(codes_of, level):
    products = zip(codes_of(level)[1], codes_of("portable")[1], strict=True)
    for product, wanted in products:
        # With up to 1700 pairs of normal numbers |a||b| is 1700, and 1700 · 2^-24 is 1e-4.
        torch.testing.assert_close(product, wanted, rtol=0, atol=2e-4)
