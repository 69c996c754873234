import pytest
import torch
from plain_sae import left_gradients, make_batch
from plain_thresholded import PATHS, make_thresholded

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig

WAYS = [("sparse", True), ("sparse", False), ("dense", True), ("dense", False)]


def gates(sae, x):
    return ((x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc).detach()


def test_a_new_model_is_a_relu_model():
    sae = SparseAutoencoder(SAEConfig(arch="gated", d_in=12))
    x = make_batch(sae)
    torch.testing.assert_close(sae.encode(x).dense(), gates(sae, x).relu())


@pytest.mark.parametrize(("path", "dense_grad"), WAYS)
def test_auxiliary_term_does_not_reach_the_decoder(path, dense_grad):
    fields = {"reconstruction_coeff": 0.0, "l1_penalty_coeff": 0.0}
    sae = make_thresholded("gated", path, **fields)
    x = make_batch(sae)
    sae.training_loss(x, dense_grad=dense_grad).total.backward()
    left = left_gradients(sae)
    assert not left["W_dec"].any()
    assert not left["r_mag"].any()
    assert not left["b_mag"].any()
    assert left["W_enc"].any()
    assert left["b_enc"].any()
    # b_dec gets the gradient through the encoder only; the decoder's, the mean error, is left out.
    of_gate = gates(sae, x)
    of_gate.requires_grad_()
    by_gate = of_gate.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
    (by_gate - x).square().sum(1).mean().backward()
    as_encoder = -(of_gate.grad @ sae.W_enc.detach()).sum(0)
    torch.testing.assert_close(left["b_dec"], as_encoder, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_penalty_is_on_the_gates_not_on_the_magnitudes(path):
    sae = make_thresholded("gated", path, l1_penalty_coeff=2.0)
    x = make_batch(sae)
    expected = 2.0 * gates(sae, x).relu().sum(1).mean()
    torch.testing.assert_close(sae.training_loss(x).components["l1_loss"], expected)
    with torch.no_grad():
        sae.r_mag.add_(1.0)
    torch.testing.assert_close(sae.training_loss(x).components["l1_loss"], expected)


@pytest.mark.parametrize("path", PATHS)
def test_open_gate_with_no_magnitude_does_not_fire(path):
    sae = make_thresholded("gated", path)
    with torch.no_grad():
        sae.b_mag.fill_(-100.0)
    loss = sae.training_loss(make_batch(sae))
    assert float(loss.components["l0"]) == 0
    assert not loss.code.fired().any()
    sae.after_step_(loss.code)
    assert float(sae.listed_per_token) > 1  # the step still works on the active gates


def test_folding_the_normalization_scales_the_magnitudes_bias_alone():
    sae = make_thresholded("gated")
    sae.set_normalization_(torch.zeros(12), 0.25)
    folded = sae.fold_normalization()
    torch.testing.assert_close(folded.b_mag, sae.b_mag / 0.25)
    assert torch.equal(folded.r_mag, sae.r_mag)


def test_own_parameters_are_saved_and_loaded(tmp_path):
    sae = make_thresholded("gated")
    sae.save(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.r_mag, sae.r_mag)
    assert torch.equal(loaded.b_mag, sae.b_mag)
    assert torch.equal(loaded(make_batch(sae)), sae(make_batch(sae)))
