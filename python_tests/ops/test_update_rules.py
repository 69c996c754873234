"""SGD and Signum, also schedule-free, in the optimiser's ops."""

import itertools
import re

import pytest
import torch
from op_samples import (
    LOW_MOMENTS,
    ONE_MOMENT,
    RULES,
    coded_moments,
    in_latent_major,
    make_code,
    make_problem,
    of_rule,
    ops,
    place,
    scalars_arguments,
    update_arguments,
    update_scalars,
)
from tolerances import close

from sae_fast import ops as public
from sae_fast.ops import reference
from sae_fast.ops.reference.moments import moment_blocks
from sae_fast.ops.registry import NATIVE

pytestmark = pytest.mark.usefixtures("ops_on_device")

LR, MOMENTUM, DECAY, SCALE = 1e-2, 0.9, 0.1, 0.5  # of update_arguments
SHAPES = [  # N, D, F, k
    pytest.param(33, 37, 257, 12, id="odd"),
    pytest.param(300, 96, 1000, 32, id="larger"),
    pytest.param(0, 8, 64, 4, id="no rows"),
]


def sgd(w, momentum, grad):
    """Take a step of torch.optim.SGD in float64."""
    parameter = torch.nn.Parameter(w.double())
    optimizer = torch.optim.SGD([parameter], lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    optimizer.state[parameter]["momentum_buffer"] = momentum.double()
    parameter.grad = grad
    optimizer.step()
    return parameter.detach(), optimizer.state[parameter]["momentum_buffer"]


def signum(w, momentum, grad):
    """Take a float64 step of Bernstein et al. 2018, algorithm 2, with decoupled weight decay."""
    momentum = MOMENTUM * momentum.double() + (1 - MOMENTUM) * grad
    return (1 - LR * DECAY) * w.double() - LR * torch.sign(momentum), momentum


def schedule_free_signum(y, difference, grad):
    """Take the third step of Defazio et al. 2024 in float64: z, its average x, y between them."""
    y = y.double()
    z = y + difference.double()
    x = (y - (1 - MOMENTUM) * z) / MOMENTUM
    z = z - LR * (torch.sign(grad) + DECAY * y)
    x = (2 * x + z) / 3
    y = (1 - MOMENTUM) * z + MOMENTUM * x
    return y, z - y


FORMULAS = {"sgd": sgd, "signum": signum, "schedule_free_signum": schedule_free_signum}


def some_update(n, d_in, d_sae, k, rule, *, project=True, moments=torch.float32):
    """Return arguments of fused_update_ with the clipped float64 gradient and its magnitude."""
    problem, code = make_problem(n, d_in, d_sae), make_code(n, d_sae, k)
    lists, W = in_latent_major(code, d_sae), problem.W_dec
    onto = W if project else None
    arguments = (*lists, problem.x, problem.b_dec, onto, 0.1 * problem.W_enc)
    matrix, centred = code.dense(d_sae).t(), problem.x.double() - problem.b_dec.double()
    grad = matrix @ centred + 0.1 * problem.W_enc.double()
    magnitude = matrix.abs() @ centred.abs() + 0.1 * problem.W_enc.double().abs()
    if project:
        rows = W.double()
        grad = grad - (grad * rows).sum(1, keepdim=True) * rows
        magnitude += (magnitude * rows.abs()).sum(1, keepdim=True) * rows.abs()
    updated = update_arguments(*arguments, W, rule=rule, moments=moments)
    return list(updated), SCALE * grad, SCALE * magnitude


@pytest.mark.parametrize("rule", ONE_MOMENT)
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_fused_update_is_the_step_of_the_rule(n, d_in, d_sae, k, project, rule):
    updated, grad, magnitude = some_update(n, d_in, d_sae, k, rule, project=project)
    W, exp_avg = (tensor.clone() for tensor in updated[:2])
    wanted, wanted_avg = FORMULAS[rule](W, exp_avg, grad)
    ops.fused_update_(*updated)
    size = exp_avg.abs() + magnitude + DECAY * W.abs()
    # If rounding decides the sign of a momentum or of a gradient, either step is right.
    clear = settled = torch.ones_like(W, dtype=torch.bool)
    if rule != "sgd":
        decides, of = (wanted_avg, size) if rule == "signum" else (grad, magnitude)
        clear = (decides.abs() > 1e-5 * of) | (of == 0)
        assert clear.double().mean() > 0.99
    found = updated[0]
    if project:
        norms = torch.linalg.vector_norm(wanted, dim=1, keepdim=True)
        assert (torch.linalg.vector_norm(found.double(), dim=1) - 1).abs().max() < 1e-6
        wanted, clear = wanted / norms, clear.all(1, keepdim=True).expand_as(clear)
        assert clear.double().mean() > 0.9
    if rule == "schedule_free_signum":
        settled, wanted_avg = clear, wanted_avg / (norms if project else 1)
    close(updated[1][settled], wanted_avg[settled], terms=n + d_in, magnitude=size[settled])
    moved = LR * size / (norms if project else 1)
    magnitude = (W.abs() + 1) * (1 + moved.amax(1, keepdim=True))
    close(found[clear], wanted[clear], terms=n + d_in, magnitude=magnitude[clear])


@pytest.mark.parametrize("rule", ONE_MOMENT)
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_update_of_a_vector_is_the_step_of_the_rule(size, rule):
    generator = torch.Generator().manual_seed(0)
    w, exp_avg, grad = (torch.randn(size, generator=generator) for _ in range(3))
    expected = FORMULAS[rule](w, exp_avg, SCALE * grad.double())
    ops.update_vector_(w, exp_avg, None, grad, update_scalars(rule=rule), rule)
    for found, wanted in zip((w, exp_avg), expected, strict=True):
        close(found, wanted, magnitude=wanted.abs() + 1)


@pytest.mark.parametrize("rule", ONE_MOMENT)
def test_vector_without_gradient_follows_its_momentum(rule):
    found, expected = ([torch.ones(5), torch.ones(5), None] for _ in range(2))
    ops.update_vector_(*found, None, update_scalars(rule=rule), rule)
    ops.update_vector_(*expected, torch.zeros(5), update_scalars(rule=rule), rule)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    # z above y draws y up, a momentum above 0 drives the weight down
    assert ((found[0] > 1) == (rule == "schedule_free_signum")).all()
    assert (found[0] != 1).all()


def test_signum_does_not_move_a_weight_whose_momentum_is_zero():
    w, exp_avg = torch.ones(40), torch.tensor([0.0, -0.0, 1.0, -1.0]).repeat(10)
    scalars = update_scalars(rule="signum")
    ops.update_vector_(w, exp_avg, None, None, scalars, "signum")
    decayed = torch.tensor(1 - LR * DECAY)
    assert torch.equal(w[::4], decayed.expand(10))
    assert torch.equal(w[1::4], decayed.expand(10))
    assert (w[2::4] < decayed).all()
    assert (w[3::4] > decayed).all()


@pytest.mark.parametrize("rule", ONE_MOMENT)
def test_norm_that_is_not_finite_changes_nothing(rule):
    _, scalars = ops.update_scalars(*scalars_arguments(torch.nan, rule=rule))
    assert scalars.isnan().all()
    updated, *_ = some_update(20, 12, 70, 6, rule)
    updated[place("fused_update_", "scalars")] = scalars
    before = [tensor.clone() for tensor in updated[:2]]
    ops.fused_update_(*updated)
    ops.update_vector_(*updated[:3], torch.ones(70, 12), scalars, rule)
    assert torch.equal(updated[0], before[0])
    assert torch.equal(updated[1], before[1])


def test_update_scalars_of_a_rule_are_rounded_once():
    _, found = ops.update_scalars(*scalars_arguments(9.0, grad_clip=1.5, rule="sgd"))
    clip = 1.5 / (3.0 + 1e-6)
    wanted = [clip, 1, 0, 0, 0, LR, 0, 0, MOMENTUM, DECAY, 0]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=2e-7, atol=0)
    _, found = ops.update_scalars(*scalars_arguments(9.0, grad_clip=1.5, rule="signum"))
    wanted = [clip, 1 - LR * DECAY, 1 - MOMENTUM, 0, 0, LR, 0, 0, 0, 0, 0]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=2e-7, atol=0)
    arguments = scalars_arguments(9.0, grad_clip=1.5, rule="schedule_free_signum")
    _, found = ops.update_scalars(*arguments)
    wanted = [clip, 1, 1 - MOMENTUM, 0, 0, LR, 0, 0, MOMENTUM, DECAY, 1 / 3]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=2e-7, atol=0)
    assert arguments[place("update_scalars", "lr_squares")] == pytest.approx(3 * LR * LR)


