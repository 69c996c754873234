"""The probe on the code against a dense linear layer, and its place in a model."""

import pytest
import torch
from plain_sae import PARAMETERS, left_gradients, make_batch, make_sae, plain_acts
from torch.nn import functional

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.ops import native

DTYPE = torch.float32 if native.load() is not None else torch.float64
TOLERANCE = (
    {"rtol": 1e-4, "atol": 1e-5} if torch.float32 == DTYPE else {"rtol": 1e-9, "atol": 1e-11}
)
PROBE = ("W_probe", "b_probe")
ALONE = {"reconstruction_coeff": 0.0, "aux_k_coeff": 0.0, "probe_loss_coeff": 0.6}
CLASSES = {"probe_labels": "labels/rule", "probe_classes": 4}
NUMBERS = {"probe_labels": "labels/score", "probe_task": "regression"}


def make_probed(seed=0, dtype=DTYPE, **fields):
    """Make a model with a probe that is not zero."""
    sae = make_sae(seed, dtype=dtype, **fields)
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for name in PROBE:
            parameter = sae.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def make_labels(task, n_tokens=30):
    generator = torch.Generator().manual_seed(5)
    if task == "score":
        return torch.randn(n_tokens, generator=generator, dtype=DTYPE)
    return torch.randint(-1, 4, (n_tokens,), generator=generator)


def plain_loss(sae, acts, labels):
    """Return the loss without coefficient, and the quality, from a dense code [N, F]."""
    predicted = acts @ sae.W_probe + sae.b_probe
    kept = slice(None) if labels.is_floating_point() else labels >= 0
    predicted, labels = predicted[kept], labels[kept]
    if sae.config.probe_task == "regression":
        error = predicted[:, 0] - labels
        spread = (labels - labels.to(error.dtype).mean()).square().sum()
        return error.square().mean(), 1 - error.square().sum() / spread
    right = predicted.argmax(1) == labels
    return functional.cross_entropy(predicted, labels), right.to(acts.dtype).mean()


CASES = {
    "classes": (CLASSES, "rule"),
    "classes, batch_topk": ({**CLASSES, "arch": "batch_topk"}, "rule"),
    "numbers": (NUMBERS, "score"),
    "whole numbers": (NUMBERS, "rule"),
}


@pytest.mark.parametrize("dense_grad", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_a_dense_probe_for_every_parameter(case, dense_grad):
    fields, task = CASES[case]
    sae = make_probed(**ALONE, **fields)
    x, labels = make_batch(sae), make_labels(task)
    loss = sae.training_loss(x, dense_grad=dense_grad, labels=labels)
    plain, quality = plain_loss(sae, plain_acts(sae, x), labels)
    torch.testing.assert_close(loss.components["probe_loss"], 0.6 * plain.detach(), **TOLERANCE)
    torch.testing.assert_close(loss.total.detach(), 0.6 * plain.detach(), **TOLERANCE)
    name = "probe_accuracy" if task == "rule" and "classes" in case else "probe_r2"
    assert float(loss.components[name]) == pytest.approx(quality.item(), rel=1e-4)
    loss.total.backward()
    names = (*PARAMETERS, *PROBE)
    parameters = [sae.get_parameter(name) for name in names]
    expected = torch.autograd.grad(0.6 * plain, parameters, materialize_grads=True)
    left = left_gradients(sae) | {name: sae.get_parameter(name).grad for name in PROBE}
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(
            left[name], gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert left["W_enc"].abs().sum() > 0
    assert left["W_probe"].abs().sum() > 0


def test_tokens_without_labels_change_nothing():
    sae = make_probed(**ALONE, **CLASSES)
    x, labels = make_batch(sae), make_labels("rule")
    labelled = labels >= 0
    whole = sae.training_loss(x, labels=labels).components
    kept = sae.training_loss(x[labelled], labels=labels[labelled]).components
    assert 0 < int(labelled.sum()) < 30
    for name in ("probe_loss", "probe_accuracy"):
        torch.testing.assert_close(whole[name], kept[name])


def test_a_batch_without_labels_costs_nothing_and_has_no_quality():
    sae = make_probed(**ALONE, **CLASSES)
    loss = sae.training_loss(make_batch(sae), labels=torch.full((30,), -1))
    loss.total.backward()
    assert loss.total.item() == 0
    assert torch.isnan(loss.components["probe_accuracy"])
    assert not sae.W_probe.grad.any()
    assert not any(gradient.any() for gradient in left_gradients(sae).values())


def test_a_probe_starts_undecided_and_initialize_puts_it_back():
    sae = make_probed(**ALONE, **CLASSES)
    assert sae.W_probe.shape == (40, 4)
    sae.initialize_(torch.Generator().manual_seed(0))
    assert not sae.W_probe.any()
    labels = torch.arange(30) % 4
    loss = sae.training_loss(make_batch(sae), labels=labels).components["probe_loss"]
    assert float(loss) == pytest.approx(0.6 * torch.tensor(4.0).log().item(), rel=1e-5)


def test_a_model_without_a_probe_has_no_parameters_for_it():
    for fields in ({}, {"probe_loss_coeff": 0.5}):
        sae = make_sae(**fields)
        assert {name for name, _ in sae.named_parameters()} == set(PARAMETERS)
        assert "probe_loss" not in sae.training_loss(make_batch(sae)).components
        with pytest.raises(ValueError, match="the model was trained without one"):
            sae.probe(sae.encode(make_batch(sae)))


def test_labels_of_no_weight_are_refused():
    with pytest.raises(ValueError, match="'labels/rule' needs a probe_loss_coeff above 0"):
        make_sae(**CLASSES)


def test_a_probe_of_unknown_classes_makes_no_model():
    config = SAEConfig(d_in=4, probe_loss_coeff=1.0, probe_labels="labels/rule")
    with pytest.raises(ValueError, match="probe_classes must be given"):
        SparseAutoencoder(config)


def test_a_saved_model_predicts_the_same(tmp_path):
    sae = make_probed(dtype=torch.float32, **ALONE, **CLASSES)
    sae.save(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.probe(again.encode(x)), sae.probe(sae.encode(x)))
    assert again.probe(again.encode(x)).shape == (9, 4)


def test_folding_the_normalization_leaves_the_predictions():
    sae = make_probed(dtype=torch.float32, **ALONE, **CLASSES)
    mean = torch.randn(12, generator=torch.Generator().manual_seed(2))
    sae.set_normalization_(mean, 3.7)
    folded = sae.fold_normalization()
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(3)) + mean
    expected = sae.probe(sae.encode(x))
    torch.testing.assert_close(folded.probe(folded.encode(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels must be given with probe_loss_coeff above 0"),
        (torch.zeros(29, dtype=torch.int64), r"labels must have shape \(30,\), got \(29,\)"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
    sae = make_probed(**ALONE, **CLASSES)
    with pytest.raises(ValueError, match=message):
        sae.training_loss(make_batch(sae), labels=labels)
