"""Statistics of a batch, sums over rows and the end of a step, against float64."""

import pytest
import torch
from device_ops import public
from op_samples import finish_arguments, make_code, make_problem, ops
from torch import Tensor

from sae_fast.ops import SparseCode
from sae_fast.ops.reference import weighted_row_sum as reference_sum

pytestmark = pytest.mark.usefixtures("ops_on_device")


def variance_of(target: Tensor) -> Tensor:
    return (target.double() - target.double().mean(0)).square().sum()


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("n", [1, 20, 700])
def test_statistics_are_those_of_float64(n, offset):
    problem = make_problem(n, 33, 70)
    target, errors = problem.x + offset, problem.x.square().sum(1)
    code = make_code(n, 70, 6)
    found = ops.batch_statistics(errors, target, code.values, code.indices, None, 70, False)
    fvu, l0, variance, fired = found
    dense = code.dense(70)
    wanted = variance_of(target)
    torch.testing.assert_close(variance.double(), wanted, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(fvu.double(), errors.double().sum() / wanted, rtol=1e-6, atol=0.0)
    assert l0 == (dense > 0).sum().float() / n
    assert torch.equal(fired, (dense > 0).any(0))


def test_a_batch_of_one_row_repeated_has_no_variance():
    target = torch.full((50, 7), 0.1)
    code = make_code(50, 70, 6)
    found = ops.batch_statistics(torch.ones(50), target, *code[:2], None, 70, False)
    assert found[2] == 0.0
    assert found[0] == torch.inf


def test_a_given_variance_takes_the_place_of_the_measured_one():
    code = make_code(20, 70, 6)
    given = torch.tensor(8.0)
    fvu, _, variance, _ = ops.batch_statistics(
        torch.full((20,), 2.0), torch.randn(20, 5), *code[:2], given, 70, False
    )
    assert (fvu, variance) == (5.0, 8.0)


def test_negative_values_fire_in_signed_codes_only():
    values, indices = torch.tensor([[-1.0, 0.0, 2.0]]), torch.tensor([[0, 1, 2]]).int()
    batch = torch.ones(1), torch.zeros(1, 4), values, indices, None, 4
    assert ops.batch_statistics(*batch, True)[3].tolist() == [True, False, True, False]
    assert ops.batch_statistics(*batch, False)[3].tolist() == [False, False, True, False]


def test_nan_does_not_fire_and_spoils_the_numbers():
    values, indices = torch.tensor([[torch.nan, 1.0]]), torch.tensor([[0, 1]]).int()
    target = torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])
    errors = torch.tensor([torch.nan, 1.0])
    batch = errors, target, values.expand(2, 2), indices.expand(2, 2), None, 3
    for is_signed in (True, False):
        fvu, l0, variance, fired = ops.batch_statistics(*batch, is_signed)
        assert fvu.isnan()
        assert variance.isnan()
        assert l0 == 1.0
        assert fired.tolist() == [False, True, False]


@pytest.mark.parametrize("csr", [False, True])
def test_statistics_of_a_code_are_the_codes(csr):
    n, d_sae = 20, 70
    code = SparseCode(
        *make_code(n, d_sae, 6, csr=csr)[:2], d_sae, make_code(n, d_sae, 6, csr=csr)[2]
    )
    _, l0, _, fired = public.batch_statistics(torch.ones(n), torch.randn(n, 4), code)
    assert l0 == code.n_active().float() / n
    assert torch.equal(fired, code.fired())


def test_gradients_of_a_code_are_those_of_autograd():
    code, dots = make_code(20, 70, 6).values.double(), torch.randn(20, 6).double()
    grad = torch.randn(20).double()
    found = ops.code_gradients(dots.float(), code.float(), grad.float())
    wanted = (dots * 2 * grad[:, None], code * 2 * grad[:, None], 2 * grad)
    for result, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weighted_sum_of_rows_is_the_one_of_float64(n, dtype):
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(n, generator=generator)
    matrix = torch.randn(n, 37, generator=generator).to(dtype)
    found = ops.weighted_row_sum(weights, matrix, -1.5)
    wanted = reference_sum(weights.double(), matrix.double(), -1.5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (300, 40)])
def test_squares_are_added_in_float64(shape):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    total = torch.tensor(2.0).double()
    ops.add_squares_(total, grad)
    torch.testing.assert_close(total, 2.0 + grad.double().square().sum(), rtol=1e-14, atol=0.0)


def test_squares_of_two_tensors_and_a_number_are_added_as_one_by_one():
    first, second = torch.randn(300, 40), torch.randn(7)
    found, expected = (torch.tensor(2.0).double() for _ in range(2))
    ops.add_squares_(found, first, second, torch.tensor(5.0).double())
    expected.add_(5.0)
    ops.add_squares_(expected, first)
    ops.add_squares_(expected, second)
    assert torch.equal(found, expected)


def test_a_step_is_written_down():
    arguments = finish_arguments()
    ops.finish_step_(*arguments)
    poison, steps, metrics, tokens = arguments[:4]
    assert (poison, steps) == (0.0, 7)
    assert metrics.tolist() == [1.0, 2.0, 3.0, 5.0, 4.0]
    assert tokens.tolist() == [0, 15, 0, 18]


@pytest.mark.parametrize(
    "bad",
    [
        *({"fault": torch.nan}, {"norm": torch.inf}, {"norm": torch.nan}),
        *({"loss": torch.nan}, {"loss": -torch.inf}),
    ],
)
def test_a_step_that_fails_is_written_down_and_poisons_the_next(bad):
    arguments = finish_arguments(**bad)
    ops.finish_step_(*arguments)
    poison, steps, metrics, _ = arguments[:4]
    assert poison.isnan()
    assert steps == 7
    wanted = torch.tensor(bad.get("loss", 1.0))
    torch.testing.assert_close(metrics[0], wanted, equal_nan=True)
    arguments = finish_arguments(poison=torch.nan)
    ops.finish_step_(*arguments)
    assert arguments[1] == 6
    assert arguments[2].tolist() == [9.0] * 5
    assert arguments[3].tolist() == [0, 15, 0, 18]


def test_an_overflow_that_is_only_skipped_does_not_poison():
    arguments = finish_arguments(norm=torch.inf, norm_poisons=False)
    ops.finish_step_(*arguments)
    assert arguments[0] == 0.0
