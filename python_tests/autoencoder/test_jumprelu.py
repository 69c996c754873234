"""JumpReLU: the straight-through gradients equal the paper's, without known mistakes of peers."""

import pytest
import torch
from plain_sae import make_batch
from plain_thresholded import PATHS, go, make_thresholded

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.training.optimizer.row_optimizer import RowOptimizer

THETA, WIDTH = 1.0, 0.5
CASES = [(0.5, False), (0.875, True), (1.125, True), (1.5, False)]  # pre-activation, inside


def one_latent(pre_act, path="sparse", **fields):
    """Return a model with one latent and an input with this pre-activation, rows of norm 1."""
    settings = {"jumprelu_init_threshold": THETA, "jumprelu_bandwidth": WIDTH}
    settings |= {"sparsity_penalty_coeff": 1.0, **fields}
    sae = SparseAutoencoder(SAEConfig(arch="jumprelu", d_in=2, d_sae=1, **settings))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[pre_act, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
    go(sae, path)
    return sae, torch.tensor([[1.0, 0.0]])


def gradients(sae, x):
    sae.training_loss(x).total.backward()
    return float(sae.threshold.grad), float(sae.b_enc.grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize(("pre_act", "inside"), CASES)
def test_gradient_of_l0_is_one_over_the_bandwidth_inside_the_window(
    pre_act, inside, to_input, path
):
    fields = {"sparsity_penalty": "l0", "jumprelu_ste_to_input": to_input}
    sae, x = one_latent(pre_act, path, reconstruction_coeff=0.0, **fields)
    expected = 1 / WIDTH if inside else 0.0
    assert gradients(sae, x) == (-expected, expected if to_input else 0.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize(("pre_act", "inside"), CASES)
def test_gradient_of_the_value_is_theta_over_the_bandwidth_inside_the_window(
    pre_act, inside, to_input, path
):
    fields = {"sparsity_penalty_coeff": 0.0, "jumprelu_ste_to_input": to_input}
    sae, x = one_latent(pre_act, path, **fields)
    active = pre_act > THETA
    of_value = 2 * ((pre_act if active else 0.0) - 1.0)  # of (f - 1)^2
    in_window = of_value * THETA / WIDTH if inside else 0.0
    expected = -in_window, of_value * active + (in_window if to_input else 0.0)
    assert gradients(sae, x) == expected


@pytest.mark.parametrize("path", PATHS)
def test_entry_just_below_its_threshold_moves_it_though_its_value_is_zero(path):
    sae, x = one_latent(THETA - 0.1, path, sparsity_penalty="l0", reconstruction_coeff=0.0)
    loss = sae.training_loss(x)
    assert float(loss.components["l0"]) == 0
    loss.total.backward()
    assert float(sae.threshold.grad) == -1 / WIDTH


@pytest.mark.parametrize("path", PATHS)
def test_entry_of_negative_pre_activation_inside_a_wide_window_moves_the_threshold(path):
    fields = {"jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 2.0, "sparsity_penalty": "l0"}
    sae, x = one_latent(-0.5, path, reconstruction_coeff=0.0, **fields)
    assert gradients(sae, x)[0] == -1 / 2.0


def test_narrow_bandwidth_divides_the_gradient_once():
    fields = {"jumprelu_bandwidth": 0.001, "sparsity_penalty": "l0"}
    sae, x = one_latent(THETA - 0.0002, reconstruction_coeff=0.0, **fields)
    assert gradients(sae, x)[0] == pytest.approx(-1000.0)


def test_threshold_moves_by_the_learning_rate_however_small_it_is():
    fields = {"jumprelu_init_threshold": 0.001, "jumprelu_bandwidth": 0.001}
    sae, x = one_latent(0.0012, sparsity_penalty="l0", reconstruction_coeff=0.0, **fields)
    optimizer = RowOptimizer(sae)
    sae.training_loss(x, dense_grad=False).total.backward()
    optimizer.step(1e-3)
    assert float(sae.threshold.detach()) == pytest.approx(0.002, rel=1e-3)


def test_threshold_has_a_learning_rate_of_its_own():
    sae = make_thresholded("jumprelu", jumprelu_threshold_lr=0.1)
    before = sae.threshold.detach().clone()
    optimizer = RowOptimizer(sae)
    sae.training_loss(make_batch(sae, 200), dense_grad=False).total.backward()
    moved = sae.threshold.grad != 0
    optimizer.step(1e-2)
    change = (sae.threshold.detach() - before).abs()[moved]
    torch.testing.assert_close(change, torch.full_like(change, 1e-3), rtol=1e-2, atol=0)


def test_threshold_stays_at_zero_or_above():
    sae = make_thresholded("jumprelu")
    with torch.no_grad():
        sae.threshold[:5] = -0.1
    sae.clamp_parameters_()
    assert not sae.threshold[:5].any()
    assert bool((sae.threshold[5:] > 0).all())


def test_threshold_is_never_rounded():
    sae = make_thresholded("jumprelu", jumprelu_init_threshold=0.1001)
    for precision in ("bf16", "fp16"):
        loss = sae.training_loss(make_batch(sae), precision=precision, dense_grad=False)
        loss.total.backward()
        assert sae.threshold.dtype == sae.threshold.grad.dtype == torch.float32
        figure = float(loss.components["mean_threshold"])
        assert figure == float(sae.threshold.detach().mean())


@pytest.mark.parametrize("path", PATHS)
def test_pre_act_loss_reaches_dead_latents_only_and_not_b_dec(path):
    fields = {"reconstruction_coeff": 0.0, "sparsity_penalty_coeff": 0.0, "pre_act_loss_coeff": 1.0}
    dead = (2, 7, 11)
    sae = make_thresholded("jumprelu", path, dead=dead, jumprelu_init_threshold=3.0, **fields)
    sae.training_loss(make_batch(sae)).total.backward()
    for name in ("W_enc", "b_enc", "threshold"):
        moved = sae.get_parameter(name).grad.reshape(40, -1).abs().sum(1) > 0
        assert moved.nonzero().flatten().tolist() == list(dead)
    assert sae.b_dec.grad is None or not sae.b_dec.grad.any()


def test_penalty_without_dead_latents_has_no_pre_act_loss():
    sae = make_thresholded("jumprelu", pre_act_loss_coeff=1.0)
    assert float(sae.training_loss(make_batch(sae)).components["pre_act_loss"]) == 0


def test_folding_the_normalization_scales_the_thresholds():
    sae = make_thresholded("jumprelu")
    sae.set_normalization_(torch.zeros(12), 0.25)
    torch.testing.assert_close(sae.fold_normalization().threshold, sae.threshold / 0.25)


def test_thresholds_are_saved_and_loaded(tmp_path):
    sae = make_thresholded("jumprelu")
    sae.save(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.threshold, sae.threshold)
    assert torch.equal(loaded(make_batch(sae)), sae(make_batch(sae)))
