"""Autocast changes neither the results of ops nor their gradients."""

import pytest
import torch
from torch import Tensor

from sae_fast import SAEConfig, SparseAutoencoder, ops
from sae_fast.ops.full_precision import addmm, matmul

N, D, F = 40, 24, 60


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(N, D), (F, D), (F,), (D,)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


ENCODERS = {
    "topk": lambda *given: ops.encode_topk(*given, 6),
    "batch_topk": lambda *given: ops.encode_batch_topk(*given, 6),
    "threshold": lambda *given: ops.encode_threshold(*given, torch.zeros(F)),
    "abs_topk": lambda *given: ops.encode_abs_topk(*given, 6),
    "groupmax": lambda *given: ops.encode_groupmax(*given, 6),
    "groupmax fp16": lambda *given: ops.encode_groupmax(*given, 6, precision="fp16"),
    "dense": ops.encode_dense,
    "last": lambda *given: ops.encode_last(*given, 7),
}


def results(name):
    """Return a code, a loss of it, and all gradients."""
    x, W_enc, _, b_dec = given = tensors()
    code = ENCODERS[name](*given)
    if isinstance(code, Tensor):
        values, loss = code, code.square().sum()
    else:
        values = code.values
        loss = ops.reconstruct(code, W_enc, b_dec, x).squared_error.sum()
        loss = loss + ops.decorrelation(W_enc)
    return values, loss, *torch.autograd.grad(loss, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ENCODERS)
def test_codes_and_gradients_are_those_without_autocast(name, dtype):
    expected = results(name)
    with torch.autocast("cpu", dtype=dtype):
        actual = results(name)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


MODELS = {
    "groupmax": {"activation": "groupmax"},
    "relu": {"arch": "relu"},
    "gated": {"arch": "gated"},
    "jumprelu": {"arch": "jumprelu", "pre_act_loss_coeff": 1e-3},
    "chunked": {"decorrelation_coeff": 0.1, "decorrelation": "chunked_max"},
    "skip": {"transcoder": True, "d_out": D, "skip_connection": True},
}


def step(settings):
    torch.manual_seed(0)
    k = {} if "arch" in settings else {"k": 6}
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, **k, **settings))
    x = torch.randn(N, D)
    targets = torch.randn(N, D) if "transcoder" in settings else None
    loss = sae.training_loss(x, targets)
    loss.total.backward()
    return loss.total, *(p.grad for p in sae.parameters() if p.grad is not None), sae(x)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_without_autocast(name):
    expected = step(MODELS[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = step(MODELS[name])
    assert len(actual) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_products_of_constants_need_no_graph():
    a, b = torch.randn(5, 6), torch.randn(6, 7)
    expected = a @ b
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matmul(a, b), expected)
        assert not addmm(b[0], a, b).requires_grad
