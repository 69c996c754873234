from functools import partial

import pytest
import torch
from device_ops import public as ops
from encoding_oracle import integers, of_two_kinds, pre_activations, rounding
from example_settings import examples
from hypothesis import example, given
from hypothesis import strategies as st
from op_samples import EXACT, PRECISIONS, make_problem
from tolerances import close

pytestmark = pytest.mark.usefixtures("ops_on_device")

quick = examples(40)


def encode(problem, k, precision="screened", **options):
    return ops.encode_batch_topk(*problem.encoder, k, precision=precision, **options)


def best_of_batch(pre_acts, k):
    """Select by brute force: values [N*k], indices [N*k] and offsets [N + 1]."""
    n, d_sae = pre_acts.shape
    flat = pre_acts.flatten()
    wanted = ((flat > 0) | flat.isnan()).nonzero().flatten()
    order = flat[wanted].sort(descending=True, stable=True).indices[: n * k]
    places = wanted[order].sort().values
    counts = torch.bincount(places // d_sae, minlength=n)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    offsets[-1] = n * k
    padding = torch.zeros(n * k - len(places))
    values = torch.cat([flat[places], padding])
    return values, torch.cat([places % d_sae, padding.long()]), offsets


def assert_exactly_the_best(problem, k, precision):
    code = encode(problem, k, precision)
    values, indices, offsets = best_of_batch(pre_activations(problem, precision)[0], k)
    assert torch.equal(code.offsets, offsets)
    assert torch.equal(code.indices.long(), indices)
    torch.testing.assert_close(code.values.double(), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k"),
    [(0, 8, 64, 3), (1, 1, 1, 1), (33, 37, 257, 9), (300, 96, 1000, 32), (2, 8, 100_006, 40)],
)
def test_code_holds_the_largest_entries_of_the_batch(n, d_in, d_sae, k, precision):
    problem = make_problem(n, d_in, d_sae)
    problem.b_enc.sub_(1.0)  # far fewer than half of the entries are positive
    code = encode(problem, k, precision)
    pre_acts, magnitude = pre_activations(problem, precision)
    slack = rounding(problem, magnitude)
    assert code.values.shape == code.indices.shape == (n * k,)
    assert code.offsets[0] == 0
    assert code.offsets[-1] == n * k
    rows = torch.arange(n).repeat_interleave(code.offsets.diff())
    fires = code.values > 0
    place = rows[fires], code.indices[fires].long()
    close(code.values[fires], pre_acts[place], terms=d_in, magnitude=magnitude[place])
    if n == 0:
        return
    kth = pre_acts.flatten().sort(descending=True).values[n * k - 1].clamp_min(0)
    found = torch.zeros(n, d_sae, dtype=torch.bool)
    found[place] = True
    assert int(found.sum()) == int(fires.sum()), "an entry is listed twice"
    assert not (found & (pre_acts < kth - 2 * slack)).any()
    assert not (~found & (pre_acts > kth + 2 * slack)).any()


@quick
@given(
    st.integers(0, 20),
    st.integers(1, 40),
    st.integers(1, 200),
    st.data(),
    st.sampled_from(PRECISIONS),
    st.integers(0, 10_000),
)
def test_ties_go_to_the_first_row_and_the_lowest_index(n, d_in, d_sae, data, precision, seed):
    k = data.draw(st.integers(1, d_sae))
    assert_exactly_the_best(integers(n, d_in, d_sae, bound=1, seed=seed), k, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_of_equal_values_is_filled_from_the_front(precision):
    problem = integers(50, 4, 300)
    problem = problem._replace(W_enc=torch.zeros(300, 4), b_enc=torch.full((300,), 2.0))
    code = encode(problem, 3, precision)
    assert torch.equal(code.offsets, torch.arange(51).clamp_max(0) + 150 * (torch.arange(51) > 0))
    assert torch.equal(code.indices, torch.arange(150).int())
    assert (code.values == 2).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_missing_entries_are_zeros_at_the_end_of_the_last_row(precision):
    problem = integers(9, 4, 60)
    sparse = problem._replace(b_enc=problem.b_enc - 12)
    assert_exactly_the_best(sparse, 20, precision)
    code = encode(problem._replace(b_enc=problem.b_enc - 1000), 20, precision)
    assert not code.values.any()
    assert not code.indices.any()
    assert torch.equal(code.offsets, 180 * (torch.arange(10) == 9))
    assert not code.fired().any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_and_infinity_come_first(precision):
    problem = integers(40, 5, 90)
    problem.b_enc[[3, 40]] = torch.nan
    problem.b_enc[[4, 41]] = torch.inf
    problem.b_enc[[5, 42]] = -torch.inf
    problem.x[6, 2] = torch.nan
    for k in (1, 2, 5, 90):
        assert_exactly_the_best(problem, k, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_few_loud_tokens_may_take_the_whole_budget(precision):
    """The first estimate comes from a sample of tokens, which misses or overrates such tokens."""
    for loud in (slice(0, 1), slice(7, 9), slice(0, 60, 2)):
        problem = integers(500, 6, 400)
        problem.x[loud] *= 1024
        problem.b_dec.zero_()
        assert_exactly_the_best(problem, 2, precision)
        assert_exactly_the_best(problem, 60, precision)


@pytest.mark.parametrize("k", [1, 4, 33])
def test_screened_and_fp32_give_the_same_bits(k):
    problem = make_problem(400, 24, 500)
    codes = [encode(problem, k, precision) for precision in EXACT]
    for name in ("values", "indices", "offsets"):
        assert torch.equal(*(getattr(code, name) for code in codes))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [partial(make_problem, 50, 12, 130), of_two_kinds])
def test_aux_is_that_of_encode_topk(make, precision):
    problem = make()
    dead = torch.arange(len(problem.b_enc)) % 3 == 0
    options = {"precision": precision, "dead_mask": dead, "k_aux": 7}
    code = ops.encode_batch_topk(*problem.encoder, 5, **options)
    expected = ops.encode_topk(*problem.encoder, 5, **options)
    assert torch.equal(code.aux.values, expected.aux.values)
    assert torch.equal(code.aux.indices, expected.aux.indices)
    assert encode(problem, 5, precision).aux is None


@example(rows=1)
@quick
@given(rows=st.integers(1, 60))
def test_one_row_is_that_rows_topk_by_ascending_index(rows):
    problem = make_problem(60, 12, 130)
    row = problem._replace(x=problem.x[rows - 1 : rows])
    code = encode(row, 9)
    topk = ops.encode_topk(*row.encoder, 9)
    assert torch.equal(code.dense(), topk.dense())
    fires = code.indices[code.values > 0]
    assert torch.equal(fires, fires.sort().values)


def test_inputs_need_not_be_contiguous():
    problem = make_problem(20, 12, 70)
    strided = (
        problem.x.t().contiguous().t(),
        problem.W_enc.t().contiguous().t(),
        problem.b_enc.repeat_interleave(2)[::2],
        problem.b_dec.repeat_interleave(3)[::3],
    )
    expected, code = encode(problem, 4), ops.encode_batch_topk(*strided, 4)
    assert torch.equal(code.values, expected.values)
    assert torch.equal(code.indices, expected.indices)