def test_share_of_the_average_is_that_of_the_squared_rate():
    squares, steps = torch.zeros((), dtype=torch.float64), torch.tensor(0)
    for rate, share in ((0.0, 0.0), (1e-3, 1.0), (2e-3, 4 / 5), (torch.nan, None), (2e-3, 4 / 9)):
        arguments = list(scalars_arguments(1.0 if share is not None else torch.inf, skip=True))
        arguments[place("update_scalars", "lr")] = torch.tensor(rate, dtype=torch.float64)
        arguments[place("update_scalars", "step_count")] = steps
        arguments[place("update_scalars", "lr_squares")] = squares
        arguments[place("update_scalars", "rule")] = "schedule_free_signum"
        _, scalars = ops.update_scalars(*arguments)
        if share is None:  # a skipped step: its rate does not count
            assert scalars.isnan().all()
        else:
            assert float(scalars[-1]) == pytest.approx(share, rel=1e-6)
    assert steps == 4
    assert squares == pytest.approx(9e-6)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_MOMENTS])
def test_difference_of_weights_is_divided_with_its_row(dtype, project):
    updated, *_ = some_update(40, 300, 20, 4, "schedule_free_signum", moments=dtype)
    updated[place("fused_update_", "unit_norm")] = False
    exact = [a.clone() if isinstance(a, torch.Tensor) else a for a in updated]
    updated[place("fused_update_", "unit_norm")] = project
    ops.fused_update_(*updated)
    ops.fused_update_(*exact)
    norms = torch.linalg.vector_norm(exact[0], dim=1, keepdim=True) if project else 1.0
    found, wanted = (
        a[1]
        if a[3] is None and dtype == torch.float32
        else reference.decode_moment(a[1], a[3], reference.EXP_AVG)
        for a in (updated, exact)
    )
    torch.testing.assert_close(updated[0], exact[0] / norms)
    # 1 % of a unit row's length, with 300 numbers: above the error of 16 bits, below that at 8
    rough = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.uint8: 0.13}[dtype]
    torch.testing.assert_close(found, wanted / norms, rtol=2 * rough, atol=1e-3 * rough)
    if dtype == torch.float32 and project:
        assert (norms - 1).abs().max() > 1e-3


