"""relu, jumprelu and gated: every term and gradient, both ways, against plain dense PyTorch."""

import pytest
import torch
from plain_sae import error_term, left_gradients, make_batch
from plain_thresholded import (
    PATHS,
    make_thresholded,
    plain_code,
    plain_gradients,
    plain_terms,
)

from sae_fast import ops
from sae_fast.ops import native

# The compiled kernels are float32; the reference takes float64, which shows a wrong formula.
DTYPE = torch.float32 if native.load() is not None else torch.float64
TOLERANCE = (
    {"rtol": 1e-4, "atol": 2e-5} if torch.float32 == DTYPE else {"rtol": 1e-9, "atol": 1e-11}
)

JUMP = {"arch": "jumprelu", "sparsity_penalty_coeff": 0.8, "pre_act_loss_coeff": 0.3}
CASES = {
    "relu": {"arch": "relu", "reconstruction_coeff": 0.7},
    "relu, unit rows": {"arch": "relu", "decoder_norm": "unit"},
    "relu, Lp": {"arch": "relu", "sparsity_norm_p": 0.5},
    "relu, Lp, unit rows": {"arch": "relu", "sparsity_norm_p": 0.5, "decoder_norm": "unit"},
    "relu, d_in is 1": {"arch": "relu", "d_in": 1, "d_sae": 5},
    "jumprelu": {**JUMP, "target_l0": 6.0},
    "jumprelu, free rows": {**JUMP, "decoder_norm": "free", "decoder_init_norm": 0.5},
    "jumprelu, l0": {**JUMP, "sparsity_penalty": "l0", "reconstruction_coeff": 0.7},
    "jumprelu, l0, into the encoder": {
        **JUMP,
        "sparsity_penalty": "l0",
        "jumprelu_ste_to_input": True,
    },
    "jumprelu, tanh": {**JUMP, "sparsity_penalty": "tanh"},
    "jumprelu, Anthropic's": {
        **JUMP,
        "sparsity_penalty": "tanh",
        "decoder_norm": "free",
        "jumprelu_ste_to_input": True,
        "jumprelu_init_threshold": 0.1,
        "jumprelu_bandwidth": 2.0,
    },
    "jumprelu, narrow window": {**JUMP, "jumprelu_bandwidth": 0.001},
    "gated": {"arch": "gated", "reconstruction_coeff": 0.7, "pre_act_loss_coeff": 0.3},
    "relu, fvu": {"arch": "relu", "loss_fn": "fvu", "reconstruction_coeff": 0.7},
    "gated, fvu": {"arch": "gated", "loss_fn": "fvu"},
    "gated, free rows": {"arch": "gated", "decoder_norm": "free", "decoder_init_norm": 0.5},
}
WAYS = [("sparse", True), ("sparse", False), ("dense", True), ("dense", False)]
TERMS = [
    *((name, "l1_loss") for name in ("relu", "relu, unit rows", "relu, Lp")),
    *((name, "sparsity_loss") for name in CASES if name.startswith("jumprelu")),
    *((name, "pre_act_loss") for name in ("jumprelu", "jumprelu, free rows")),
]
# Settings that switch off every term but the named one.
ALONE = {
    "l1_loss": {},
    "sparsity_loss": {"pre_act_loss_coeff": 0.0},
    "pre_act_loss": {"sparsity_penalty_coeff": 0.0, "target_l0": None},
}


@pytest.fixture(params=CASES, name="fields")
def make_fields(request):
    return CASES[request.param]


def make(fields, path="sparse"):
    return make_thresholded(path=path, dtype=DTYPE, dead=(1, 3), **fields)


def assert_gradients(sae, expected):
    left = left_gradients(sae)
    assert left.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            left[name], gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("path", "dense_grad"), WAYS)
