"""`accelerate`: dictionaries of the installed SAELens give their own codes by the kernels here."""

import copy

import pytest
import torch

import sae_fast
from sae_fast import SparseAutoencoder

sae_lens = pytest.importorskip("sae_lens")
SIZES = {"d_in": 16, "d_sae": 64, "dtype": "float32", "device": "cpu"}
KINDS = {
    "StandardSAE": {},
    "TopKSAE": {"k": 4},
    "AbsTopKSAE": {"k": 4},
    "JumpReLUSAE": {},
    "GatedSAE": {"apply_b_dec_to_input": False},
}


def make(kind):
    torch.manual_seed(0)
    sae = getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(**SIZES, **KINDS[kind]))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_(0, 0.4)
            if name == "threshold":
                parameter.abs_()
    return sae


def assert_equal(sae, plain, x):
    with torch.no_grad():
        code, expected = sae.encode(x), plain.encode(x)
        torch.testing.assert_close(code, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.decode(code), plain.decode(expected), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_reconstructions_stay(kind):
    plain, x = make(kind), torch.randn(3, 20, 16)
    sae = copy.deepcopy(plain)
    assert sae_fast.accelerate(sae) is sae
    assert isinstance(sae, type(plain))
    assert_equal(sae, plain, x)
    assert sae_fast.accelerate(sae) is sae


@pytest.mark.parametrize("kind", ["TopKSAE", "JumpReLUSAE"])
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_tokens_are_normalised_as_before(kind, normalization):
    settings = {**SIZES, **KINDS[kind], "normalize_activations": normalization}
    plain, sae = (
        getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(**settings)) for _ in "ab"
    )
    for parameter in plain.parameters():
        parameter.data.normal_(0, 0.4).abs_()
    sae.load_state_dict(plain.state_dict())
    sae_fast.accelerate(sae)
    x = torch.randn(20, 16) * 3 + 1
    assert_equal(sae, plain, x)
    assert_equal(sae, plain, x[:3])


@pytest.mark.parametrize("kind", ["TopKSAE", "JumpReLUSAE"])
def test_a_copy_is_an_accelerated_dictionary_of_its_own(kind):
    plain, x = make(kind), torch.randn(7, 16)
    sae = sae_fast.accelerate(copy.deepcopy(plain))
    sae.encode(x)  # which keeps its last code
    other = copy.deepcopy(sae)
    assert type(other).__name__ == type(plain).__name__
    assert type(other) is not type(plain)
    assert_equal(other, plain, x)
    other.W_dec.data.zero_()
    assert_equal(sae, plain, x)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_of_weights_are_seen(kind, tmp_path):
    plain, x = make(kind), torch.randn(40, 16)
    sae = sae_fast.accelerate(copy.deepcopy(plain))
    assert_equal(sae, plain, x)
    factor = torch.rand(64) + 0.5
    for each in (sae, plain):
        each.W_enc.data *= factor
    assert_equal(sae, plain, x)
    for each in (sae, plain):
        each.W_dec.data = each.W_dec.data * 2
    assert_equal(sae, plain, x)
    if "TopK" not in kind:  # of which SAELens does not fold the norms
        for each in (sae, plain):
            each.fold_W_dec_norm()
        assert_equal(sae, plain, x)
    sae.save_model(tmp_path)
    assert_equal(sae_lens.SAE.load_from_disk(tmp_path), plain, x)
    assert_equal(copy.deepcopy(sae), plain, x)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_edits_of_codes_are_seen(kind):
    plain, x = make(kind), torch.randn(5, 8, 16)
    sae = sae_fast.accelerate(copy.deepcopy(plain))
    code, expected = sae.encode(x), plain.encode(x)
    for edit in (
        lambda dense: dense.data.view(-1)[7:8].fill_(3.0),
        lambda dense: dense.numpy().__setitem__((0, 0, slice(None)), 0.5),
        lambda dense: dense.mul_(2),
        lambda dense: dense.zero_(),
    ):
        torch.testing.assert_close(sae.decode(code), plain.decode(expected), atol=1e-5, rtol=1e-5)
        edit(code)
        edit(expected)
        torch.testing.assert_close(sae.decode(code), plain.decode(expected), atol=1e-5, rtol=1e-5)
        copied = copy.deepcopy(sae)
        torch.testing.assert_close(
            copied.decode(code), plain.decode(expected), atol=1e-5, rtol=1e-5
        )
        code, expected = sae.encode(x), plain.encode(x)


def test_the_kernels_are_called_where_they_can_be(monkeypatch):
    sae, x = sae_fast.accelerate(make("TopKSAE")), torch.randn(8, 16)
    calls = []
    encode = SparseAutoencoder.encode
    monkeypatch.setattr(SparseAutoencoder, "encode", lambda *a: calls.append(1) or encode(*a))
    with torch.no_grad():
        sae.encode(x)
        assert len(calls) == 1
        _, cache = sae.run_with_cache(x)  # which asks for pre-activations
        assert len(calls) == 1
        assert "hook_sae_acts_pre" in cache
    sae.encode(x).sum().backward()
    assert len(calls) == 1
    assert sae.W_enc.grad.shape == (16, 64)


@torch.no_grad()
def test_settings_that_change_are_seen():
    plain, x = make("TopKSAE"), torch.randn(30, 16)
    sae = sae_fast.accelerate(copy.deepcopy(plain))
    for each in (sae, plain):
        each.cfg.apply_b_dec_to_input = False
    assert_equal(sae, plain, x)
    for each in (sae, plain):
        each.cfg.k = 2
        each.activation_fn = each.get_activation_fn()
    assert_equal(sae, plain, x)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Setting use_error_term directly:DeprecationWarning")
def test_the_error_term_is_added_as_before():
    plain, x = make("JumpReLUSAE"), torch.randn(30, 16)
    sae = sae_fast.accelerate(copy.deepcopy(plain))
    for each in (sae, plain):
        each.use_error_term = True
    torch.testing.assert_close(sae(x), plain(x), atol=1e-5, rtol=1e-5)


def test_what_has_no_counterpart_is_refused():
    config = sae_lens.TopKSAEConfig(**SIZES, k=4, rescale_acts_by_decoder_norm=True)
    for sae, words in (
        (torch.nn.Linear(2, 2), "a dictionary of SAELens is accelerated, got Linear"),
        (sae_lens.TopKSAE(config), r"call fold_W_dec_norm\(\) first"),
        (make("TopKSAE").double(), "float32 is accelerated, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=words):
            sae_fast.accelerate(sae)
