"""code_correlation against the definition over all pairs of latents, in float64."""

import pytest
import torch
from device_ops import ops, public
from example_settings import examples
from hypothesis import example, given
from hypothesis import strategies as st
from op_samples import make_codes
from tolerances import close

from sae_fast.ops import reference
from sae_fast.ops.registry import NATIVE

pytestmark = pytest.mark.usefixtures("ops_on_device")

SHAPES = [(2, 1), (5, 3), (9, 70), (33, 200), (64, 700), (70, 90), (130, 40), (200, 300)]


def unit_columns(h):
    """Return centred columns of unit length, zeros for silent ones; and 1 / their length."""
    h = h.double()
    centred = h - h.mean(0)
    norms = torch.linalg.vector_norm(centred, dim=0)
    silent = norms <= 2.0**-20 * torch.linalg.vector_norm(h, dim=0)
    inverse = (~silent) / torch.where(silent, 1.0, norms)
    return centred * inverse, inverse


def over_pairs(h, split):
    """Return (within, between) by the definition, from the F x F matrix of correlations."""
    unit, _ = unit_columns(h)
    squares = (unit.t() @ unit).square()
    within = squares[:split, :split]
    return within.sum() - within.diagonal().sum(), squares[:split, split:].sum()


def gradients(h, split, of_within=1.0, of_between=1.0):
    """Return d (of_within * within + of_between * between) / dh, in float64."""
    leaf = h.double().requires_grad_()
    within, between = over_pairs(leaf, split)
    (of_within * within + of_between * between).backward()
    return leaf.grad


def gradient_size(h):
    """Return the size of the terms of a column's gradient, most of which are along z."""
    unit, inverse = unit_columns(h)
    unit = unit.abs()
    return (8 * (unit @ unit.t()) @ unit * inverse).amax(0).expand_as(h)


def check(h, split):
    """Check both sums and the gradients of both."""
    outputs = ops.code_correlation(h, split)
    within, between, n_active = outputs[:3]
    active = unit_columns(h)[1] > 0
    assert n_active.tolist() == [int(active[:split].sum()), int(active[split:].sum())]
    expected = over_pairs(h, split)
    n_terms = len(h) + h.shape[1]
    close(within, expected[0], terms=n_terms, magnitude=expected[0] + n_active[0])
    close(between, expected[1], terms=n_terms, magnitude=expected[1] + n_active.min())
    one = torch.tensor(1.0)
    grad = ops.code_correlation_backward(one, one, h, split, *outputs[3:])
    close(grad, gradients(h, split), terms=n_terms, magnitude=gradient_size(h))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("active", [0.1, 1.0])
@pytest.mark.parametrize(("n", "d_sae"), SHAPES)
def test_sums_and_gradient_are_those_of_all_pairs(n, d_sae, active, share):
    check(make_codes(n, d_sae, active=active), round(share * d_sae))


@examples(60)
@given(st.integers(1, 80), st.integers(0, 150), st.floats(0, 1), st.integers(0, 10_000))
@example(1, 1, 1.0, 0)
@example(65, 1, 0.0, 0)
def test_any_shape_with_silent_constant_and_equal_latents(n, d_sae, share, seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d_sae, generator=generator)
    kinds = torch.randint(0, 6, (d_sae,), generator=generator)
    h[:, kinds == 0] = 0.0  # dead
    h[:, kinds == 1] = 1e3  # constant
    h[:, kinds == 2] += 1e3  # a large mean, so that the deviations are known to 1e-4
    h[:, kinds == 3] = h[:, kinds == 3][:, :1].expand(n, -1) * 1e-3  # equal
    h[:, kinds == 4] = h[:, kinds == 4].relu()
    check(h, round(share * d_sae))


def test_one_token_makes_every_latent_silent():
    within, between, n_active, _, inverse_norms, gram = ops.code_correlation(make_codes(1, 5), 3)
    assert within == between == 0
    assert n_active.tolist() == [0, 0]
    assert not inverse_norms.any()
    assert not gram.any()


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0)])
def test_nothing_is_no_correlation(shape):
    outputs = ops.code_correlation(torch.zeros(shape), 0)
    assert outputs[0] == outputs[1] == 0
    one = torch.tensor(1.0)
    grad = ops.code_correlation_backward(one, one, torch.zeros(shape), 0, *outputs[3:])
    assert grad.shape == shape


def test_equal_latents_have_correlation_one():
    h = torch.tensor([1.0, 0.0, 3.0, 0.5])[:, None] * torch.tensor([1.0, 2.0, -1.0, 5.0, -0.25])
    within, between, n_active, *_ = ops.code_correlation(h, 3)
    close(within, torch.tensor(6.0, dtype=torch.float64), terms=9)
    close(between, torch.tensor(6.0, dtype=torch.float64), terms=9)
    assert n_active.tolist() == [3, 2]