def test_terms_and_gradients_equal_plain_pytorch(fields, path, dense_grad, device):
    sae = make(fields, path)
    x = make_batch(sae).to(device)
    sae.to(device)
    loss = sae.training_loss(x, dense_grad=dense_grad)
    assert isinstance(loss.code, ops.SparseCode if path == "sparse" else ops.DenseCode)
    expected = plain_terms(sae, x)
    for name, term in expected.items():
        torch.testing.assert_close(loss.components[name], term.detach(), **TOLERANCE)
    torch.testing.assert_close(loss.total.detach(), sum(expected.values()).detach(), **TOLERANCE)
    torch.testing.assert_close(loss.code.dense(), plain_code(sae, x), **TOLERANCE)
    loss.total.backward()
    assert_gradients(sae, plain_gradients(sae, x))


@pytest.mark.parametrize(("path", "dense_grad"), WAYS)
@pytest.mark.parametrize(("case", "term"), TERMS)
def test_gradient_of_one_term_equals_autograd(case, term, path, dense_grad):
    sae = make({**CASES[case], "reconstruction_coeff": 0.0, **ALONE[term]}, path)
    x = make_batch(sae, 200)
    loss = sae.training_loss(x, dense_grad=dense_grad)
    assert {name for name in sae.term_names if float(loss.components[name]) != 0} == {term}
    loss.total.backward()
    expected = plain_gradients(sae, x, term)
    assert any(map(torch.any, expected.values()))
    assert_gradients(sae, expected)


def test_both_ways_agree_about_what_fires(fields):
    codes = []
    for path in PATHS:
        sae = make(fields, path)
        codes.append(sae.training_loss(make_batch(sae), dense_grad=False).code)
    sparse, dense = codes
    assert torch.equal(sparse.l0(), dense.l0())
    assert torch.equal(sparse.fired(), dense.fired())
    assert sparse.n_listed == int(dense.n_listed)
    assert (sparse.n_rows, sparse.d_sae) == (dense.n_rows, dense.d_sae)


def test_what_fired_is_the_same_after_a_backward_has_made_the_view(fields):
    sae = make(fields)
    loss = sae.training_loss(make_batch(sae), dense_grad=False)
    before = loss.code.fired()
    loss.total.backward()
    assert torch.equal(loss.code.fired(), before)
    assert torch.equal(before, (loss.code.dense() > 0).any(0))


@pytest.mark.parametrize("path", PATHS)
def test_sparsity_weight_scales_the_penalties_alone(fields, path):
    sae = make(fields, path)
    x = make_batch(sae)
    whole, half = (sae.training_loss(x, sparsity_weight=w).components for w in (1.0, 0.5))
    assert torch.equal(whole["recon_loss"], half["recon_loss"])
    penalty = "sparsity_loss" if "sparsity_loss" in whole else "l1_loss"
    torch.testing.assert_close(half[penalty], whole[penalty] / 2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_ways_agree_in_low_precision(fields, precision):
    found = []
    for path in PATHS:
        sae = make_thresholded(path=path, **fields)
        sae.training_loss(make_batch(sae), precision=precision).total.backward()
        found.append(left_gradients(sae))
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0.02 * scale + 1e-6)


def test_inference_gives_the_code_of_training(fields):
    sae = make(fields)
    x = make_batch(sae)
    torch.testing.assert_close(sae.encode(x).dense(), plain_code(sae, x), **TOLERANCE)
    error = error_term(sae, sae(x) - x, x).detach()
    recon_loss = sae.training_loss(x).components["recon_loss"]
    torch.testing.assert_close(recon_loss, sae.config.reconstruction_coeff * error, **TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
def test_nan_input_shows_in_the_loss(fields, path):
    sae = make(fields, path)
    x = make_batch(sae)
    x[3, 0] = torch.nan
    assert sae.training_loss(x).total.isnan()


def test_code_where_nothing_is_listed_has_finite_gradients(fields):
    sae = make(fields)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    loss = sae.training_loss(make_batch(sae), dense_grad=False)
    loss.total.backward()
    assert float(loss.components["l0"]) == 0
    assert all(bool(gradient.isfinite().all()) for gradient in left_gradients(sae).values())


def test_folding_the_normalization_keeps_the_function(fields):
    sae = make_thresholded(**fields)
    sae.set_normalization_(torch.linspace(-2, 3, sae.config.d_in), 0.25)
    x = 4 * make_batch(sae, 50)
    folded = sae.fold_normalization()
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.encode(x).dense(), 4 * sae.encode(x).dense())
