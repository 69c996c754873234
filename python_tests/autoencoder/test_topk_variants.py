"""Multi-TopK, abs_topk and groupmax in a model; test_training_loss.py tests the gradients."""

import pytest
import torch
from plain_sae import left_gradients, make_batch, make_sae

BATCHES = [{"arch": "topk"}, {"arch": "batch_topk"}, {"arch": "matryoshka"}]
VARIANTS = [{"activation": "abs_topk"}, {"activation": "groupmax"}, {"multi_topk": True}]


@pytest.mark.parametrize("dense_grad", [True, False])
def test_multi_topk_reaches_the_encoder_of_latents_outside_the_k_largest(dense_grad):
    coefficients = {"reconstruction_coeff": 0.0, "aux_k_coeff": 0.0}
    sae = make_sae(k=1, multi_topk=True, **coefficients)
    x = make_batch(sae, 1)
    sae.training_loss(x, dense_grad=dense_grad).total.backward()
    pre_acts = (x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    largest = pre_acts.topk(4).indices[0]
    left = left_gradients(sae)
    for name in ("W_enc", "b_enc", "W_dec"):
        moved = left[name].reshape(40, -1).abs().sum(1).nonzero().flatten()
        assert moved.tolist() == sorted(largest.tolist())


def test_multi_topk_changes_neither_code_nor_the_other_terms():
    plain, multi = make_sae(dead=(1, 8)), make_sae(dead=(1, 8), multi_topk=True)
    x = make_batch(plain)
    expected, found = plain.training_loss(x), multi.training_loss(x)
    assert torch.equal(found.code.dense(), expected.code.dense())
    assert torch.equal(multi.encode(x).dense(), plain.encode(x).dense())
    for name, value in expected.components.items():
        torch.testing.assert_close(found.components[name], value)
    assert "multi_topk_loss" in multi.term_names
    assert "multi_topk_loss" not in plain.term_names


def test_multi_topk_weighs_an_eighth_by_default():
    sae = make_sae(multi_topk=True)
    x = make_batch(sae)
    error = x - make_sae(k=20)(x)
    expected = error.square().sum(1).mean() / 8
    found = sae.training_loss(x).components["multi_topk_loss"]
    torch.testing.assert_close(found, expected.detach())


def test_latent_with_negative_values_only_is_alive_in_abs_topk():
    sae = make_sae(activation="abs_topk", k=2)
    with torch.no_grad():
        sae.b_enc[7] = -100.0
    sae.tokens_since_fired.fill_(5)
    x = make_batch(sae, 10)
    loss = sae.training_loss(x)
    sae.update_fired_(loss.code, 10)
    assert (loss.code.dense()[:, 7] < 0).all()
    assert int(sae.tokens_since_fired[7]) == 0
    assert float(loss.components["l0"]) == 2.0
    assert sae.encode(x).l0().tolist() == [2] * 10


def test_abs_topk_decodes_with_the_sign():
    sae = make_sae(activation="abs_topk", k=40)
    x = make_batch(sae)
    pre_acts = (x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    torch.testing.assert_close(sae(x), pre_acts @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS)
def test_folding_the_normalization_keeps_the_function(fields):
    sae = make_sae(**fields)
    sae.set_normalization_(torch.linspace(-2, 3, 12), 0.25)
    x = make_batch(sae, 50) * 4
    torch.testing.assert_close(sae.fold_normalization()(x), sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS)
def test_variant_is_saved_and_loaded(fields, tmp_path):
    sae = make_sae(**fields)
    sae.save(tmp_path)
    loaded = type(sae).from_pretrained(tmp_path)
    x = make_batch(sae)
    assert loaded.config == sae.config
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.parametrize("fields", [*BATCHES, *VARIANTS[::2]])
def test_k_of_a_step_selects_in_training_and_not_after(fields):
    annealed, wide = make_sae(**fields), make_sae(**{**fields, "k": 9})
    x = make_batch(annealed)
    found, expected = annealed.training_loss(x, k=9), wide.training_loss(x)
    assert torch.equal(found.total, expected.total)
    assert torch.equal(found.code.dense(), expected.code.dense())
    assert float(annealed.encode(x).l0().float().mean()) == 5.0
