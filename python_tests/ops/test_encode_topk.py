import pytest
import torch
from device_ops import public as ops
from encoding_oracle import check_largest, integers, largest, of_two_kinds, pre_activations
from op_samples import EXACT, PRECISIONS, Problem, make_problem

pytestmark = pytest.mark.usefixtures("ops_on_device")

SHAPES = [  # N, D, F, k
    pytest.param(0, 8, 64, 3, id="no rows"),
    pytest.param(1, 1, 1, 1, id="all ones"),
    pytest.param(5, 1, 130, 7, id="d_in 1"),
    pytest.param(33, 37, 257, 12, id="odd"),
    pytest.param(20, 12, 70, 70, id="k is d_sae"),
    pytest.param(64, 48, 64, 1, id="one panel"),
    pytest.param(300, 96, 1000, 32, id="larger"),
    pytest.param(3, 8, 100_006, 32, id="wide"),
    pytest.param(2, 24, 5000, 3000, id="huge k"),
]


def encode(problem, k, **options):
    return ops.encode_topk(*problem.encoder, k, **options)


def assert_exactly_the_largest(problem, k, precision):
    code = encode(problem, k, precision=precision)
    values, indices = largest(pre_activations(problem, precision)[0], k)
    assert torch.equal(code.indices.long(), indices)
    torch.testing.assert_close(code.values.double(), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_code_holds_the_k_largest(n, d_in, d_sae, k, precision):
    problem = make_problem(n, d_in, d_sae)
    code = encode(problem, k, precision=precision)
    assert code.values.shape == code.indices.shape == (n, k)
    check_largest(code.values, code.indices, problem, precision)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e15])
@pytest.mark.parametrize("precision", EXACT)
def test_code_holds_the_k_largest_at_any_scale(scale, precision):
    problem = make_problem(20, 24, 300)
    problem = problem._replace(
        x=problem.x * scale, b_enc=problem.b_enc * scale, b_dec=problem.b_dec * scale
    )
    code = encode(problem, 8, precision=precision)
    check_largest(code.values, code.indices, problem, precision)


@pytest.mark.parametrize("precision", EXACT)
def test_code_holds_the_k_largest_with_outlier_dimensions(precision):
    problem = make_problem(40, 64, 700)
    problem.x[:, ::17] *= 1000
    problem.W_enc[::5] *= 30
    code = encode(problem, 16, precision=precision)
    check_largest(code.values, code.indices, problem, precision)


