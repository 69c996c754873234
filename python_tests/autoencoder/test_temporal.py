"""Temporal smoothness against the dense difference of neighbouring codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_sae import PARAMETERS, left_gradients, make_batch, make_sae, plain_acts

from sae_fast.autoencoder import temporal_smoothness_loss
from sae_fast.ops import SparseCode, native

# The compiled kernels are float32; the reference takes float64, which shows a wrong formula.
DTYPE = torch.float32 if native.load() is not None else torch.float64
TOLERANCE = (
    {"rtol": 1e-4, "atol": 1e-5} if torch.float32 == DTYPE else {"rtol": 1e-9, "atol": 1e-11}
)


def plain_loss(acts, starts):
    """Return the temporal loss from a dense code [N, F]."""
    pairs = (~starts[1:]).nonzero().flatten()
    if len(pairs) == 0:
        return acts.new_zeros(())
    return (acts[pairs + 1] - acts[pairs]).square().sum(1).mean()


def make_starts(n_tokens, length=4):
    starts = torch.zeros(n_tokens, dtype=torch.bool)
    starts[::length] = True
    return starts


def make_code(n_rows, d_sae, k, seed, csr):
    """Make a code with some zero values, in rows of k entries or of any number."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(n_rows, d_sae, generator=generator).argsort(1)[:, :k].int()
    values = torch.randn(n_rows, k, generator=generator, dtype=DTYPE).relu()
    if not csr:
        return SparseCode(values.requires_grad_(), indices, d_sae)
    kept = torch.rand(n_rows, k, generator=generator) < 0.6
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    return SparseCode(values[kept].requires_grad_(), indices[kept], d_sae, offsets)


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(1, 12),
    d_sae=st.integers(1, 9),
    k=st.integers(0, 9),
    seed=st.integers(0, 99),
    csr=st.booleans(),
    data=st.data(),
)
def test_loss_and_gradient_equal_the_dense_difference(n_rows, d_sae, k, seed, csr, data):
    code = make_code(n_rows, d_sae, min(k, d_sae), seed, csr)
    starts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n_rows, max_size=n_rows)))
    loss = temporal_smoothness_loss(code, starts)
    expected = plain_loss(code.dense(), starts)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    if code.values.numel() == 0:
        return
    (gradient,) = torch.autograd.grad(loss, code.values)
    wanted = torch.zeros_like(gradient)
    if expected.requires_grad:
        (wanted,) = torch.autograd.grad(expected, code.values)
    # An entry of value 0 does not fire, so it gets none.
    wanted = torch.where(code.values > 0, wanted, 0.0)
    torch.testing.assert_close(gradient, wanted, **TOLERANCE)


def test_equal_neighbours_cost_exactly_nothing():
    values = torch.tensor([[1e4, 0.1, 3.0]] * 2, dtype=DTYPE)
    code = SparseCode(values, torch.tensor([[7, 2, 5], [7, 2, 5]]).int(), 9)
    assert temporal_smoothness_loss(code, torch.tensor([True, False])).item() == 0.0


def test_a_change_over_a_border_costs_nothing():
    values = torch.tensor([[1.0], [2.0], [4.0]], dtype=DTYPE)
    code = SparseCode(values, torch.zeros(3, 1).int(), 2)
    for starts, expected in (
        ([True, False, False], 2.5),
        ([True, False, True], 1.0),
        ([False, True, False], 4.0),
        ([False, True, True], 0.0),
    ):
        assert temporal_smoothness_loss(code, torch.tensor(starts)).item() == expected


@pytest.mark.parametrize("dense_grad", [True, False])
@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_gradient_equals_autograd_for_every_parameter(arch, dense_grad):
    fields = {"reconstruction_coeff": 0.0, "aux_k_coeff": 0.0, "temporal_smoothness_coeff": 0.7}
    sae = make_sae(dtype=DTYPE, arch=arch, **fields)
    x, starts = make_batch(sae), make_starts(30)
    loss = sae.training_loss(x, dense_grad=dense_grad, starts=starts)
    expected = 0.7 * plain_loss(plain_acts(sae, x), starts)
    assert expected.item() > 0.1
    torch.testing.assert_close(loss.total.detach(), expected.detach(), **TOLERANCE)
    torch.testing.assert_close(loss.components["temporal_loss"], expected.detach(), **TOLERANCE)
    loss.total.backward()
    parameters = [sae.get_parameter(name) for name in PARAMETERS]
    gradients = torch.autograd.grad(expected, parameters, materialize_grads=True)
    left = left_gradients(sae)
    for name, gradient in zip(PARAMETERS, gradients, strict=True):
        torch.testing.assert_close(left[name], gradient, **TOLERANCE)
    assert left["W_enc"].abs().sum() > 0


@pytest.mark.skipif(native.load() is None, reason="the reference's sums follow torch's threads")
def test_loss_and_gradient_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    found = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        sae = make_sae(d_sae=2000, k=32, temporal_smoothness_coeff=1.0)
        loss = sae.training_loss(make_batch(sae, 3000), dense_grad=False, starts=make_starts(3000))
        loss.total.backward()
        found.append([loss.components["temporal_loss"], *left_gradients(sae).values()])
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (None, "starts must be given with temporal_smoothness_coeff above 0"),
        (make_starts(29), r"starts must have shape \(30,\), got \(29,\)"),
    ],
)
def test_starts_that_do_not_fit_are_named(starts, message):
    sae = make_sae(temporal_smoothness_coeff=1.0)
    with pytest.raises(ValueError, match=message):
        sae.training_loss(make_batch(sae), starts=starts)
