import pytest
import torch
from encoding_oracle import pre_activations
from op_samples import EXACT, LOW, PRECISIONS, make_codes, make_problem
from tolerances import close
from torch import Tensor

from sae_fast import ops
from sae_fast.ops.registry import NATIVE

pytestmark = pytest.mark.usefixtures("default_device")

GRADIENTS = [pytest.param(True, id="dense"), pytest.param(False, id="factored")]
NAMES = ("x", "W_enc", "b_enc", "W_dec", "b_dec")


def dense_gradient(W: Tensor) -> Tensor:
    """Return a parameter's gradient in float64, from a dense gradient or factors."""
    grad = torch.zeros_like(W, dtype=torch.float64) if W.grad is None else W.grad.double()
    for factor in getattr(W, "row_factors", []):
        rows, sums = torch.ops.sae_fast.accumulate_rows(
            factor.coefficients, factor.indices, factor.offsets, factor.dense, W.shape[0]
        )
        grad = grad + rows
        if factor.shift is not None:
            grad = grad - sums.double()[:, None] * factor.shift.double()
    return grad


def gradients(problem) -> dict[str, Tensor]:
    return {name: dense_gradient(getattr(problem, name)) for name in NAMES}


def plain_code(problem, code, *, straight: bool = False) -> Tensor:
    """Return the code [N, F] computed in plain PyTorch with a given selection.

    With `straight` the gradient goes through ReLU as if it was not there, as for aux.
    """
    pre_acts = (problem.x - problem.b_dec) @ problem.W_enc.t() + problem.b_enc
    chosen = torch.zeros(pre_acts.shape, dtype=torch.bool)
    if code.offsets is None:
        chosen.scatter_(1, code.indices.long(), True)
    else:
        rows = torch.arange(len(chosen)).repeat_interleave(code.offsets.diff())
        chosen[rows, code.indices.long()] = True
    values = pre_acts.relu()
    if straight:
        values = pre_acts + (values - pre_acts).detach()
    return torch.where(chosen, values, 0.0)


def encode(problem, kind, **options):
    if kind != "threshold":
        select = {"topk": ops.encode_topk, "batch_topk": ops.encode_batch_topk}[kind]
        dead = torch.arange(problem.b_enc.shape[0]) % 3 == 0
        return select(*problem.encoder, 6, dead_mask=dead, k_aux=5, **options)
    threshold = torch.full_like(problem.b_enc, 0.8)
    return ops.encode_threshold(*problem.encoder, threshold, **options)


def assert_same_gradients(found, expected, scale=8.0):
    """Assert that gradients are equal up to float32 rounding of their largest element."""
    for name in NAMES:
        size = expected[name].abs().max()
        close(found[name], expected[name], terms=64, magnitude=scale * size, dtype=torch.float32)


def weights(like):
    """Return numbers with which the elements of a loss have different weights."""
    return torch.linspace(-1, 2, like.numel(), dtype=like.dtype).view(like.shape)


LOSSES = ("squared error", "residual", "decoded", "values")


def fast_loss(name, problem, code, dense_grad):
    if name == "values":
        return code.values.clamp_min(1e-30).sqrt().sum()
    if name == "decoded":
        x_hat = ops.decode(code, problem.W_dec, problem.b_dec, dense_grad=dense_grad)
        return (x_hat.sin() * weights(x_hat)).sum()
    found = ops.reconstruct(code, problem.W_dec, problem.b_dec, problem.x, dense_grad=dense_grad)
    if name == "residual":
        return (found.residual.pow(3) * weights(found.residual)).sum()
    return found.squared_error @ weights(found.squared_error)


def plain_loss(name, problem, code):
    values = plain_code(problem, code)
    if name == "values":
        return values[values > 0].sqrt().sum()
    x_hat = values @ problem.W_dec + problem.b_dec
    if name == "decoded":
        return (x_hat.sin() * weights(x_hat)).sum()
    residual = x_hat - problem.x
    if name == "residual":
        return (residual.pow(3) * weights(residual)).sum()
    squared_error = residual.square().sum(1)
    return squared_error @ weights(squared_error)


