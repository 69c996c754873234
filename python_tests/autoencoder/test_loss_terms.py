"""Loss terms of one's own: their gradients in factors, against autograd of plain dense PyTorch."""

import plain_sae
import plain_thresholded
import pytest
import torch
from plain_sae import goal, left_gradients, make_batch, make_sae, make_targets
from plain_thresholded import make_thresholded, plain_code
from setting_values import BASES, columns_of, make_model

from sae_fast import LossTerm
from sae_fast.activations import TARGETS, Rows
from sae_fast.autoencoder.architecture import Engine, StepSettings
from sae_fast.autoencoder.architectures import ARCHITECTURES
from sae_fast.autoencoder.loss_terms import checked_terms
from sae_fast.autoencoder.training_loss import batch_loss
from sae_fast.config import SAEConfig
from sae_fast.ops import native

# The compiled kernels are float32; the reference takes float64, which shows a wrong formula.
DTYPE = torch.float32 if native.load() is not None else torch.float64


def usage(sae, batch, code, x_hat):
    """Return a term that depends on codes, reconstruction, input and both matrices."""
    return plain_usage(sae, batch.x, code.dense(), x_hat)


def plain_usage(sae, x, acts, x_hat):
    shares = acts.mean(0)
    norms = (x_hat.square().sum(1) + 1).log().mean() + (x_hat * x[:, : x_hat.shape[1]]).mean()
    return (
        (acts.square().sum(1) + 1).sqrt().mean()
        + (shares.square()).sum()
        + 0.3 * norms
        + (
            0.1
            * (sae.W_dec.sum(0).square().sum() + sae.W_enc.sin().sum() + sae.b_enc.square().sum())
        )
    )


TOPK = {
    "topk": {"aux_k_coeff": 0.5},
    "topk, all terms": {"l1_penalty_coeff": 0.3, "multi_topk": True, "decorrelation_coeff": 2.0},
    "abs_topk": {"activation": "abs_topk"},
    "groupmax": {"activation": "groupmax"},
    "batch_topk": {"arch": "batch_topk"},
    "matryoshka": {"arch": "matryoshka"},
    "transcoder": {"transcoder": True, "d_out": 7},
    "transcoder, skip": {"transcoder": True, "d_out": 7, "skip_connection": True},
}
THRESHOLDED = {
    "relu": {},
    "relu, signed": {"arch": "relu", "use_relu": False},
    "jumprelu": {"arch": "jumprelu", "target_l0": 6.0},
    "jumprelu, into the encoder": {
        "arch": "jumprelu",
        "jumprelu_ste_to_input": True,
        "jumprelu_bandwidth": 2.0,
    },
    "gated": {"arch": "gated"},
    "gated transcoder": {"arch": "gated", "transcoder": True, "d_out": 7},
}
CASES = [
    *((name, "") for name in TOPK),
    *((name, path) for name in THRESHOLDED for path in plain_thresholded.PATHS),
]


def make_case(name, path):
    """Return a model in float32, and a function of x and targets that gives its plain terms."""
    if name in TOPK:
        sae = make_sae(dead=(1, 3, 8), **TOPK[name])
        return sae, plain_sae.plain_terms, plain_sae.plain_acts
    fields = {"arch": "relu", **THRESHOLDED[name]}
    sae = make_thresholded(path=path, dead=(1, 3), **fields)
    return sae, plain_thresholded.plain_terms, plain_code


@pytest.mark.parametrize("dense_grad", [False, True])
@pytest.mark.parametrize(("name", "path"), CASES)
def test_gradients_equal_autograd_in_float64(name, path, dense_grad):
    sae, plain_terms, acts_of = make_case(name, path)
    x, targets = make_batch(sae), make_targets(sae)
    exact = make_case(name, path)[0].double()
    exact.load_state_dict(sae.state_dict())
    sae.to(DTYPE)
    columns = {} if targets is None else {TARGETS: targets.to(DTYPE)}
    loss = batch_loss(
        sae,
        Rows(x.to(DTYPE), columns),
        StepSettings(),
        Engine("screened", dense_grad),
        loss_terms=[LossTerm("usage", usage, 0.7)],
    )
    loss.total.backward()

    x, targets = x.double(), None if targets is None else targets.double()
    acts = acts_of(exact, x)
    y = x if targets is None else targets
    x_hat = y - goal(exact, x, targets) + acts @ exact.W_dec + exact.b_dec
    term = 0.7 * plain_usage(exact, x, acts, x_hat)
    names, parameters = zip(*exact.named_parameters(), strict=True)
    total = sum(plain_terms(exact, x, targets).values()) + term
    expected = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(loss.components["usage"].double(), term.detach(), rtol=1e-5, atol=0)
    left = left_gradients(sae)
    for parameter, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(
            left[parameter].double(),
            gradient,
            rtol=2e-4,
            atol=5e-5,
            msg=lambda m, n=parameter: f"{n}: {m}",
        )