def test_correlations_do_not_depend_on_scale_and_offset():
    h = make_codes(40, 60)
    expected = over_pairs(h, 20)
    other = h * torch.linspace(0.5, 1e5, 60) + torch.linspace(-300.0, 300.0, 60).round()
    for found, wanted in zip(ops.code_correlation(other, 20), expected, strict=False):
        # The offset rounds the deviations, by at most 300 / 0.1 of their own roundings.
        assert abs(found.item() / wanted.item() - 1) < 3000 * 2.0**-24


@pytest.mark.parametrize("jitter", [2.0**-24, 2.0**-23])
def test_latent_that_varies_by_rounding_alone_is_silent(jitter):
    h = make_codes(40, 10)
    h[:, 4] = 0.7 * (1 + jitter * (torch.arange(40) % 7 - 3))
    outputs = ops.code_correlation(h, 10)
    assert outputs[2].tolist() == [9, 0]
    others = ops.code_correlation(torch.cat([h[:, :4], h[:, 5:]], 1), 9)
    close(outputs[0], others[0].double(), terms=40)
    grad = ops.code_correlation_backward(torch.tensor(1.0), None, h, 10, *outputs[3:])
    assert not grad[:, 4].any()
    assert grad[:, 5].any()


def test_latent_that_varies_by_more_than_rounding_is_active():
    h = make_codes(40, 10)
    h[:, 4] = 0.7 + 2.0**-17 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    check(h, 6)
    assert ops.code_correlation(h, 6)[2].tolist() == [6, 4]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_number_that_is_not_finite_shows_in_the_sums(value):
    h = make_codes(20, 30)
    h[3, 2] = value
    outputs = ops.code_correlation(h, 20)
    assert outputs[0].isnan()
    assert outputs[1].isnan()
    assert outputs[2].tolist() == [20, 10]


def test_gradient_of_one_sum_alone():
    h = make_codes(30, 80, active=0.4)
    saved = ops.code_correlation(h, 50)[3:]
    half = torch.tensor(0.5)
    for grads, factors in (((half, None), (0.5, 0.0)), ((None, half), (0.0, 0.5))):
        found = ops.code_correlation_backward(*grads, h, 50, *saved)
        close(found, gradients(h, 50, *factors), terms=110, magnitude=gradient_size(h))
    assert not ops.code_correlation_backward(half, None, h, 50, *saved)[:, 50:].any()
    assert not ops.code_correlation_backward(None, None, h, 50, *saved).any()


def test_input_need_not_be_contiguous():
    h = make_codes(30, 80)
    turned = h.t().contiguous().t()
    for found, expected in zip(
        ops.code_correlation(turned, 50), ops.code_correlation(h, 50), strict=True
    ):
        assert torch.equal(found, expected)


def test_one_group_is_the_default():
    h = make_codes(30, 80)
    found, expected = public.code_correlation(h), public.code_correlation(h, 80)
    assert torch.equal(found.within, expected.within)
    assert found.n_active.tolist() == [80, 0]
    assert found.between == 0


def test_hundred_thousand_latents_take_no_matrix_of_all_pairs():
    n, d_sae, split = 64, 100_006, 100_000  # all pairs would be 40 GB
    h = make_codes(n, d_sae, active=0.3)
    outputs = ops.code_correlation(h, split)
    one = torch.tensor(1.0)
    grad = ops.code_correlation_backward(one, None, h, split, *outputs[3:])
    wanted = reference.code_correlation(h.double(), split)
    close(outputs[0], wanted[0], terms=d_sae)
    close(outputs[1], wanted[1], terms=d_sae)
    some = torch.cat(
        [h[:, :300], h[:, -6:]], 1
    )  # columns whose gradient comes from all other columns
    unit, inverse = unit_columns(some)
    p = 4 * wanted[5][0] @ unit
    expected = (p - (p * unit).sum(0) * unit) * inverse
    expected[:, 300:] = 0.0
    size = 8 * wanted[5][0].abs() @ unit.abs() * inverse
    found = torch.cat([grad[:, :300], grad[:, -6:]], 1)
    close(found, expected, terms=n, magnitude=size.amax(0).expand(n, -1))


@pytest.mark.parametrize("split", [0, 4, 7, 12])
def test_reference_is_the_definition(split):
    h = torch.randn(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h[:, 3], h[:, 9] = 2.0, 0.0
    within, between, n_active, *saved = reference.code_correlation(h, split)
    expected = over_pairs(h, split)
    torch.testing.assert_close(within, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(between, expected[1], rtol=1e-12, atol=1e-12)
    assert n_active.sum() == 10
    factors = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    grad = reference.code_correlation_backward(*factors, h, split, *saved)
    torch.testing.assert_close(grad, gradients(h, split, 0.7, -1.3), rtol=1e-11, atol=1e-12)


@pytest.mark.skipif(NATIVE, reason="the compiled ops are float32 only")
def test_gradcheck_passes_in_float64():
    h = make_codes(6, 9).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: public.code_correlation(h, 5)[:2], (h,))
