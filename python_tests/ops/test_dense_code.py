"""DenseCode against SparseCode: values, derived codes, numbers of latents."""

import pytest
import torch

from sae_fast import ops
from sae_fast.ops import native

DTYPE = torch.float32 if native.load() is not None else torch.float64


def make_codes(n=20, d_in=6, d_sae=30, seed=0):
    """Make a code in both forms, from tensors that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, W, b_enc, b_dec = (
        torch.randn(shape, generator=generator).to(DTYPE)
        for shape in ((n, d_in), (d_sae, d_in), (d_sae,), (d_in,))
    )
    W.requires_grad_()
    sparse = ops.encode_threshold(x, W, b_enc, b_dec, torch.zeros_like(b_enc))
    return W, sparse, ops.encode_dense(x, W, b_enc, b_dec)


def test_values_equal_those_of_encode_threshold():
    _, sparse, dense = make_codes()
    torch.testing.assert_close(dense.dense(), sparse.dense(), rtol=1e-5, atol=1e-5)
    assert int(dense.n_listed) == sparse.n_listed > 0


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_spread_gives_every_entry_its_latents_number_and_sums_the_gradient(kind):
    _, sparse, dense = make_codes()
    code = sparse if kind == "sparse" else dense
    numbers = torch.linspace(-1, 1, 30, dtype=DTYPE, requires_grad=True)
    weighted = code.with_values(code.values.detach() * code.spread(numbers))
    expected = dense.dense().detach() * numbers.detach()
    torch.testing.assert_close(weighted.dense(), expected, rtol=1e-5, atol=1e-5)
    weighted.values.square().sum().backward()
    expected = 2 * numbers.detach() * dense.dense().detach().square().sum(0)
    torch.testing.assert_close(numbers.grad, expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_spread_leaves_out_entries_of_value_zero():
    values, indices = torch.tensor([[1.0, 0.0]], dtype=DTYPE), torch.tensor([[3, 4]]).int()
    numbers = torch.ones(6, dtype=DTYPE, requires_grad=True)
    ops.SparseCode(values, indices, 6).spread(numbers).sum().backward()
    assert numbers.grad.tolist() == [0, 0, 0, 1, 0, 0]


def test_derived_code_shares_the_view_of_its_base_but_fires_on_its_own():
    _, base, _ = make_codes()
    silenced = int(base.indices[0])
    values = torch.where(base.indices == silenced, 0, base.values.detach())
    derived = base.with_values(values)
    again = derived.with_values(values)
    assert again.key is derived.key is base.key
    assert again.latent_major()[1] is base.latent_major()[1]
    assert bool(base.fired()[silenced])
    assert not bool(derived.fired()[silenced])
    expected = base.fired().clone()
    expected[silenced] = False
    assert torch.equal(derived.fired(), expected)


def test_derived_code_asked_first_makes_the_view_of_its_base():
    _, base, _ = make_codes()
    derived = base.with_values(torch.zeros_like(base.values))
    assert derived.latent_major()[1].numel() == base.n_listed


@pytest.mark.parametrize("b_dec", [True, False])
def test_reconstruct_of_both_kinds_agrees(b_dec):
    W, sparse, dense = make_codes()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(3)).to(DTYPE)
    bias = torch.ones(6, dtype=DTYPE) if b_dec else None
    first, second = (ops.reconstruct(code, W, bias, x) for code in (sparse, dense))
    torch.testing.assert_close(first.residual, second.residual, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.squared_error, second.squared_error, rtol=1e-5, atol=1e-4)


def test_reconstruct_of_a_dense_code_takes_a_precision():
    W, _, dense = make_codes()
    x = torch.zeros(20, 6, dtype=DTYPE)
    rounded = dense.values.bfloat16().to(DTYPE) @ W.bfloat16().to(DTYPE)
    residual, squared_error = ops.reconstruct(dense, W, None, x, precision="bf16")
    torch.testing.assert_close(residual, rounded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squared_error, rounded.square().sum(1), rtol=1e-4, atol=1e-4)
