"""Folding the norms of decoder rows into the codes does not change the function."""

import pytest
import torch
from plain_sae import make_batch, make_sae
from plain_thresholded import make_thresholded

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder

FREE = {"decoder_norm": "free", "decoder_init_norm": 0.5}
SLOTS = {"n_relations": 4, "n_answers": 3, "value_hidden": 5}
SKIP = {"transcoder": True, "d_out": 7, "skip_connection": True}
PROBE = {"probe_loss_coeff": 1.0, "probe_labels": "labels/rule", "probe_classes": 3}
CASES = {
    "relu": {"arch": "relu", **FREE},
    "relu, Lp": {"arch": "relu", **FREE, "sparsity_norm_p": 0.5},
    "relu, normalised": {"arch": "relu", **FREE, "normalize_activations": "mean_scale"},
    "relu, with a probe": {"arch": "relu", **FREE, **PROBE},
    "jumprelu": {"arch": "jumprelu", **FREE, "target_l0": 6.0},
    "gated": {"arch": "gated", **FREE},
    "slots": {"arch": "slots", **FREE, **SLOTS},
    "relu transcoder": {"arch": "relu", **FREE, **SKIP},
    "jumprelu transcoder": {"arch": "jumprelu", **FREE, **SKIP, "target_l0": 6.0},
    "gated transcoder": {"arch": "gated", **FREE, **SKIP},
}


def make(case: str) -> SparseAutoencoder:
    sae: SparseAutoencoder = make_thresholded(**CASES[case])
    if not sae.config.transcoder:
        sae.set_normalization_(torch.linspace(-1, 2, 12), 0.3)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("name", ["fold_decoder_norms", "normalize_decoder"])
@pytest.mark.parametrize("case", CASES)
def test_free_rows_get_norm_1_and_the_reconstruction_stays(case, name):
    sae = make(case)
    x, norms = make_batch(sae), sae.W_dec.norm(dim=1)
    before, code = sae(x), sae.encode(x).dense()
    getattr(sae, name)()
    torch.testing.assert_close(sae(x), before, rtol=1e-5, atol=1e-5)
    bound = 4 if sae.config.arch == "slots" else 0
    free = slice(0, 40 - bound)
    torch.testing.assert_close(sae.W_dec.norm(dim=1)[free], torch.ones(40 - bound))
    norms[40 - bound :] = 1
    torch.testing.assert_close(sae.encode(x).dense(), code * norms, rtol=1e-5, atol=1e-5)
    assert not (norms == 1).all()


@pytest.mark.parametrize("case", ["relu", "relu, Lp", "gated"])
def test_folding_changes_no_term_of_a_loss_that_is_weighted_by_norms(case):
    sae = make(case)
    x = make_batch(sae)
    before = sae.training_loss(x).components
    sae.fold_decoder_norms()
    after = sae.training_loss(x).components
    for name in ("recon_loss", "l1_loss", "aux_loss", "l0"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)


def test_folding_keeps_what_a_probe_predicts():
    sae = make("relu, with a probe")
    x = make_batch(sae)
    before = sae.probe(sae.encode(x))
    sae.fold_decoder_norms()
    torch.testing.assert_close(sae.probe(sae.encode(x)), before, rtol=1e-5, atol=1e-5)
    assert before.any()


def test_folding_keeps_relation_slots_and_their_answers():
    sae = make("slots")
    x, relations = make_batch(sae), torch.arange(30) % 4
    slots = sae.architecture

    def answers():
        scores = ops.encode_last(x, *sae.weights[:2], sae.weights.input_bias, 4)
        return scores, slots.answer_logits(sae.weights, scores.relu(), relations)

    before = answers()
    sae.fold_decoder_norms()
    for found, expected in zip(answers(), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_with_its_latent():
    sae = make("relu")
    sae.W_dec[3] = 0
    x = make_batch(sae)
    before, values = sae(x), sae.encode(x).dense()[:, 3]
    sae.fold_decoder_norms()
    torch.testing.assert_close(sae(x), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(sae.encode(x).dense()[:, 3], values)


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "matryoshka"])
def test_folding_is_refused_where_latents_are_compared(arch):
    sae = make_sae(arch=arch).requires_grad_(False)
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.fold_decoder_norms()  # rows of norm 1: nothing to do
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())
    sae.W_dec[3] *= 2
    with pytest.raises(ValueError, match=f"norm 1 with arch {arch}, .* got norms from 1 to 2"):
        sae.fold_decoder_norms()
