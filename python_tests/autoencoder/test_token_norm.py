"""Models that normalise each token by numbers of its own: layer_norm and constant_norm."""

import json

import pytest
import torch
from every_model import make_form

from sae_fast import SAEConfig, SparseAutoencoder, TrainConfig, Trainer
from sae_fast.evaluation.core import core_metrics

FORMS = ("layer_norm", "jumprelu, constant_norm")


def rows(*shape):
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(3)) * 20 - 7


def normalized(sae, x):
    """Return the activations normalised by the formula, and mean and scale that restore them."""
    x = x.double()
    if sae.config.normalize_activations == "layer_norm":
        mean = x.sum(-1, keepdim=True) / 12
        scale = ((x - mean).square().sum(-1, keepdim=True) / 11).sqrt()
        return (x - mean) / (scale + 1e-5), mean, scale
    scale = x.square().sum(-1, keepdim=True).sqrt() / 12**0.5
    return x / scale, torch.zeros(1), scale


def reference(sae, x):
    """Return the dense code and the reconstruction of rows [N, 12] in float64."""
    inner, mean, scale = normalized(sae, x)
    W_enc, b_enc, W_dec, b_dec = (
        tensor.double() for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    )
    pre = (inner - b_dec) @ W_enc.T + b_enc
    if sae.config.arch == "topk":
        top = pre.topk(sae.k, dim=1)
        code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    else:
        code = torch.where(pre > sae.threshold.double(), pre, 0)
    return code, (code @ W_dec + b_dec) * scale + mean


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_reconstructions_are_the_formula(form):
    sae, x = make_form(form), rows(50)
    code, x_hat = reference(sae, x)
    found = sae.encode(x)
    assert float(found.l0().double().mean()) > 1
    torch.testing.assert_close(found.dense().double(), code, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(found, x).double(), x_hat, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sae(x).double(), x_hat, atol=1e-4, rtol=1e-5)
    wide = make_form(form, torch.float64)
    torch.testing.assert_close(wide.decode(wide.encode(x.double()), x), x_hat)


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_a_code_is_decoded_with_the_activations(form):
    sae, x = make_form(form), rows(4, 5)
    whole, raw = sae.encode(x), sae.encode(x, units="raw")
    x_hat = sae.decode(whole, x)
    _, _, scale = normalized(sae, x)
    torch.testing.assert_close(raw.dense(), whole.dense() * scale.float(), atol=1e-5, rtol=1e-5)
    for code, units in (
        (raw, None), (whole.dense(), None), (raw.dense(), "raw"), (whole.to_sparse(), None),
    ):  # fmt: skip
        torch.testing.assert_close(sae.decode(code, x, units=units), x_hat, atol=1e-4, rtol=1e-5)
    one = sae.decode(whole[1, 2:], x[1, 2:])
    torch.testing.assert_close(one, x_hat[1, 2:], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_raw_unit_adds_the_decoder_row(form):
    sae, x = make_form(form), rows(6)
    code = sae.encode(x, units="raw")
    more = sae.decode(code.set(3, code.latent(3) + 1.0), x)
    expected = sae.decode(code, x) + sae.W_dec[3]
    torch.testing.assert_close(more, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(sae.direction(3, units="raw"), sae.W_dec[3])
    assert torch.equal(sae.direction(3), sae.W_dec[3])
    hook = sae.hook("error").add(3, 2.5)
    torch.testing.assert_close(hook(x), x + 2.5 * sae.W_dec[3], atol=1e-4, rtol=1e-5)
    replaced = sae.hook().add(3, 2.5)
    expected = sae(x) + 2.5 * sae.W_dec[3]
    torch.testing.assert_close(replaced(x), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_without_deviation_is_finite(form):
    sae = make_form(form)
    x = torch.zeros(3, 12)
    x[1] = 4.0
    for units in ("normalized", "raw"):
        code = sae.encode(x, units=units)
        assert torch.equal(sae.decode(code, x)[0], torch.zeros(12))
    assert bool(sae(x).isfinite().all())
    x.requires_grad_()
    sae(x).sum().backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_formula(form):
    sae, x = make_form(form, torch.float64), rows(7).double().requires_grad_()
    wanted = torch.randn(7, 12, dtype=torch.float64)
    (own,) = torch.autograd.grad((sae(x) * wanted).sum(), x)
    (expected,) = torch.autograd.grad((reference(sae, x)[1] * wanted).sum(), x)
    torch.testing.assert_close(own, expected)


def test_what_needs_the_activations_says_so():
    sae, x = make_form("layer_norm"), rows(6)
    code = sae.encode(x)
    with pytest.raises(ValueError, match="x must be given: with normalize_activations layer_norm"):
        sae.decode(code)
    with pytest.raises(ValueError, match="x must have 6 tokens as the code has, got 5"):
        sae.decode(code, x[:5])
    with pytest.raises(ValueError, match="x must have 6 tokens as the code has, got 5"):
        sae.decode(code.dense(), x[:5])
    with pytest.raises(ValueError, match="x must be given"):
        sae.denormalize(x)
    with pytest.raises(ValueError, match="cannot be folded in: each token is normalised"):
        sae.fold_normalization()
    with pytest.raises(ValueError, match="'layer_norm' leaves no mean and scale to set"):
        sae.set_normalization_(torch.zeros(12), 1.0)
    with pytest.raises(ValueError, match="each token has a scale of its own"):
        make_form("jumprelu, constant_norm").threshold_of(2, units="raw")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"transcoder": True}, "layer_norm does not go with a transcoder"),
        ({"loss_fn": "kl"}, "loss_fn kl does not go with normalize_activations layer_norm"),
        ({"d_in": 1}, "layer_norm needs a d_in of at least 2, got 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SAEConfig(arch="topk", k=1, normalize_activations="layer_norm", **settings)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_model_is_the_same(form, tmp_path):
    sae, x = make_form(form), rows(9)
    sae.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["units"] == "normalized"
    assert torch.equal(SparseAutoencoder.from_pretrained(tmp_path)(x), sae(x))


@pytest.mark.parametrize("form", FORMS)
def test_metrics_are_of_the_activations_as_they_are(form):
    sae, x = make_form(form), rows(200)
    error = (sae(x).double() - x.double()).square().sum()
    fvu = float(error / (x.double() - x.double().mean(0)).square().sum())
    found = core_metrics(sae, [x[:120], x[120:]])
    assert found.sections["reconstruction_quality"]["fvu"] == pytest.approx(fvu, rel=1e-5)
    run = sae.run(x)
    inner = normalized(sae, x)[0]
    code, _ = reference(sae, x)
    own = (code @ sae.W_dec.double() + sae.b_dec.double() - inner).square().sum(1).mean()
    assert run.losses["recon_loss"] == pytest.approx(float(own), rel=1e-4)
    assert run.losses["fvu"] == pytest.approx(fvu, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_evaluators_get_reconstructions_of_the_last_activations(form):
    sae, x = make_form(form), rows(4, 5)
    made = sae.to_saebench(model_name="gpt2", hook_name="residual.3")
    torch.testing.assert_close(made(x), sae(x), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(made.decode(made.encode(x)), sae(x), atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="of the activations that were encoded last"):
        made.decode(made.encode(x)[:2])


def trained(data, sae, **more):
    config = TrainConfig(**{"batch_size": 64, "max_steps": 12, "seed": 1, **more})
    trainer = Trainer(sae, config, data, show_progress=False)
    trainer.train()
    return trainer.sae.eval()


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm"])
def test_a_training_is_the_one_on_normalised_rows(kind, tmp_path):
    x = torch.randn(512, 12, generator=torch.Generator().manual_seed(0)) * 5 + 3
    settings = {"arch": "topk", "d_sae": 24, "k": 3, "b_dec_init": "mean"}
    run = str(tmp_path / "run")
    sae = trained(
        x, SAEConfig(**settings, normalize_activations=kind), checkpoint_dir=run, grad_acc_steps=2
    )
    other = trained(
        sae.normalize(x), SAEConfig(**settings, normalize_activations="none"), grad_acc_steps=2
    )
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(sae.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    assert torch.equal(SparseAutoencoder.from_pretrained(run)(x), sae(x))
    # A training that starts from it takes the normalisation over.
    started = trained(x, SAEConfig(), start_from=run, max_steps=1, lr=1e-12)
    assert started.config.normalize_activations == kind
    torch.testing.assert_close(started(x), sae(x), atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match=f"with normalize_activations = {kind}, this one has none"):
        trained(x, SAEConfig(normalize_activations="none"), start_from=run)


def test_raw_parameters_do_not_start_a_model_that_normalises_tokens(tmp_path):
    make_form("no normalization").save(tmp_path / "raw")
    with pytest.raises(ValueError, match="= none, this one has layer_norm"):
        trained(
            rows(200),
            SAEConfig(normalize_activations="layer_norm"),
            start_from=str(tmp_path / "raw"),
        )