@pytest.mark.parametrize("rule", ONE_MOMENT)
@pytest.mark.parametrize("dtype", LOW_MOMENTS)
def test_weights_do_not_depend_on_how_the_momentum_is_kept(dtype, rule):
    updated, *_ = some_update(40, 300, 20, 4, rule, moments=dtype)
    exact = [a.clone() if isinstance(a, torch.Tensor) else a for a in updated]
    decoded = reference.decode_moment(updated[1], updated[3], reference.EXP_AVG)
    exact[1:5] = [decoded, None, None, None]
    ops.fused_update_(*updated)
    ops.fused_update_(*exact)
    assert torch.equal(updated[0], exact[0])
    kept = reference.decode_moment(updated[1], updated[3], reference.EXP_AVG)
    assert not torch.equal(kept, decoded)
    torch.testing.assert_close(kept, exact[1], rtol=0.2, atol=0.02)


@pytest.mark.skipif(not NATIVE, reason="the op is the reference")
@pytest.mark.parametrize("rule", ONE_MOMENT)
@pytest.mark.parametrize("dtype", LOW_MOMENTS)
def test_codes_are_those_of_the_reference_to_the_bit(dtype, rule):
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(20, 300, generator=generator)
    found, expected = (
        [numbers.flip(0), *of_rule(rule, coded_moments(numbers, numbers.square(), dtype))]
        for _ in range(2)
    )
    empty = torch.zeros(0, dtype=torch.int32)
    lists = torch.zeros(21, dtype=torch.int64), empty, torch.zeros(0), torch.zeros(0, 300)
    kept = torch.zeros(20), torch.zeros(0, 300), torch.full((20,), -1, dtype=torch.int32)
    # with 1 - beta1 = 1/4, beta1 = 3/4 and no weight decay the result is rounded only once
    scalars = torch.tensor([1.0, 1.0, 0.25, 0, 0, 2.0**-7, 0, 0, 0.75, 0, 0.25])
    switches = (rule, False, False, None, None, None, "fp32")
    for step in (1, 2, 3):
        grad = torch.randn(20, 300, generator=generator)
        factors = (*lists, None, grad, *kept, scalars, torch.tensor(step), *switches)
        ops.fused_update_(*found, *factors)
        reference.fused_update_(*expected, *factors)
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert one is other or torch.equal(one, other)


