"""The loss of a reconstruction by term, and the metrics of codes and errors."""

import pytest
import torch
from plain_sae import PARAMETERS, left_gradients, make_batch, make_sae, plain_terms

from sae_fast.autoencoder import temporal_smoothness_loss
from sae_fast.ops import SparseCode

TERMS = {
    "reconstruction_coeff": 0.7,
    "l1_penalty_coeff": 0.3,
    "decorrelation_coeff": 2.0,
    "aux_k_coeff": 0.0,
}
NAMES = {*("recon_loss", "l1_loss", "decorr_loss", "probe_loss", "temporal_loss", "total_loss")}


def make_normalized(**fields):
    """Make a model with a mean and a scale, and activations that are not normalised."""
    sae = make_sae(**fields)
    sae.set_normalization_(torch.linspace(-1, 1, 12), 1.7)
    x = make_batch(sae) / 1.7 + torch.linspace(-1, 1, 12)
    return sae, x


@pytest.mark.parametrize("dense", [False, True])
def test_components_are_those_of_the_training_loss(dense):
    sae, x = make_normalized(**TERMS)
    code = sae.encode(x)
    h = code.dense() if dense else code
    found = sae.compute_loss_components(x, sae.decode(code), h)
    trained = sae.training_loss(sae.normalize(x))
    assert set(found) == NAMES | {"total_loss_tensor"}
    assert all(isinstance(found[name], float) for name in NAMES)
    for name in ("recon_loss", "l1_loss", "decorr_loss"):
        assert found[name] == pytest.approx(float(trained.components[name]), rel=1e-4)
        assert found[name] > 0
    assert found["total_loss"] == pytest.approx(trained.total.item(), rel=1e-4)
    assert found["total_loss_tensor"].item() == pytest.approx(found["total_loss"], rel=1e-6)


