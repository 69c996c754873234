"""dense_product against float64, and the gradients of a dense code, which use it."""

import sys

import pytest
import torch
from op_samples import LOW, PRECISIONS

from sae_fast import ops
from sae_fast.ops import native
from sae_fast.ops.dense_product import linear

DTYPE = torch.float32 if native.load() is not None else torch.float64
UNIT = 2.0**-24
SHAPES = [(1, 1, 1), (3, 40, 5), (20, 300, 70), (65, 257, 33), (70, 1700, 20), (9, 256, 1100)]


def make_operands(m, depth, p, seed=0, kind="normal"):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(s, generator=generator) for s in ((m, depth), (depth, p)))
    if kind == "code":
        left = (left - 0.5).relu()
    elif kind == "outliers":
        left[:, depth // 2] *= 100
    elif kind == "tiny":
        left, right = left * 1e-30, right * 1e25
    elif kind == "zeros":
        left[0], right[:, 0] = 0, 0
    return left, right


def rounded(tensor, precision):
    return tensor.to(LOW.get(precision, tensor.dtype)).double()


@pytest.mark.parametrize("kind", ["normal", "code", "outliers", "tiny", "zeros"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_that_of_float64(shape, precision, kind):
    if kind == "tiny" and precision == "fp16":
        pytest.skip("float16 has no such numbers")
    left, right = make_operands(*shape, kind=kind)
    wide_left, wide_right = rounded(left, precision), rounded(right, precision)
    product = ops.dense_product(left, right, precision)
    assert product.dtype == torch.float32
    # Float32's own sum is off by up to depth · u · |a||b|, and typically by 1 u · |a||b|.
    room = 16 * UNIT * wide_left.norm(dim=1, keepdim=True) * wide_right.norm(dim=0)
    assert ((product - wide_left @ wide_right).abs() <= room).all()
    if kind == "zeros":
        assert not product[0].any()
        assert not product[:, 0].any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_and_relu_come_after_the_product(shape, precision):
    left, right = make_operands(*shape)
    bias = torch.linspace(-1, 1, shape[2])
    product = ops.dense_product(left, right, precision)
    for relu in (False, True):
        found = ops.dense_product(left, right, precision, bias=bias, relu=relu)
        assert torch.equal(found, (product + bias).relu() if relu else product + bias)
    assert torch.equal(ops.dense_product(left, right, precision, relu=True), product.relu())


@pytest.mark.parametrize("precision", ["screened", "bf16"])
def test_product_does_not_depend_on_how_its_operands_lie_in_memory(precision):
    left, right = make_operands(40, 300, 33)
    expected = ops.dense_product(left, right, precision)
    padded = torch.full((40, 310), torch.nan)
    padded[:, :300] = left
    strided = torch.full((300, 66), torch.nan)
    strided[:, ::2] = right
    turned = left.t().contiguous().t(), right.t().contiguous().t()
    for a in (left, turned[0], padded[:, :300]):
        for b in (right, turned[1], strided[:, ::2]):
            torch.testing.assert_close(
                ops.dense_product(a, b, precision), expected, rtol=1e-5, atol=1e-4
            )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_numbers_that_are_not_finite_or_huge_spread_as_in_torch(value):
    left, right = make_operands(20, 300, 17)
    left[3, 7] = value
    torch.testing.assert_close(ops.dense_product(left, right), left @ right, equal_nan=True)


@pytest.mark.parametrize("sizes", [(0, 300, 5), (5, 0, 3), (5, 300, 0)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_empty_operands_give_zeros(sizes, precision):
    left, right = make_operands(*sizes)
    product = ops.dense_product(left, right, precision)
    assert product.shape == (sizes[0], sizes[2])
    assert not product.any()


def gradients(x, W_enc, b_enc, W_dec, b_dec, precision=None):
    """Return the gradients of all parameters and x for one loss; without precision by torch.

    The terms are the residual, the squared error, and penalties on the code.
    """
    leaves = [t.detach().clone().requires_grad_() for t in (x, W_enc, b_enc, W_dec, b_dec)]
    x, W_enc, b_enc, W_dec, b_dec = leaves
    if precision is None:
        values = ((x - b_dec) @ W_enc.t() + b_enc).relu()
        residual = values @ W_dec + b_dec - x
        squared_error = residual.square().sum(1)
    else:
        code = ops.encode_dense(x, W_enc, b_enc, b_dec, precision=precision)
        values = code.values
        residual, squared_error = ops.reconstruct(code, W_dec, b_dec, x)
    weights = torch.linspace(0.5, 1.5, len(b_enc), dtype=x.dtype)
    loss = squared_error.mean() + 0.1 * residual.sin().sum() + (values * weights).sum(1).mean()
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("precision", ["screened", "bf16"])
def test_linear_and_its_gradients_are_those_of_float64(precision):
    generator = torch.Generator().manual_seed(2)
    given = [
        torch.randn(shape, generator=generator).to(DTYPE).requires_grad_()
        for shape in ((300, 270), (40, 270), (40,))
    ]
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    linear(*given, precision=precision).sin().sum().backward()
    torch.nn.functional.linear(*wide).sin().sum().backward()
    most = 1e-5 if precision == "screened" else 5e-2
    for one, other in zip(given, wide, strict=True):
        assert float((one.grad - other.grad).norm() / other.grad.norm()) < most


def make_sae(n=300, d_in=270, d_sae=320):
    generator = torch.Generator().manual_seed(1)
    shapes = (n, d_in), (d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,)
    scales = 1.0, d_in**-0.5, 0.1, d_in**-0.5, 0.1
    return [
        scale * torch.randn(shape, generator=generator)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


# A pre-activation near 0 may be rounded to the other side of it.
@pytest.mark.parametrize(
    ("precision", "most"), [("screened", 1e-5), ("fp16", 2e-2), ("bf16", 1e-1)]
)
def test_gradients_of_a_dense_code_are_those_of_float64(precision, most):
    parameters = make_sae()
    expected = gradients(*(p.double() for p in parameters))
    actual = gradients(*(p.to(DTYPE) for p in parameters), precision)
    for name, a, b in zip(("x", "W_enc", "b_enc", "W_dec", "b_dec"), actual, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < most, name


def test_gradient_of_what_needs_none_is_not_made(monkeypatch):
    made = []
    product = sys.modules["sae_fast.ops.decode"].dense_product
    for module in (sys.modules["sae_fast.ops.encode"], sys.modules["sae_fast.ops.decode"]):
        monkeypatch.setattr(
            module, "dense_product", lambda *a, **k: made.append(a[0].shape) or product(*a, **k)
        )
    x, W_enc, b_enc, W_dec, b_dec = (p.to(DTYPE) for p in make_sae(20, 12, 30))
    for parameter in (W_enc, b_enc, W_dec, b_dec):
        parameter.requires_grad_()
    code = ops.encode_dense(x, W_enc, b_enc, b_dec)
    ops.reconstruct(code, W_dec, b_dec, x).squared_error.sum().backward()
    assert len(made) == 5  # encode, decode, gradients of the code, of W_dec and of W_enc
