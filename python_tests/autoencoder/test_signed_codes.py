"""Codes without ReLU: f = (x − b_dec) W_encᵀ + b_enc, with the L1 penalty on magnitudes."""

import pytest
import torch
from plain_sae import error_term, left_gradients, make_batch
from plain_thresholded import make_thresholded, plain_code, plain_gradients, plain_terms

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.ops import native
from sae_fast.training.trainer import Trainer

# The compiled kernels are float32; the reference takes float64, which shows a wrong formula.
DTYPE = torch.float32 if native.load() is not None else torch.float64
TOLERANCE = (
    {"rtol": 1e-4, "atol": 2e-5} if torch.float32 == DTYPE else {"rtol": 1e-9, "atol": 1e-11}
)
CASES = {
    "free rows": {},
    "unit rows": {"decoder_norm": "unit"},
    "Lp": {"sparsity_norm_p": 0.5},
    "Lp, unit rows": {"sparsity_norm_p": 0.5, "decoder_norm": "unit"},
    "fvu": {"loss_fn": "fvu", "reconstruction_coeff": 0.7},
    "b_dec not subtracted": {"subtract_b_dec": False},
}


def make(case, dtype=DTYPE, **more):
    return make_thresholded("relu", dtype=dtype, use_relu=False, **{**CASES[case], **more})


@pytest.mark.parametrize("dense_grad", [True, False])
@pytest.mark.parametrize("term", [None, "recon_loss", "l1_loss"])
@pytest.mark.parametrize("case", CASES)
def test_terms_and_gradients_equal_plain_pytorch(case, term, dense_grad):
    without_sparsity = {"l1_penalty_coeff": 0.0, "sparsity_norm_p": 1.0}
    alone = {"recon_loss": without_sparsity, "l1_loss": {"reconstruction_coeff": 0.0}}
    sae = make(case, **alone.get(term, {}))
    x = make_batch(sae)
    loss = sae.training_loss(x, dense_grad=dense_grad)
    for name, expected in plain_terms(sae, x).items():
        torch.testing.assert_close(loss.components[name], expected.detach(), **TOLERANCE)
    torch.testing.assert_close(loss.code.dense(), plain_code(sae, x), **TOLERANCE)
    assert (loss.code.dense() < 0).any()
    loss.total.backward()
    found = left_gradients(sae)
    for name, gradient in plain_gradients(sae, x, term).items():
        torch.testing.assert_close(
            found[name], gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_inference_gives_the_code_of_training(case):
    sae = make(case)
    x = make_batch(sae)
    code = sae.encode(x)
    assert isinstance(code, ops.SparseCode)
    torch.testing.assert_close(code.dense(), plain_code(sae, x), **TOLERANCE)
    torch.testing.assert_close(sae.decode(code), sae.decode(code.dense()), **TOLERANCE)
    error = error_term(sae, sae(x) - x, x).detach()
    recon_loss = sae.training_loss(x).components["recon_loss"]
    torch.testing.assert_close(recon_loss, sae.config.reconstruction_coeff * error, **TOLERANCE)


def test_gradients_of_an_inference_equal_plain_pytorch():
    sae = make("free rows")
    x = make_batch(sae).requires_grad_()
    tensors = [*sae.parameters(), x]
    found = torch.autograd.grad((sae(x) - x).square().sum(), tensors)
    plain = plain_code(sae, x) @ sae.W_dec + sae.b_dec - x
    expected = torch.autograd.grad(plain.square().sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_every_latent_is_active_whatever_its_sign():
    sae = make("free rows").requires_grad_(False)
    loss = sae.training_loss(make_batch(sae))
    assert float(loss.components["l0"]) == sae.config.d_sae
    assert loss.code.fired().all()
    code = sae.encode(make_batch(sae))
    assert (code.l0() == sae.config.d_sae).all()
    stats, magnitudes = sae.get_activation_stats(code), code.values.abs()
    assert stats["l0"] == sae.config.d_sae
    assert stats["mean_activation"] == pytest.approx(float(magnitudes.mean()), rel=1e-5)
    assert stats["max_activation"] == pytest.approx(float(magnitudes.max()))


@pytest.mark.parametrize("case", ["free rows", "unit rows", "Lp"])
@pytest.mark.parametrize("as_dense", [False, True])
def test_loss_components_are_those_of_training(case, as_dense):
    sae = make(case)
    x = make_batch(sae)
    code = sae.encode(x)
    found = sae.compute_loss_components(x, sae.decode(code), code.dense() if as_dense else code)
    expected = sae.training_loss(x).components
    for name in ("recon_loss", "l1_loss"):
        assert found[name] == pytest.approx(float(expected[name]), rel=1e-5)


def test_unit_rows_start_near_the_activations():
    """With all latents active, d_sae / d_in unit rows tied to W_enc would add up to 16 times x."""
    sae = SparseAutoencoder(
        SAEConfig(arch="relu", d_in=64, d_sae=1024, use_relu=False, decoder_norm="unit")
    ).requires_grad_(False)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    assert float((sae(x) - x).square().sum() / x.square().sum()) < 0.5


def test_signed_model_is_trained_saved_and_read_back(tmp_path):
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(2))
    config = SAEConfig(arch="relu", d_sae=40, use_relu=False, l1_penalty_coeff=0.1)
    run = TrainConfig(batch_size=100, max_steps=60, lr=1e-2, log_every=10)
    trainer = Trainer(config, run, x[200:], heldout=x[:200], show_progress=False)
    sae = trainer.train()
    assert trainer.summary["final_heldout_fvu"] < 0.1
    assert trainer.summary["final_heldout_l0"] == 40
    sae.save(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert not loaded.config.use_relu
    assert torch.equal(loaded(x), sae(x))