@pytest.mark.parametrize("path", plain_thresholded.PATHS)
def test_gradients_of_slots_equal_autograd_in_float64(path):
    sae = make_model(BASES["slots"])
    plain_thresholded.go(sae, path)
    x = make_batch(sae)
    columns = columns_of(sae)
    config = sae.config
    named = {
        config.relation_labels: columns["relations"],
        config.answer_labels: columns["answers"],
    }
    gradients = []
    for terms in ((), (LossTerm("usage", usage, 0.7),)):
        batch_loss(
            sae, Rows(x, named), StepSettings(), Engine("screened", False), loss_terms=terms
        ).total.backward()
        gradients.append(left_gradients(sae))
        for parameter in sae.parameters():
            parameter.grad = None
            parameter.row_factors = []
    exact = make_model(BASES["slots"]).double()
    exact.load_state_dict(sae.state_dict())
    x = x.double()
    acts = ((x - exact.b_dec) @ exact.W_enc.t() + exact.b_enc).relu()
    term = 0.7 * plain_usage(exact, x, acts, acts @ exact.W_dec + exact.b_dec)
    names, parameters = zip(*exact.named_parameters(), strict=True)
    expected = torch.autograd.grad(term, parameters, allow_unused=True, materialize_grads=True)
    for name, gradient in zip(names, expected, strict=True):
        added = gradients[1][name].double() - gradients[0][name].double()
        torch.testing.assert_close(added, gradient, rtol=2e-4, atol=2e-4)


def test_a_step_of_the_reconstruction_alone_leaves_the_terms_out():
    sae = make_sae()
    loss = batch_loss(
        sae,
        Rows(make_batch(sae), {}),
        StepSettings(reconstruction_only=True),
        loss_terms=[LossTerm("usage", usage)],
    )
    assert loss.components["usage"] == 0


WRONG = {
    "must return a tensor, got float": lambda sae, batch, code, x_hat: 1.0,
    "must return a 0-d tensor of floats, got torch.float32 of shape": (
        lambda sae, batch, code, x_hat: code.values.sum(1)
    ),
    "must return a 0-d tensor of floats, got torch.int64": (
        lambda sae, batch, code, x_hat: code.n_active()
    ),
    "must return a tensor with a gradient": (
        lambda sae, batch, code, x_hat: code.values.detach().sum()
    ),
    "must return a tensor on cpu.*got meta": (
        lambda sae, batch, code, x_hat: torch.ones((), device="meta", requires_grad=True)
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_function_that_returns_another_thing_is_refused(words):
    sae = make_sae()
    with pytest.raises(ValueError, match=f"^loss term mine: the function {words}"):
        batch_loss(sae, Rows(make_batch(sae), {}), loss_terms=[LossTerm("mine", WRONG[words])])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("my loss", usage), "name must be a word"),
        (("mine", usage, float("nan")), "coefficient must be a finite number, got nan"),
    ],
)
def test_a_term_that_cannot_be_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        LossTerm(*given)


@pytest.mark.parametrize("name", ["aux_loss", "multi_topk_loss", "fvu", "heldout_mine", "twice"])
def test_a_name_that_is_in_use_is_refused(name):
    config = SAEConfig(d_in=8, k=2, multi_topk=True)
    terms = [LossTerm("twice", usage), LossTerm(name, usage)]
    with pytest.raises(ValueError, match=f"^loss term {name}: another metric has this name"):
        checked_terms(terms, ARCHITECTURES["topk"](config), ("fvu",))


def test_terms_are_refused_where_neither_encoder_nor_decoder_is_trained():
    config = SAEConfig(**{**BASES["slots"], "slots_mode": "separate_value"})
    with pytest.raises(ValueError, match="left out with slots_mode separate_value"):
        checked_terms([LossTerm("mine", usage)], ARCHITECTURES["slots"](config), ())
