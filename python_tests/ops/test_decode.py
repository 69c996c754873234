import pytest
import torch
from device_ops import ops
from op_samples import LOW, Code, make_code, make_problem
from tolerances import close

pytestmark = pytest.mark.usefixtures("ops_on_device")

DTYPES = [torch.float32, *LOW.values()]
SHAPES = [  # N, D, F, k
    pytest.param(0, 8, 64, 4, id="no rows"),
    pytest.param(3, 5, 9, 0, id="no entries"),
    pytest.param(1, 1, 1, 1, id="all ones"),
    pytest.param(33, 37, 257, 12, id="odd"),
    pytest.param(20, 1, 70, 70, id="d_in 1"),
    pytest.param(300, 96, 1000, 32, id="larger"),
    pytest.param(4, 1030, 300, 200, id="long rows"),
]
LAYOUTS = [pytest.param(False, id="topk"), pytest.param(True, id="csr")]


def case(n, d_in, d_sae, k, csr, dtype):
    problem = make_problem(n, d_in, d_sae)
    return problem, problem.W_dec.to(dtype), make_code(n, d_sae, k, csr=csr)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("csr", LAYOUTS)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_decode_adds_up_the_listed_rows(n, d_in, d_sae, k, csr, dtype):
    problem, W_dec, code = case(n, d_in, d_sae, k, csr, dtype)
    dense, rows = code.dense(d_sae), W_dec.double()
    magnitude = dense.abs() @ rows.abs()
    x_hat = ops.decode(*code, W_dec, None)
    assert x_hat.dtype == torch.float32
    close(x_hat, dense @ rows, terms=k, magnitude=magnitude)
    b_dec = problem.b_dec.double()
    x_hat = ops.decode(*code, W_dec, problem.b_dec)
    close(x_hat, dense @ rows + b_dec, terms=k + 1, magnitude=magnitude + b_dec.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("csr", LAYOUTS)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_decode_backward_is_the_dot_product_with_every_listed_row(n, d_in, d_sae, k, csr, dtype):
    problem, W_dec, code = case(n, d_in, d_sae, k, csr, dtype)
    grad_values = ops.decode_backward(problem.x, code.indices, code.offsets, W_dec)
    assert grad_values.dtype == torch.float32
    grad, rows = problem.x.double(), W_dec.double()
    expected = at_entries(grad @ rows.t(), code)
    magnitude = at_entries(grad.abs() @ rows.t().abs(), code)
    close(grad_values, expected, terms=d_in, magnitude=magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("csr", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_reconstruct_gives_residual_error_and_dot_products(n, d_in, d_sae, k, bias, csr, dtype):
    problem, W_dec, code = case(n, d_in, d_sae, k, csr, dtype)
    b_dec = problem.b_dec if bias else None
    residual, squared_error, dot = ops.reconstruct(*code, W_dec, b_dec, problem.x)
    assert residual.dtype == dtype
    dense, rows = code.dense(d_sae), W_dec.double()
    offset = b_dec.double() if bias else torch.zeros(d_in)
    expected = dense @ rows + offset - problem.x.double()
    size = dense.abs() @ rows.abs() + offset.abs() + problem.x.double().abs()
    close(residual, expected, terms=k + 2, magnitude=size)
    terms = k + d_in + 2
    close(squared_error, expected.square().sum(1), terms=terms, magnitude=size.square().sum(1))
    magnitude = at_entries(size @ rows.t().abs(), code)
    close(dot, at_entries(expected @ rows.t(), code), terms=terms, magnitude=magnitude)


def at_entries(matrix, code):
    """Return the elements of a matrix [N, F] at the entries of a code, in the code's shape."""
    if code.offsets is None:
        return matrix.gather(1, code.indices.long())
    rows = torch.arange(code.n_rows).repeat_interleave(code.offsets.diff())
    return matrix[rows, code.indices.long()]


@pytest.mark.parametrize("csr", LAYOUTS)
def test_decode_and_reconstruct_agree(csr):
    problem, W_dec, code = case(40, 30, 200, 9, csr, torch.float32)
    x_hat = ops.decode(*code, W_dec, problem.b_dec)
    residual, _, _ = ops.reconstruct(*code, W_dec, problem.b_dec, problem.x)
    close(residual + problem.x, x_hat.double(), magnitude=x_hat.abs() + 2 * problem.x.abs())


def test_index_listed_twice_counts_twice():
    W_dec = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    indices = torch.tensor([[1, 0, 1]], dtype=torch.int32)
    x_hat = ops.decode(torch.tensor([[1.0, 1.0, 2.0]]), indices, None, W_dec, None)
    assert x_hat.tolist() == [[31.0, 62.0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_value_that_is_not_finite_spoils_its_own_row_only(bad):
    problem, W_dec, code = case(6, 7, 40, 5, False, torch.float32)
    clean = ops.decode(*code, W_dec, problem.b_dec)
    code.values[2, 3] = bad
    x_hat = ops.decode(*code, W_dec, problem.b_dec)
    assert not x_hat[2].isfinite().any()
    keep = torch.arange(6) != 2
    assert torch.equal(x_hat[keep], clean[keep])


def test_weight_that_is_not_finite_spoils_the_rows_that_list_it_only():
    problem, W_dec, code = case(30, 7, 40, 5, False, torch.float32)
    code.values.clamp_min_(0.5)
    W_dec[11, 4] = torch.nan
    _, squared_error, _ = ops.reconstruct(*code, W_dec, problem.b_dec, problem.x)
    lists_it = (code.indices == 11).any(1)
    assert lists_it.any()
    assert torch.equal(squared_error.isnan(), lists_it)


@pytest.mark.parametrize("csr", LAYOUTS)
def test_inputs_need_not_be_contiguous(csr):
    problem, W_dec, code = case(20, 12, 70, 6, csr, torch.float32)
    expected = ops.reconstruct(*code, W_dec, problem.b_dec, problem.x)
    strided = Code(*(None if t is None else every_second(t) for t in code))
    weights = W_dec.t().contiguous().t()
    inputs = every_second(problem.b_dec), problem.x.t().contiguous().t()
    for found, wanted in zip(ops.reconstruct(*strided, weights, *inputs), expected, strict=True):
        assert torch.equal(found, wanted)


def every_second(tensor):
    """Return a tensor with equal numbers and a gap after each."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
