import pytest
import torch
from device_ops import public as ops
from encoding_oracle import integers, pre_activations, rounding
from op_samples import EXACT, PRECISIONS, Problem, make_problem
from tolerances import close

pytestmark = pytest.mark.usefixtures("ops_on_device")

SHAPES = [  # N, D, F
    pytest.param(0, 8, 64, id="no rows"),
    pytest.param(1, 1, 1, id="all ones"),
    pytest.param(5, 1, 130, id="d_in 1"),
    pytest.param(33, 37, 257, id="odd"),
    pytest.param(300, 96, 1000, id="larger"),
    pytest.param(2, 8, 100_006, id="wide"),
]


def encode(problem, threshold, **options):
    return ops.encode_threshold(*problem.encoder, threshold, **options)


def assert_exactly_the_entries_above(problem, threshold, precision):
    code = encode(problem, threshold, precision=precision)
    pre_acts = pre_activations(problem, precision)[0]
    keep = ((pre_acts > threshold) & (pre_acts > 0)) | pre_acts.isnan()
    expected = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    assert torch.equal(code.offsets, expected)
    assert torch.equal(code.indices.long(), keep.nonzero()[:, 1])
    torch.testing.assert_close(code.values.double(), pre_acts[keep], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "d_in", "d_sae"), SHAPES)
def test_code_holds_the_entries_above_their_threshold(n, d_in, d_sae, precision):
    problem = make_problem(n, d_in, d_sae)
    threshold = torch.linspace(-1, 4, d_sae)
    code = encode(problem, threshold, precision=precision)
    pre_acts, magnitude = pre_activations(problem, precision)
    slack = rounding(problem, magnitude)
    level = threshold.clamp_min(0).double()
    rows = torch.arange(n).repeat_interleave(code.offsets.diff())
    found = torch.zeros(n, d_sae, dtype=torch.bool)
    found[rows, code.indices.long()] = True
    assert int(found.sum()) == code.values.numel() == int(code.offsets[-1])
    assert not (found & (pre_acts < level - slack)).any()
    assert not (~found & (pre_acts > level + slack)).any()
    place = rows, code.indices.long()
    close(code.values, pre_acts[place], terms=d_in, magnitude=magnitude[place])
    assert (code.values > 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "d_in", "d_sae"), [(30, 5, 200), (1, 1, 1), (8, 3, 64)])
def test_value_equal_to_the_threshold_is_left_out_and_indices_ascend(n, d_in, d_sae, precision):
    threshold = (torch.arange(d_sae) % 5 - 1).float()
    assert_exactly_the_entries_above(integers(n, d_in, d_sae), threshold, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_is_kept_and_infinities_are_compared(precision):
    problem = integers(12, 5, 90)
    problem.b_enc[[3, 40]] = torch.nan
    problem.b_enc[[4, 41]] = torch.inf
    problem.b_enc[[5, 42]] = -torch.inf
    problem.x[6, 2] = torch.nan
    assert_exactly_the_entries_above(problem, torch.full((90,), 2.0), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("level", [torch.inf, -torch.inf, torch.nan])
def test_threshold_that_is_not_finite_keeps_all_or_nothing(level, precision):
    problem = integers(12, 5, 90)
    threshold = torch.full((90,), 1.0)
    threshold[::2] = level
    assert_exactly_the_entries_above(problem, threshold, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_may_be_empty_or_full(precision):
    problem = integers(9, 4, 150)
    problem = problem._replace(b_enc=torch.zeros(150))
    problem.x[::2] = problem.b_dec
    assert_exactly_the_entries_above(problem, torch.zeros(150), precision)
    full = problem._replace(b_enc=torch.full((150,), 1000.0))
    assert_exactly_the_entries_above(full, torch.zeros(150), precision)


@pytest.mark.parametrize(("n", "d_in", "d_sae"), SHAPES)
def test_screened_and_fp32_give_the_same_bits(n, d_in, d_sae):
    problem = make_problem(n, d_in, d_sae)
    threshold = torch.full((d_sae,), 0.7)
    screened, fp32 = (encode(problem, threshold, precision=precision) for precision in EXACT)
    assert torch.equal(screened.offsets, fp32.offsets)
    assert torch.equal(screened.indices, fp32.indices)
    assert torch.equal(screened.values, fp32.values)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_are_those_of_topk(precision):
    problem = make_problem(25, 20, 200)
    topk = ops.encode_topk(*problem.encoder, 200, precision=precision)
    code = encode(problem, torch.zeros(200), precision=precision)
    assert torch.equal(code.dense(), topk.dense())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_need_not_be_contiguous(precision):
    problem = make_problem(20, 12, 70)
    strided = Problem(
        problem.x.t().contiguous().t(),
        problem.W_enc.t().contiguous().t(),
        problem.b_enc.repeat_interleave(2)[::2],
        problem.W_dec,
        problem.b_dec.repeat_interleave(3)[::3],
    )
    threshold = torch.linspace(0, 1, 140)[::2]
    expected = encode(problem, threshold.contiguous(), precision=precision)
    code = encode(strided, threshold, precision=precision)
    assert torch.equal(code.values, expected.values)
    assert torch.equal(code.indices, expected.indices)