@pytest.mark.parametrize("rule", ONE_MOMENT)
def test_wrappers_take_the_rule(rule, device):
    arguments, *_ = some_update(20, 12, 70, 6, rule)
    expected = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    ops.fused_update_(*expected)
    there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    step_count = place("fused_update_", "step_count")
    switches = {"rule": rule, "project": True, "unit_norm": True, "precision": "fp32"}
    public.fused_update_(*there[:3], *there[5:step_count], **switches)
    assert torch.equal(there[0].cpu(), expected[0])
    assert torch.equal(there[1].cpu(), expected[1])


@pytest.mark.parametrize("rule", ONE_MOMENT)
def test_scale_of_a_moment_that_the_rule_lacks_is_refused(rule):
    updated, *_ = some_update(20, 300, 20, 6, rule, moments=torch.uint8)
    updated[place("fused_update_", "exp_avg_sq_scale")] = torch.zeros(20, moment_blocks(300))
    message = f"fused_update_: exp_avg_sq_scale must be none where rule is {rule}, got a tensor"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.fused_update_(*updated)


WRONG_RULES = [
    ("lion", {}, "rule must be adam, sgd, signum or schedule_free_signum, got lion"),
    ("sgd", {}, "exp_avg_sq must be none where rule is sgd, got a tensor"),
    ("signum", {}, "exp_avg_sq must be none where rule is signum, got a tensor"),
    ("adam", {"exp_avg_sq": None}, "exp_avg_sq must be given where rule is adam, got none"),
]


@pytest.mark.parametrize(("rule", "changed", "message"), WRONG_RULES)
def test_rule_that_does_not_fit_the_moments_is_refused(rule, changed, message):
    calls = {
        "fused_update_": some_update(20, 12, 70, 6, "adam")[0],
        "update_vector_": [*(torch.ones(6) for _ in range(4)), update_scalars(), "adam"],
    }
    for op, arguments in calls.items():
        for name, value in {"rule": rule, **changed}.items():
            arguments[place(op, name)] = value
        with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}")):
            getattr(ops, op)(*arguments)


def test_scalars_of_an_unknown_rule_are_refused():
    with pytest.raises(RuntimeError, match=r"update_scalars: rule must be .*, got lion"):
        ops.update_scalars(*scalars_arguments(1.0, rule="lion"))


@pytest.mark.parametrize("rule", ["adam", "sgd", "signum", "schedule_free_signum"])
def test_sum_of_squared_rates_comes_with_the_rule_that_has_it(rule):
    arguments = list(scalars_arguments(1.0, rule=rule))
    has_it = arguments[place("update_scalars", "lr_squares")] is not None
    other = None if has_it else torch.zeros((), dtype=torch.float64)
    arguments[place("update_scalars", "lr_squares")] = other
    must = "given" if has_it else "none"
    message = f"update_scalars: lr_squares must be {must} where rule is {rule}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.update_scalars(*arguments)


@pytest.mark.skipif(not NATIVE, reason="the reference takes the differences first")
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("rule", ["signum", "schedule_free_signum"])
def test_a_gradient_of_exactly_zero_has_no_sign(rule):
    problem, code = make_problem(64, 40, 50), make_code(64, 50, 5)
    still = torch.tensor([7, 13])
    x = problem.x.clone()
    x[:, still] = problem.b_dec[still]
    lists = in_latent_major(code, 50)
    arguments = update_arguments(*lists, x, problem.b_dec, None, None, problem.W_dec, rule=rule)
    arguments[place("fused_update_", "exp_avg")].zero_()
    wide = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    ops.fused_update_(*arguments)
    reference.fused_update_(*wide)
    close(arguments[0][:, still], wide[0][:, still])


# The rows of a block take just less shared memory there than CUDA gives unasked, for one rule and
# type of moments or another.
@pytest.mark.parametrize("d_in", [3071, 3072, 4096, 6144, 12288])
def test_rows_of_any_width_are_those_of_the_reference(d_in):
    problem = make_problem(12, d_in, 8)
    lists = in_latent_major(make_code(12, 8, 3), 8)
    factors = (*lists, problem.x, None, problem.W_dec, None)
    for rule, dtype in itertools.product(RULES, (torch.float32, *LOW_MOMENTS)):
        found = update_arguments(*factors, problem.W_dec, moments=dtype, rule=rule)
        wanted = [a.clone() if isinstance(a, torch.Tensor) else a for a in found]
        ops.fused_update_(*found)
        reference.fused_update_(*wanted)
        differing = (found[0].double() - wanted[0].double()).abs() > 1e-5
        assert differing.sum() <= 2  # signs of sums that are nearly 0
