"""Moments in bfloat16 and 8 bits in fused_update_."""

import re

import pytest
import torch
from example_settings import examples
from hypothesis import example, given
from hypothesis import strategies as st
from op_samples import (
    LOW_MOMENTS,
    coded_moments,
    ops,
    place,
)
from tolerances import close

from sae_fast import ops as public
from sae_fast.ops import reference
from sae_fast.ops.reference.moments import EXP_AVG, EXP_AVG_SQ, decode_moment, moment_blocks
from sae_fast.ops.registry import NATIVE

pytestmark = pytest.mark.usefixtures("ops_on_device")

# With grad_scale 1, decay 1, beta1 3/4, beta2 1/2 a moment is rounded only once.
ROUNDED_ONCE = torch.tensor([1.0, 1.0, 0.25, 0.5, 0.5, 1e-2, 1.0, 1e-8, 0.0, 0.0, 0.0])
EXP_AVG_SCALE = place("fused_update_", "exp_avg_scale")
STEP_COUNT = place("fused_update_", "step_count")


def normal(d_sae, d_in, seed):
    """Return normal rows of very different sizes, every fifth of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    rows = 10 ** (3 * torch.randn(d_sae, 1, generator=generator))
    rows[::5] = 0
    return rows * torch.randn(d_sae, d_in, generator=generator)


def arguments_of(W, moments, grad, step, scalars=ROUNDED_ONCE):
    """Return all arguments of fused_update_ for a given gradient, without options."""
    d_sae, d_in = W.shape
    lists = torch.zeros(d_sae + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    factors = (*lists, torch.zeros(0), torch.zeros(0, d_in), None, grad)
    kept = torch.zeros(0, d_in), torch.full((d_sae,), -1, dtype=torch.int32)
    switches = ("adam", False, False, None, None, None, "fp32")
    measured = (torch.zeros(d_sae), *kept, scalars, torch.tensor(step))
    return [W, *moments, *factors, *measured, *switches]


def decoded(moments):
    """Return both moments as numbers."""
    exp_avg, exp_avg_sq, *scales = moments
    pairs = zip((exp_avg, exp_avg_sq), scales, (EXP_AVG, EXP_AVG_SQ), strict=True)
    return [decode_moment(codes, scale, moment) for codes, scale, moment in pairs]


def some_state(d_sae, d_in, dtype, seed=3):
    """Return W, and moments in this dtype."""
    W = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
    return W, coded_moments(
        normal(d_sae, d_in, seed + 1), normal(d_sae, d_in, seed + 2).square(), dtype
    )


def same(first, second):
    return all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def copies(tensors):
    return [None if tensor is None else tensor.clone() for tensor in tensors]


@pytest.mark.skipif(not NATIVE, reason="the op is the reference")
@examples(20)
@given(
    st.integers(1, 20),
    st.integers(1, 600),
    st.sampled_from(LOW_MOMENTS),
    st.integers(1, 2**40),
    st.integers(0, 1000),
)
@example(3, 1, torch.uint8, 1, 0)
@example(7, 255, torch.uint8, 2**32 - 1, 1)
@example(7, 256, torch.uint8, 2**32, 2)
@example(7, 257, torch.uint8, 2**32 + 1, 3)
@example(6, 512, torch.bfloat16, 5, 4)
def test_codes_are_those_of_the_reference_to_the_bit(d_sae, d_in, dtype, step, seed):
    W, moments = some_state(d_sae, d_in, dtype, seed)
    expected_W, expected = W.clone(), copies(moments)
    for later in range(3):
        grad = normal(d_sae, d_in, seed + 10 + later)
        ops.fused_update_(*arguments_of(W, moments, grad, step + later))
        reference.fused_update_(*arguments_of(expected_W, expected, grad, step + later))
        assert same(moments, expected)
    close(W, expected_W.double(), magnitude=expected_W.abs() + 1)


def distances(numbers, scales):
    """Return one to two times the distance of the codes next to each number."""
    for number, scale in zip(numbers, scales, strict=True):
        if scale is None:
            yield number.abs() / 128 + 1e-38
        else:
            yield (number.abs() + scale.repeat_interleave(256, 1)[:, : number.shape[1]]) / 8


@pytest.mark.parametrize("dtype", LOW_MOMENTS)
@pytest.mark.parametrize("d_in", [1, 33, 256, 700])
def test_weights_move_by_the_unrounded_moments(d_in, dtype):
    W, moments = some_state(20, d_in, dtype)
    other = W.clone()
    grad = normal(20, d_in, 9)
    numbers = decoded(moments)
    ops.fused_update_(*arguments_of(W, moments, grad, 7))
    ops.fused_update_(*arguments_of(other, (*numbers, None, None), grad, 7))
    close(W, other.double(), magnitude=other.abs() + 1)
    steps = distances(numbers, moments[2:])
    for found, wanted, step in zip(decoded(moments), numbers, steps, strict=True):
        assert ((found - wanted).abs() <= step).all()
        assert not torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", LOW_MOMENTS)
def test_rounding_keeps_the_mean(dtype):
    d_sae, d_in, draws = 4, 300, 1500
    W, before = some_state(d_sae, d_in, dtype)
    grad, numbers = normal(d_sae, d_in, 9), decoded(before)
    ops.fused_update_(*arguments_of(W.clone(), (*numbers, None, None), grad, 1))
    sums = [torch.zeros(d_sae, d_in, dtype=torch.float64) for _ in range(2)]
    for step in range(1, draws + 1):
        moments = copies(before)
        ops.fused_update_(*arguments_of(W, moments, grad, step))
        distance = distances(numbers, moments[2:])
        for total, found, wanted, unit in zip(
            sums, decoded(moments), numbers, distance, strict=True
        ):
            total += (found.double() - wanted.double()) / unit
    for total in sums:  # a draw's standard deviation is half a distance at most
        assert total.abs().max() < 5.5 * 0.5 * draws**0.5
        assert total.sum().abs() < 5 * 0.5 * (draws * total.numel()) ** 0.5
        assert total.any()


@pytest.mark.parametrize("dtype", LOW_MOMENTS)
def test_second_moment_that_is_not_0_never_becomes_0(dtype):
    W = torch.ones(1, 256)
    grad = torch.full((1, 256), 1e-12)
    grad[0, 0] = 1.0
    moments = coded_moments(torch.zeros(1, 256), torch.zeros(1, 256), dtype)
    for step in range(1, 20):
        ops.fused_update_(*arguments_of(W, moments, grad, step))
        assert (decoded(moments)[1] > 0).all()
    assert W.isfinite().all()


@pytest.mark.parametrize("dtype", LOW_MOMENTS)
def test_silent_latent_with_moments_of_0_stays_where_it_is(dtype):
    W = torch.ones(3, 300)
    moments = coded_moments(torch.zeros(3, 300), torch.zeros(3, 300), dtype)
    ops.fused_update_(*arguments_of(W, moments, None, 1))
    assert torch.equal(W, torch.ones(3, 300))
    assert not any(codes.any() for codes in moments[:2])


@pytest.mark.parametrize("dtype", LOW_MOMENTS)
def test_norm_that_is_not_finite_changes_no_code(dtype):
    W, moments = some_state(5, 300, dtype)
    before = copies((W, *moments))
    scalars = torch.full((11,), torch.nan)
    ops.fused_update_(*arguments_of(W, moments, torch.ones(5, 300), 3, scalars))
    assert same((W, *moments), before)


@pytest.mark.parametrize("dtype", LOW_MOMENTS)
def test_every_step_and_latent_draws_anew(dtype):
    grad = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).expand(3, 300)
    found = []
    for step in (1, 2, 1):
        moments = coded_moments(torch.zeros(3, 300), torch.zeros(3, 300), dtype)
        ops.fused_update_(*arguments_of(torch.ones(3, 300), moments, grad.contiguous(), step))
        found.append(moments[0].float())
    assert torch.equal(found[0], found[2])
    assert (found[0] != found[1]).float().mean() > 0.2
    assert (found[0][0] != found[0][1]).float().mean() > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_MOMENTS])
def test_wrapper_takes_every_kind_of_moments(dtype, device):
    W, moments = some_state(20, 300, dtype)
    arguments = arguments_of(W, moments, normal(20, 300, 8), 4)
    expected = copies(arguments[:5])
    ops.fused_update_(*expected, *arguments[5:])
    there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    public.fused_update_(
        *there[:3],
        *there[5:STEP_COUNT],
        **{"project": False, "unit_norm": False, "precision": "fp32"},
        **{"exp_avg_scale": there[3], "exp_avg_sq_scale": there[4]},
        step_count=there[STEP_COUNT],
    )
    assert same([None if a is None else a.cpu() for a in there[:5]], expected)


def test_compiled_update_equals_eager(device):
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        W, moments = some_state(20, 300, torch.uint8)
        there = [
            a.to(device) if isinstance(a, torch.Tensor) else a
            for a in arguments_of(W, moments, normal(20, 300, 8), 4)
        ]
        update = torch.ops.sae_fast.fused_update_.default
        if compiled:
            update = torch.compile(update, fullgraph=True, backend="aot_eager")
        update(*there)
        results.append(there[:5])
    assert same(*results)


SCALES = torch.zeros(4, moment_blocks(300))
MISSING = [
    (torch.bfloat16, {STEP_COUNT: None}, "step_count must be given where exp_avg is bfloat16"),
    (torch.uint8, {STEP_COUNT: None}, "step_count must be given where exp_avg is uint8, got none"),
    (torch.uint8, {EXP_AVG_SCALE: None}, "exp_avg_scale must be given where exp_avg is uint8"),
    (torch.float32, {EXP_AVG_SCALE: SCALES}, "exp_avg_scale must be none where exp_avg is float32"),
    (
        torch.uint8,
        {EXP_AVG_SCALE + 1: torch.zeros(4, 3)},
        "exp_avg_sq_scale must have shape [4, 2], got [4, 3]",
    ),
    (
        torch.uint8,
        {EXP_AVG_SCALE: SCALES.t().contiguous().t()},
        "exp_avg_scale is changed in place and must be contiguous",
    ),
]


@pytest.mark.parametrize(("dtype", "changes", "message"), MISSING)
def test_what_belongs_to_the_dtype_is_asked_for(dtype, changes, message):
    W, moments = some_state(4, 300, dtype)
    arguments = arguments_of(W, moments, None, 1)
    for at, value in changes.items():
        arguments[at] = value
    with pytest.raises(RuntimeError, match=re.escape(f"fused_update_: {message}")):
        ops.fused_update_(*arguments)
