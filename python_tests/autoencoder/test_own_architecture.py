"""An architecture registered from outside of the package: settings, model, files and errors."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from plain_sae import left_gradients, make_batch

from sae_fast import RunConfig, SAEConfig, SparseAutoencoder, TrainConfig, register_architecture
from sae_fast.autoencoder.architecture import Architecture
from sae_fast.autoencoder.architectures import ARCHITECTURES, unregister_architecture
from sae_fast.autoencoder.topk import TopK
from sae_fast.config.own_settings import COMMAND_FLAGS
from sae_fast.config.plugins import load_plugin
from sae_fast.config.sae import registered
from sae_fast.config.setting import setting
from sae_fast.ops import native
from sae_fast.train import TrainOptions
from sae_fast.training.memory_plan import plan_memory

PLUGIN = Path(__file__).parents[2] / "examples/gained_topk.py"
if not PLUGIN.exists():
    pytest.skip("no checkout: the examples are not installed", allow_module_level=True)
SIZES = {"d_in": 12, "d_sae": 40, "k": 5}
DTYPE = torch.float32 if native.load() is not None else torch.float64


@pytest.fixture(autouse=True)
def _forget():
    """Leave no architecture registered."""
    yield
    for name in registered():
        unregister_architecture(name)
    sys.modules.pop("gained_topk", None)


@pytest.fixture
def plugin():
    load_plugin(str(PLUGIN))


def make_gained(**settings):
    config = SAEConfig(arch="gained_topk", **{**SIZES, "gain_decay": 0.3, **settings})
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


def test_the_configuration_has_the_settings_of_the_architecture(plugin):
    config = SAEConfig(arch="gained_topk", d_in=12, gain_decay=0.3)
    assert (config.gain_decay, config.k, config.d_sae) == (0.3, 32, 96)
    assert SAEConfig.from_dict(config.to_dict()) == config == config.resolve(12)
    assert config != SAEConfig(arch="gained_topk", d_in=12, gain_decay=0.2)
    assert RunConfig(arch="gained_topk", gain_decay=0.1, lr=1e-3).gain_decay == 0.1
    assert "gain_decay: a finite number; default 0.0" in type(config).__doc__
    assert "Weight of the penalty (g − 1)²" in type(config).__doc__


def test_settings_are_checked_as_all_others(plugin):
    with pytest.raises(ValueError, match=r"gain_decay must be at least 0, got -1.0"):
        SAEConfig(arch="gained_topk", gain_decay=-1)
    with pytest.raises(TypeError, match="SAEConfig has no setting 'gain_decay'"):
        SAEConfig(gain_decay=1.0)
    with pytest.raises(ValueError, match="multi_topk belongs to arch topk and must be left out"):
        SAEConfig(arch="gained_topk", multi_topk=True)
    with pytest.raises(ValueError, match=r"unknown key 'gain_decai' .did you mean 'gain_decay'"):
        SAEConfig.from_dict({"arch": "gained_topk", "gain_decai": 1.0})


@pytest.mark.parametrize("dense_grad", [True, False])
def test_gradients_equal_autograd_of_plain_pytorch(plugin, dense_grad):
    sae = make_gained()
    exact = copy.deepcopy(sae).double()
    x = make_batch(sae)
    sae.to(DTYPE)
    sae.training_loss(x.to(DTYPE), dense_grad=dense_grad).total.backward()
    x = x.double()
    pre_acts = (x - exact.b_dec) @ exact.W_enc.t() + exact.b_enc
    chosen = pre_acts.topk(5, dim=1)
    acts = torch.zeros_like(pre_acts).scatter(1, chosen.indices, chosen.values.relu()) * exact.gain
    error = (x - acts @ exact.W_dec - exact.b_dec).square().sum(1).mean()
    names, parameters = zip(*exact.named_parameters(), strict=True)
    loss = error + 0.3 * (exact.gain - 1).square().mean()
    expected = torch.autograd.grad(loss, parameters)
    left = left_gradients(sae)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(left[name].double(), gradient, rtol=1e-4, atol=2e-5)


def test_a_model_is_saved_copied_and_pickled(plugin, tmp_path):
    sae = make_gained()
    sae.save(tmp_path)
    x = torch.randn(6, 12)
    others = SparseAutoencoder.from_pretrained(tmp_path), copy.deepcopy(sae)
    for other in (*others, pickle.loads(pickle.dumps(sae)), sae.fold_normalization()):
        torch.testing.assert_close(other(x), sae(x))
    assert "gained_topk, d_in=12, d_sae=40, k=5" in repr(sae)


def test_a_model_whose_architecture_is_not_registered_says_what_to_import(plugin, tmp_path):
    make_gained().save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sae"]["arch"] == "gained_topk"
    unregister_architecture("gained_topk")
    with pytest.raises(ValueError, match="arch 'gained_topk' is not registered here") as caught:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert f"first import 'gained_topk ({PLUGIN})'" in str(caught.value)
    assert "\n" not in str(caught.value)
    del sys.modules["gained_topk"]
    load_plugin(str(PLUGIN))
    assert SparseAutoencoder.from_pretrained(tmp_path).config.gain_decay == 0.3


def test_the_memory_plan_counts_own_parameters_and_codes_without_a_k(plugin):
    def planned(config):
        train = TrainConfig(batch_size=64)
        return plan_memory(config, train, native=True, pool_bytes=0).parts

    plain, own = (planned(SAEConfig(arch=arch, **SIZES)) for arch in ("topk", "gained_topk"))
    assert own["parameters"] - plain["parameters"] == 40 * 4
    assert own["optimiser states"] - plain["optimiser states"] == 40 * 4 * 2

    class Listing(ARCHITECTURES["gained_topk"]):
        name, shared = "listing", ()

    class Derived(ARCHITECTURES["relu"]):
        name, shared = "derived", ("l1_penalty_coeff", "decoder_norm", "target_l0_rate")

    register_architecture(Listing)
    register_architecture(Derived)
    step = "step: batch, residual, code, AuxK"
    listed = planned(SAEConfig(arch="listing", d_in=12, d_sae=40))
    assert listed[step] - own[step] == 64 * (8 - 5) * 32
    derived, relu = (planned(SAEConfig(arch=a, d_in=12, d_sae=40)) for a in ("derived", "relu"))
    assert derived.keys() == relu.keys()


def make_class(base=TopK, **members):
    return type("Mine", (base,), {"name": "mine", "shared": ("k", "aux_k_coeff"), **members})


def settings_of(annotations, **values):
    return type("Settings", (), {"__annotations__": annotations, **values})


WRONG = {
    "is no class derived from Architecture": lambda: print,
    "name must be a word of small letters": lambda: make_class(name="My Topk"),
    "the name 'topk' of Mine is in use by sae_fast.autoencoder.topk.TopK": (
        lambda: make_class(name="topk")
    ),
    "Mine lacks infer, loss": lambda: make_class(Architecture),
    "shared names 'kk', which is no setting of SAEConfig": lambda: make_class(shared=("kk",)),
    "setting batch_size has the name of another setting": (
        lambda: make_class(Settings=settings_of({"batch_size": int}, batch_size=setting(1)))
    ),
    "setting plugin has the name of another setting": (
        lambda: make_class(Settings=settings_of({"plugin": int}, plugin=setting(1)))
    ),
    "setting to_dict has the name of another setting": (
        lambda: make_class(Settings=settings_of({"to_dict": int}, to_dict=setting(1)))
    ),
    "setting depth needs a default": lambda: make_class(Settings=settings_of({"depth": int})),
    "the default of setting depth must be a whole number, got 'x'": (
        lambda: make_class(Settings=settings_of({"depth": int}, depth="x"))
    ),
    "a type of its settings is unknown: name 'Nope' is not defined": (
        lambda: make_class(Settings=settings_of({"depth": "Nope"}, depth=1))
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_class_that_cannot_be_registered_is_refused_in_one_line(words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as caught:
        register_architecture(WRONG[words]())
    assert "\n" not in str(caught.value)
    assert not registered()


def test_a_name_is_in_use_until_the_class_is_the_same_or_forgotten(plugin):
    first = register_architecture(make_class())
    again = register_architecture(make_class())  # as when a cell of a notebook is run again
    assert ARCHITECTURES["mine"] is again is not first
    with pytest.raises(ValueError, match="the name 'mine' of Other is in use by"):
        register_architecture(type("Other", (TopK,), {"name": "mine"}))
    unregister_architecture("mine")
    with pytest.raises(ValueError, match=r"arch must be one of 'topk'.*got 'mine'"):
        SAEConfig(arch="mine")
    with pytest.raises(ValueError, match="no architecture 'mine' is registered"):
        unregister_architecture("mine")


def test_a_parameter_that_the_model_has_is_refused():
    register_architecture(make_class(parameters=lambda self: {"W_enc": torch.ones(3)}))
    with pytest.raises(ValueError, match="arch mine: a parameter or buffer is called W_enc"):
        SparseAutoencoder(SAEConfig(arch="mine", **SIZES))


def test_a_term_without_a_name_is_refused():
    register_architecture(make_class(term_names=()))
    sae = SparseAutoencoder(SAEConfig(arch="mine", **SIZES))
    assert sae.term_names == ("recon_loss", "l1_loss", "decorr_loss", "aux_loss")
    loss = TopK.loss

    def further(self, *given):
        found = loss(self, *given)
        found.terms["extra_loss"] = found.recon_loss
        return found

    register_architecture(make_class(term_names=(), loss=further))
    sae = SparseAutoencoder(SAEConfig(arch="mine", **SIZES))
    with pytest.raises(ValueError, match="loss returns the term extra_loss, which is not in its"):
        sae.training_loss(torch.randn(9, 12))


def test_the_flags_of_the_command_are_known():
    assert set(COMMAND_FLAGS) == set(TrainOptions.defaults())