@pytest.mark.parametrize("dense_grad", GRADIENTS)
@pytest.mark.parametrize("kind", ["topk", "batch_topk", "threshold"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("precision", EXACT)
def test_gradients_are_those_of_plain_pytorch_in_float64(precision, loss, kind, dense_grad):
    problem = make_problem(30, 14, 90).requires_grad()
    code = encode(problem, kind, precision=precision, dense_grad=dense_grad)
    fast_loss(loss, problem, code, dense_grad).backward()
    oracle = problem.double().requires_grad()
    plain_loss(loss, oracle, code).backward()
    assert_same_gradients(gradients(problem), gradients(oracle))


@pytest.mark.parametrize("dense_grad", GRADIENTS)
def test_gradient_through_residual_and_squared_error_together(dense_grad):
    problem = make_problem(30, 14, 90).requires_grad()
    code = encode(problem, "topk", dense_grad=dense_grad)
    found = ops.reconstruct(code, problem.W_dec, problem.b_dec, problem.x, dense_grad=dense_grad)
    (found.residual.cos().sum() + found.squared_error.log().sum()).backward()
    oracle = problem.double().requires_grad()
    residual = plain_code(oracle, code) @ oracle.W_dec + oracle.b_dec - oracle.x
    (residual.cos().sum() + residual.square().sum(1).log().sum()).backward()
    assert_same_gradients(gradients(problem), gradients(oracle))


@pytest.mark.parametrize("dense_grad", GRADIENTS)
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
@pytest.mark.parametrize("both", [True, False])
def test_gradient_of_aux_reaches_the_encoder_but_neither_x_nor_b_dec(both, kind, dense_grad):
    problem = make_problem(30, 14, 90).requires_grad()
    code = encode(problem, kind, dense_grad=dense_grad)
    target = torch.zeros(30, 14)
    aux = ops.reconstruct(code.aux, problem.W_dec, None, target, dense_grad=dense_grad)
    loss = aux.squared_error.sum()
    if both:
        loss = loss + fast_loss("squared error", problem, code, dense_grad)
    loss.backward()
    oracle = problem.double().requires_grad()
    fixed = oracle._replace(x=oracle.x.detach(), b_dec=oracle.b_dec.detach())
    expected = (plain_code(fixed, code.aux, straight=True) @ oracle.W_dec).square().sum()
    if both:
        expected = expected + plain_loss("squared error", oracle, code)
    expected.backward()
    assert_same_gradients(gradients(problem), gradients(oracle))
    assert dense_gradient(problem.W_enc)[code.aux.indices[0, 0]].abs().max() > 0


@pytest.mark.parametrize("dense_grad", GRADIENTS)
@pytest.mark.parametrize("select", [ops.encode_topk, ops.encode_batch_topk, ops.encode_groupmax])
def test_gradient_of_aux_goes_straight_through_relu(select, dense_grad):
    problem = make_problem(30, 14, 90)
    dead = torch.arange(90) % 30 == 7  # 3 of them, so that rows of aux are filled up
    problem = problem._replace(b_enc=torch.where(dead, -100.0, problem.b_enc)).requires_grad()
    code = select(*problem.encoder, 6, dead_mask=dead, k_aux=5, dense_grad=dense_grad)
    assert not code.aux.values.any()  # no dead latent has a positive pre-activation
    target = make_problem(30, 14, 1).x
    aux = ops.reconstruct(code.aux, problem.W_dec, None, target, dense_grad=dense_grad)
    aux.squared_error.sum().backward()
    found = dense_gradient(problem.W_enc), dense_gradient(problem.b_enc)
    oracle = problem.double().requires_grad()
    pre_acts = (oracle.x - oracle.b_dec).detach() @ oracle.W_enc[dead].t() + oracle.b_enc[dead]
    values = pre_acts + (pre_acts.relu() - pre_acts).detach()
    (values @ oracle.W_dec[dead].detach() - target.double()).square().sum().backward()
    for each, name in zip(found, ("W_enc", "b_enc"), strict=True):
        expected = getattr(oracle, name).grad
        assert expected[dead].abs().min() > 0
        size = 8 * expected.abs().max()
        close(each, expected, terms=64, magnitude=size, dtype=torch.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["topk", "batch_topk", "threshold"])
@pytest.mark.parametrize("loss", LOSSES)
def test_factored_and_dense_gradients_agree(loss, kind, precision):
    found = []
    for dense_grad in (True, False):
        problem = make_problem(30, 14, 90).requires_grad()
        code = encode(problem, kind, precision=precision, dense_grad=dense_grad)
        fast_loss(loss, problem, code, dense_grad).backward()
        found.append(gradients(problem))
        assert (problem.W_enc.grad is None) == (not dense_grad)
    assert_same_gradients(*found)


@pytest.mark.parametrize("dense_grad", GRADIENTS)
@pytest.mark.parametrize("precision", LOW)
def test_low_precision_gradients_are_near_those_of_rounded_operands(precision, dense_grad):
    problem = make_problem(30, 14, 90).requires_grad()
    code = encode(problem, "topk", precision=precision, dense_grad=dense_grad)
    fast_loss("squared error", problem, code, dense_grad).backward()
    rounded = problem.double()
    W_dec = problem.W_dec.detach().to(LOW[precision]).double().requires_grad_()
    oracle = rounded.requires_grad()._replace(W_dec=W_dec)
    plain_loss("squared error", oracle, code).backward()
    for name, grad in gradients(problem).items():
        expected = dense_gradient(getattr(oracle, name))
        scale = 8 * expected.abs().max()
        close(grad, expected, terms=64, magnitude=scale, dtype=LOW[precision])


@pytest.mark.parametrize("dense_grad", GRADIENTS)
@pytest.mark.parametrize("trained", NAMES)
def test_only_what_requires_a_gradient_gets_one(trained, dense_grad):
    problem = make_problem(20, 14, 90)
    getattr(problem, trained).requires_grad_()
    code = encode(problem, "topk", dense_grad=dense_grad)
    fast_loss("squared error", problem, code, dense_grad).backward()
    oracle = make_problem(20, 14, 90).double().requires_grad()
    plain_loss("squared error", oracle, code).backward()
    for name in NAMES:
        grad = dense_gradient(getattr(problem, name))
        expected = (
            dense_gradient(getattr(oracle, name)) if name == trained else torch.zeros_like(grad)
        )
        close(grad, expected, terms=64, magnitude=8 * expected.abs().max(), dtype=torch.float32)


@pytest.mark.parametrize("dense_grad", GRADIENTS)
def test_latents_that_do_not_fire_get_no_gradient(dense_grad):
    problem = make_problem(20, 14, 90)
    problem = problem._replace(b_enc=problem.b_enc - 100).requires_grad()
    code = encode(problem, "topk", dense_grad=dense_grad)
    assert not (code.values > 0).any()
    fast_loss("squared error", problem, code, dense_grad).backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        assert not dense_gradient(getattr(problem, name)).any()


@pytest.mark.parametrize("dense_grad", GRADIENTS)
def test_several_backward_calls_accumulate(dense_grad):
    problem = make_problem(20, 14, 90).requires_grad()
    parts = problem.x.detach()[:9].requires_grad_(), problem.x.detach()[9:].requires_grad_()
    for x in parts:
        batch = problem._replace(x=x)
        code = encode(batch, "topk", dense_grad=dense_grad)
        found = ops.reconstruct(code, problem.W_dec, problem.b_dec, x, dense_grad=dense_grad)
        found.squared_error.sum().backward()
    oracle = problem.double().requires_grad()
    code = encode(problem, "topk")
    residual = plain_code(oracle, code) @ oracle.W_dec + oracle.b_dec - oracle.x
    residual.square().sum().backward()
    found = gradients(problem) | {"x": torch.cat([x.grad for x in parts]).double()}
    assert_same_gradients(found, gradients(oracle))


@pytest.mark.parametrize("dense_grad", GRADIENTS)
def test_batch_without_rows_gives_zero_gradients(dense_grad):
    problem = make_problem(0, 14, 90).requires_grad()
    code = encode(problem, "topk", dense_grad=dense_grad)
    (fast_loss("squared error", problem, code, dense_grad) + code.values.sum()).backward()
    for name in NAMES:
        assert not dense_gradient(getattr(problem, name)).any()


def test_decorrelation_gradient_passes_its_factor_on():
    W = make_problem().W_dec.requires_grad_()
    (3 * ops.decorrelation(W)).backward()
    _, grad = torch.ops.sae_fast.decorrelation(W.detach())
    assert torch.equal(W.grad, 3 * grad)


def test_correlation_gradient_passes_its_factors_on():
    h = make_codes(20, 70).requires_grad_()
    found = ops.code_correlation(h, 40)
    (3 * found.within - 2 * found.between).backward()
    saved = torch.ops.sae_fast.code_correlation(h.detach(), 40)[3:]
    factors = torch.tensor(3.0), torch.tensor(-2.0)
    grad = torch.ops.sae_fast.code_correlation_backward(*factors, h.detach(), 40, *saved)
    assert torch.equal(h.grad, grad)


def test_correlation_that_no_loss_reads_has_no_gradient():
    h = make_codes(20, 70).requires_grad_()
    found = ops.code_correlation(h, 40)
    assert not found.n_active.requires_grad
    found.within.backward()
    assert not h.grad[:, 40:].any()
    assert h.grad[:, :40].any()


def test_values_follow_their_pre_activations():
    problem = make_problem(8, 14, 90)
    code = encode(problem, "topk")
    pre_acts = pre_activations(problem, "fp32")[0].gather(1, code.indices.long())
    close(code.values, pre_acts.relu(), terms=14, magnitude=8 * pre_acts.abs().max())


def test_second_derivatives_are_refused():
    problem = make_problem().requires_grad()
    code = encode(problem, "topk")
    x_hat = ops.decode(code, problem.W_dec, problem.b_dec)
    (grad,) = torch.autograd.grad(x_hat.square().sum(), problem.W_dec, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.skipif(NATIVE, reason="the compiled ops are float32 only")
def test_gradcheck_passes_in_float64():
    problem = make_problem(4, 5, 12).double().requires_grad()
    threshold = torch.full((12,), 0.5, dtype=torch.float64)

    def composition(x, W_enc, b_enc, W_dec, b_dec):
        code = ops.encode_topk(x, W_enc, b_enc, b_dec, 3)
        found = ops.reconstruct(code, W_dec, b_dec, x)
        variable = ops.encode_threshold(x, W_enc, b_enc, b_dec, threshold)
        x_hat = ops.decode(variable, W_dec, b_dec)
        return found.residual, found.squared_error, x_hat, ops.decorrelation(W_dec)

    assert torch.autograd.gradcheck(composition, tuple(problem))