PENALTIES = {
    "fvu": {"loss_fn": "fvu"},
    "signed": {"activation": "abs_topk", "l1_penalty_coeff": 0.3},
    "free rows": {"arch": "relu", "k": None},
    "Lp": {"arch": "relu", "k": None, "sparsity_norm_p": 0.5},
    "pairs": {"independence_coeff": 0.5, "orthogonality_coeff": 2.0, "correlation_split": 30},
    "slots": {
        **{"arch": "slots", "k": None, "n_relations": 3, "slots_mode": "separate_activation"},
        **{"alignment_coeff": 0.0, "l1_penalty_coeff": 0.1},
    },
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("case", PENALTIES)
def test_every_penalty_on_the_code_is_the_one_that_is_trained(case, dense):
    sae, x = make_normalized(aux_k_coeff=0.0, **PENALTIES[case])
    code = sae.encode(x)
    h = code.dense() if dense else code
    found = sae.compute_loss_components(x, sae.decode(code), h)
    labels = {"relations": torch.full((len(x),), -1)} if case == "slots" else {}
    trained = sae.training_loss(sae.normalize(x), **labels)
    for name in {"recon_loss", "l1_loss", "independence_loss", "orthogonality_loss"} & {
        *trained.components
    }:
        assert found[name] == pytest.approx(float(trained.components[name]), rel=1e-4), name
    assert found["total_loss"] == pytest.approx(trained.total.item(), rel=1e-4)


@pytest.mark.parametrize("dense", [False, True])
def test_the_total_has_the_gradient_of_the_training_loss(dense):
    sae, x = make_normalized(**TERMS)
    code = sae.encode(x)
    h = code.dense() if dense else code
    sae.compute_loss_components(x, sae.decode(code), h)["total_loss_tensor"].backward()
    found = left_gradients(sae)
    rows = sae.normalize(x)
    terms = sum(plain_terms(sae, rows).values())
    expected = torch.autograd.grad(terms, [sae.get_parameter(name) for name in PARAMETERS])
    for name, gradient in zip(PARAMETERS, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_given_losses_are_weighted_and_reach_the_code():
    sae, x = make_normalized(probe_loss_coeff=0.5, temporal_smoothness_coeff=0.25)
    code = sae.encode(x)
    starts = torch.zeros(30, dtype=torch.bool)
    smooth = temporal_smoothness_loss(code, starts)
    found = sae.compute_loss_components(
        x, sae.decode(code), code, probe_loss=torch.tensor(3.0), temporal_loss=smooth
    )
    assert found["probe_loss"] == 1.5
    assert found["temporal_loss"] == pytest.approx(0.25 * smooth.item(), rel=1e-6)
    alone = sae.compute_loss_components(x, sae.decode(code), code)
    extra = 1.5 + 0.25 * smooth.item()
    assert found["total_loss"] == pytest.approx(alone["total_loss"] + extra, rel=1e-5)
    with_term, without = (
        torch.autograd.grad(part["total_loss_tensor"], sae.W_enc, retain_graph=True)[0]
        for part in (found, alone)
    )
    assert not torch.allclose(with_term, without)


def test_further_terms_have_their_entry_and_are_added():
    sae, x = make_normalized()
    code = sae.encode(x)
    alone = sae.compute_loss_components(x, sae.decode(code), code)
    aux_loss = 2.0 * sae.b_dec.sum()
    found = sae.compute_loss_components(x, sae.decode(code), code, aux_loss=aux_loss)
    assert found["aux_loss"] == pytest.approx(aux_loss.item())
    expected = alone["total_loss"] + aux_loss.item()
    assert found["total_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "rows of k", "rows of any length"])
def test_activation_stats_count_what_fires(kind):
    sae = make_sae(d_sae=5, k=2, dead=(1, 4))
    dense = torch.tensor([[1.0, 0, 3, 0, 0], [0, 0, 0, 0, 0], [0, 0, 2, 4, 0], [0, 0, 0, 0, 0]])
    h = dense
    if kind != "dense":
        values, indices = dense.topk(2, dim=1)
        h = SparseCode(values, indices.int(), 5)
    if kind == "rows of any length":
        kept = h.values > 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
        h = SparseCode(h.values[kept], h.indices[kept], 5, offsets)
    assert sae.get_activation_stats(h) == pytest.approx(
        {
            "l0": 1.0,
            "activation_fraction": 0.2,
            "mean_activation": 2.5,
            "max_activation": 4.0,
            "silent_fraction": 0.4,
            "dead_fraction": 0.4,
        }
    )


@pytest.mark.parametrize("dense", [False, True])
def test_latents_with_negative_values_count_in_abs_topk(dense):
    sae = make_sae(activation="abs_topk")
    code = sae.encode(make_batch(sae))
    assert (code.values < 0).any()
    stats = sae.get_activation_stats(code.dense() if dense else code)
    assert stats["l0"] == 5
    assert stats["mean_activation"] == pytest.approx(code.values.abs().mean().item(), rel=1e-5)
    assert stats["max_activation"] == pytest.approx(code.values.abs().max().item())
    silent = (code.dense() == 0).all(0).double().mean()
    assert stats["silent_fraction"] == pytest.approx(silent.item())


def test_activation_stats_of_silence_are_zero():
    stats = make_sae(d_sae=5, k=2).get_activation_stats(torch.zeros(2, 3, 5))
    assert stats["silent_fraction"] == 1.0
    assert [stats[name] for name in ("l0", "mean_activation", "max_activation")] == [0, 0, 0]


def test_reconstruction_error_is_in_the_units_of_the_activations():
    sae, x = make_normalized()
    x = x.view(3, 10, 12)
    x_hat = sae(x).detach()
    error, flat = (x_hat - x).view(30, 12).double(), x.view(30, 12).double()
    fvu = error.square().sum() / (flat - flat.mean(0)).square().sum()
    cosine = torch.cosine_similarity(flat, x_hat.view(30, 12).double(), dim=1).mean()
    assert sae.get_reconstruction_error(x, x_hat) == pytest.approx(
        {
            "squared_error": float(error.square().sum(1).mean()),
            "mse": float(error.square().mean()),
            "fvu": float(fvu),
            "explained_variance": 1 - float(fvu),
            "explained_variance_overall": 1 - float(error.square().mean() / flat.var()),
            "relative_error": float(error.norm() / flat.norm()),
            "cosine": float(cosine),
        }
    )


def test_normalize_decoder_gives_unit_rows_in_the_same_directions():
    sae = make_sae()
    before = sae.W_dec.detach().clone()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 3, 40)[:, None])
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec.detach(), before)


@pytest.mark.parametrize(
    ("x_hat", "h", "message"),
    [
        (torch.zeros(1, 12), torch.zeros(30, 40), r"x_hat must have the shape of x, \(30, 12\)"),
        (
            torch.zeros(30, 12),
            torch.zeros(30, 39),
            "h must be a code of d_sae = 40 .*, got 39",
        ),
        (torch.zeros(30, 12), torch.zeros(29, 40), "h must be the code of 30 tokens, got 29"),
    ],
)
def test_what_does_not_belong_together_is_refused(x_hat, h, message):
    sae = make_sae()
    with pytest.raises(ValueError, match=message):
        sae.compute_loss_components(make_batch(sae), x_hat, h)
