import pytest
import torch
from plain_sae import make_batch
from plain_thresholded import PATHS, go, make_thresholded

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.thresholded import DENSE_FROM
from sae_fast.config import SAEConfig
from sae_fast.ops import DenseCode, SparseCode


def test_free_decoder_starts_tied_at_the_norm_asked_for():
    sae = SparseAutoencoder(SAEConfig(arch="relu", d_in=12, decoder_init_norm=0.3))
    assert torch.equal(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((96,), 0.3))


@pytest.mark.parametrize("path", PATHS)
def test_penalty_does_not_change_where_the_decoder_grows_and_the_code_shrinks(path):
    sae = make_thresholded("relu", path)
    x = make_batch(sae)
    before = sae.training_loss(x).components
    with torch.no_grad():
        sae.W_dec.mul_(8)
        sae.W_enc.div_(8)
        sae.b_enc.div_(8)
    after = sae.training_loss(x).components
    for name in ("recon_loss", "l1_loss"):
        torch.testing.assert_close(after[name], before[name])


@pytest.mark.parametrize("path", PATHS)
def test_penalty_reaches_the_decoder_along_its_own_row(path):
    sae = make_thresholded("relu", path, reconstruction_coeff=0.0, l1_penalty_coeff=2.0)
    loss = sae.training_loss(make_batch(sae))
    loss.total.backward()
    strength = 2.0 * loss.code.dense().detach().mean(0)[:, None]
    direction = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec.grad, strength * direction)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_lp_penalty_has_a_finite_slope_at_zero(p):
    sae = make_thresholded("relu", sparsity_norm_p=p, reconstruction_coeff=0.0)
    loss = sae.training_loss(make_batch(sae))
    (grad,) = torch.autograd.grad(loss.total, loss.code.values)
    largest = 5.0 * float(sae.W_dec.detach().norm(dim=1).max()) * p * 1e-3 ** (p - 1) / 30
    assert 0 < float(grad.min()) < float(grad.max()) <= largest * (1 + 1e-5)


def test_a_new_model_starts_on_all_latents():
    sae = SparseAutoencoder(SAEConfig(arch="relu", d_in=12))
    assert isinstance(sae.training_loss(make_batch(sae)).code, DenseCode)


@pytest.mark.parametrize("path", PATHS)
def test_next_step_goes_by_how_many_were_listed(path):
    sae = make_thresholded("relu", path)
    x = make_batch(sae)
    kinds = []
    for wanted in (0.5, 2.0):  # times the share from which dense is faster
        shift = _bias_that_lists(sae, x, wanted * DENSE_FROM)
        with torch.no_grad():
            sae.b_enc.add_(shift)
        go(sae, path)
        code = sae.training_loss(x).code
        sae.after_step_(code)
        assert float(sae.listed_per_token) == pytest.approx(float(code.l0().float().mean()))
        kinds.append(type(sae.training_loss(x).code))
    assert kinds == [SparseCode, DenseCode]


def _bias_that_lists(sae, x, share):
    pre_acts = ((x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc).flatten()
    return -pre_acts.quantile(1 - share).detach()


def test_way_of_the_next_step_is_saved_and_loaded(tmp_path):
    sae = make_thresholded("relu")
    sae.after_step_(sae.training_loss(make_batch(sae)).code)
    sae.save(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.listed_per_token, sae.listed_per_token)
    assert torch.equal(loaded(make_batch(sae)), sae(make_batch(sae)))