@pytest.mark.parametrize("precision", EXACT)
def test_code_holds_the_k_largest_among_near_duplicates(precision):
    problem = make_problem(30, 32, 400)
    nudge = torch.randn(400, 32, generator=torch.Generator().manual_seed(5)) * 1e-5
    problem = problem._replace(W_enc=problem.W_enc[:1] + nudge, b_enc=torch.zeros(400))
    code = encode(problem, 8, precision=precision)
    check_largest(code.values, code.indices, problem, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dead", [None, slice(None), slice(0, None, 2), slice(1024, None)])
def test_code_holds_the_k_largest_after_tokens_of_another_kind(dead, precision):
    problem = of_two_kinds()
    if dead is None:
        code = encode(problem, 32, precision=precision)
    else:
        mask = torch.zeros(4096, dtype=torch.bool)
        mask[dead] = True
        code = encode(problem, 32, precision=precision, dead_mask=mask, k_aux=24)
        check_largest(code.aux.values, code.aux.indices, problem, precision, mask)
    check_largest(code.values, code.indices, problem, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k"), [(40, 6, 300, 9), (9, 1, 65, 65), (7, 33, 64, 20)]
)
def test_equal_values_come_by_ascending_index(n, d_in, d_sae, k, precision):
    assert_exactly_the_largest(integers(n, d_in, d_sae), k, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_duplicate_latents_come_by_ascending_index(precision):
    problem = integers(30, 16, 90)
    problem = problem._replace(
        W_enc=problem.W_enc.repeat(3, 1), b_enc=problem.b_enc.repeat(3), W_dec=problem.W_enc
    )
    assert_exactly_the_largest(problem, 20, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_row_of_equal_values_gives_the_first_indices(precision):
    problem = Problem(
        torch.ones(4, 5), torch.ones(200, 5), torch.zeros(200), torch.ones(200, 5), torch.zeros(5)
    )
    code = encode(problem, 7, precision=precision)
    assert torch.equal(code.indices, torch.arange(7, dtype=torch.int32).expand(4, 7))
    assert torch.equal(code.values, torch.full((4, 7), 5.0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_row_of_zeros_of_either_sign_gives_the_first_indices_and_plus_zero(precision):
    W_enc = torch.ones(100, 4)
    W_enc[::2] = -1.0
    zero = torch.zeros(100)
    problem = Problem(torch.zeros(3, 4), W_enc, zero.copysign(W_enc[:, 0]), W_enc, torch.zeros(4))
    code = encode(problem, 6, precision=precision)
    assert torch.equal(code.indices, torch.arange(6, dtype=torch.int32).expand(3, 6))
    assert torch.equal(code.values, torch.zeros(3, 6))
    assert not code.values.signbit().any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_negative_values_become_zero_and_keep_their_index(precision):
    problem = integers(10, 4, 80)
    problem = problem._replace(b_enc=problem.b_enc - 1000)
    assert_exactly_the_largest(problem, 5, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("latents", [[3], [3, 60, 61], list(range(0, 90, 2))])
def test_nan_comes_first_and_stays(latents, precision):
    problem = integers(12, 5, 90)
    problem.b_enc[latents] = torch.nan
    assert_exactly_the_largest(problem, 8, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_token_gives_the_first_indices_and_leaves_other_rows_alone(precision):
    problem = integers(12, 5, 90)
    problem.x[4, 2] = torch.nan
    assert_exactly_the_largest(problem, 8, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinities_have_their_place_in_the_order(value, precision):
    problem = integers(12, 5, 90)
    problem.b_enc[[7, 50]] = value
    problem.b_enc[70] = -value
    assert_exactly_the_largest(problem, 8, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_token_orders_latents_by_the_sign_of_their_weight(value, precision):
    problem = integers(6, 5, 150)
    problem.x[2, 3] = value  # times a weight of 0 it is NaN
    assert_exactly_the_largest(problem, 40, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_bad_weight_spoils_one_latent_only(value, precision):
    problem = integers(20, 5, 150)
    problem.W_enc[66, 1] = value
    assert_exactly_the_largest(problem, 10, precision)


@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_screened_and_fp32_give_the_same_bits(n, d_in, d_sae, k):
    problem = make_problem(n, d_in, d_sae)
    screened, fp32 = (encode(problem, k, precision=precision) for precision in EXACT)
    assert torch.equal(screened.indices, fp32.indices)
    assert torch.equal(screened.values, fp32.values)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_token_is_coded_alike_in_every_batch(precision):
    problem = make_problem(700, 160, 1000)
    whole = encode(problem, 24, precision=precision)
    for first, end in ((0, 1), (3, 40), (250, 700)):
        part = encode(problem._replace(x=problem.x[first:end]), 24, precision=precision)
        assert torch.equal(part.indices, whole.indices[first:end])
        assert torch.equal(part.values, whole.values[first:end])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_of_torch_in_between_change_nothing(precision):
    # These products configure the processor's tile registers for themselves.
    problem = make_problem(80, 64, 300)
    matrix = torch.randn(96, 96, dtype=torch.bfloat16, device=problem.x.device)
    product = matrix @ matrix
    code = encode(problem, 8, precision=precision)
    for _ in range(3):
        assert torch.equal(matrix @ matrix, product)
        again = encode(problem, 8, precision=precision)
        assert torch.equal(again.indices, code.indices)
        assert torch.equal(again.values, code.values)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "dead",
    [
        pytest.param(slice(None), id="all"),
        pytest.param(slice(7, 16), id="few"),
        pytest.param(slice(0, None, 3), id="every third"),
        pytest.param(250, id="one"),
    ],
)
def test_aux_holds_the_largest_dead_latents(dead, precision):
    problem = make_problem(40, 24, 300)
    mask = torch.zeros(300, dtype=torch.bool)
    mask[dead] = True
    k_aux = min(9, int(mask.sum()))
    code = encode(problem, 12, precision=precision, dead_mask=mask, k_aux=k_aux)
    check_largest(code.values, code.indices, problem, precision)
    check_largest(code.aux.values, code.aux.indices, problem, precision, mask)
    plain = encode(problem, 12, precision=precision)
    assert torch.equal(plain.values, code.values)
    assert torch.equal(plain.indices, code.indices)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_aux_breaks_ties_by_ascending_index(precision):
    problem = integers(30, 4, 200)
    mask = torch.arange(200) % 3 == 1
    code = encode(problem, 4, precision=precision, dead_mask=mask, k_aux=15)
    pre_acts = pre_activations(problem, precision)[0][:, mask]
    values, chosen = largest(pre_acts, 15)
    assert torch.equal(code.aux.indices.long(), mask.nonzero().flatten()[chosen])
    assert torch.equal(code.aux.values.double(), values)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n_dead", [0, 1, 5])
def test_aux_is_padded_with_zeros_where_too_few_are_dead(n_dead, precision):
    problem = make_problem(10, 8, 100)
    mask = torch.zeros(100, dtype=torch.bool)
    mask[20 : 20 + n_dead] = True
    aux = encode(problem, 4, precision=precision, dead_mask=mask, k_aux=8).aux
    assert torch.equal(aux.values[:, n_dead:], torch.zeros(10, 8 - n_dead))
    assert torch.equal(aux.indices[:, n_dead:], torch.zeros(10, 8 - n_dead, dtype=torch.int32))
    if n_dead:
        check_largest(aux.values[:, :n_dead], aux.indices[:, :n_dead], problem, precision, mask)


def test_k_aux_is_by_default_the_number_of_dead_latents_up_to_half_of_d_in():
    problem = make_problem(10, 8, 100)
    mask = torch.zeros(100, dtype=torch.bool)
    for n_dead, expected in ((0, 0), (3, 3), (50, 4)):
        mask[:n_dead] = True
        assert encode(problem, 4, dead_mask=mask).aux.values.shape == (10, expected)
    assert encode(problem, 4).aux is None


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
    mask = (torch.arange(140) % 4 == 0)[::2]
    assert not strided.x.is_contiguous()
    expected = encode(problem, 5, precision=precision, dead_mask=mask.contiguous())
    code = encode(strided, 5, precision=precision, dead_mask=mask)
    assert torch.equal(code.values, expected.values)
    assert torch.equal(code.indices, expected.indices)
    assert torch.equal(code.aux.indices, expected.aux.indices)


@pytest.mark.parametrize("precision", ["screened", "fp32", "bf16", "fp16"])
def test_without_columns_a_code_is_that_of_the_bias(precision):
    bias = torch.tensor([0.5, -1.0, 2.0, 0.5, 3.0])
    arguments = torch.ones(9, 0), torch.ones(5, 0), bias, torch.ones(0)
    code = ops.encode_topk(*arguments, 4, precision=precision)
    assert code.indices.tolist() == 9 * [[4, 2, 0, 3]]
    assert code.values.tolist() == 9 * [[3.0, 2.0, 0.5, 0.5]]
