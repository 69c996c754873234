"""An architecture registered from outside of the package: settings, model, files and errors."""

import copy
import dataclasses
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from plain_sae import left_gradients, make_batch

from sae_fast import (
    RunConfig,
    SAEConfig,
    SparseAutoencoder,
    TrainConfig,
    Trainer,
    register_architecture,
)
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
    "name must be a word of small letters, digits and _, such as my_topk, got None": (
        lambda: make_class(name=None)
    ),
    "Mine.Settings must be a class, got dict": lambda: make_class(Settings={"depth": 1}),
    "setting depth needs a type: depth: float = setting(…)": (
        lambda: make_class(Settings=settings_of({}, depth=setting(1)))
    ),
    "setting depth must be a bool, int, float, str, Path, Literal, a tuple of these, or": (
        lambda: make_class(Settings=settings_of({"depth": dict}, depth={}))
    ),
    "setting 'Depth' must be a word of small letters, digits and _, as it is a flag": (
        lambda: make_class(Settings=settings_of({"Depth": int}, Depth=1))
    ),
    "the default of setting depth must be at least 0, got -1": (
        lambda: make_class(Settings=settings_of({"depth": int}, depth=setting(-1, at_least=0)))
    ),
    "the default of setting depth must be a whole number, got none": (
        lambda: make_class(
            Settings=settings_of({"depth": int}, depth=dataclasses.field(default_factory=int))
        )
    ),
    "Mine.shared must be a tuple of names, got 'k'": lambda: make_class(shared="k"),
    "Mine.term_names must be a tuple of names, got 'my_loss'": (
        lambda: make_class(term_names="my_loss")
    ),
    "Mine.metric_names must be a tuple of names, got (3,)": lambda: make_class(metric_names=(3,)),
    "Mine: fvu is the name of another term or metric": lambda: make_class(term_names=("fvu",)),
    "Mine: gain is the name of another term or metric": (
        lambda: make_class(term_names=("gain",), metric_names=("gain",))
    ),
    "Mine.unit_norm must be True or False, got 'yes'": lambda: make_class(unit_norm="yes"),
    "Mine.full_k_aux must be a whole number from 0, got -1": lambda: make_class(full_k_aux=-1),
    "Mine has needs_step_l0, which needs a method count_active": (
        lambda: make_class(needs_step_l0=True)
    ),
    "Mine.loss must take (self, weights, batch, engine), got (self, x)": (
        lambda: make_class(loss=lambda self, x: None)
    ),
    "Mine.parameters must take (self), got ()": lambda: make_class(parameters=lambda: {}),
    "Mine.infer must be a method, got int": lambda: make_class(infer=3),
    "Mine.__init__ must take (self, config), got (self)": (
        lambda: make_class(__init__=lambda self: None)
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_class_that_cannot_be_registered_is_refused_in_one_line(words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        register_architecture(WRONG[words]())
    assert "\n" not in str(caught.value)
    assert not registered()


def made(**members):
    """Return a model of a registered class with these members."""
    register_architecture(make_class(**members))
    return SparseAutoencoder(SAEConfig(arch="mine", **SIZES))


def encode(sae):
    return sae.encode(torch.randn(9, 12))


def lose(sae):
    return sae.training_loss(torch.randn(9, 12))


def with_loss(**changed):
    """Return a method that gives the loss of TopK with other fields."""

    def loss(self, weights, batch, engine):
        found = TopK.loss(self, weights, batch, engine)
        fields = {name: value(found) for name, value in changed.items()}
        return dataclasses.replace(found, **fields)

    return loss


def give(value):
    return lambda self, *given: value


def train_briefly(sae):
    config = TrainConfig(lr=1e-3, batch_size=8, max_steps=1)
    Trainer(sae.config, config, torch.randn(64, 12), show_progress=False).train()


RETURNED = {
    "parameters must return a dict of tensors by name, got None": {"parameters": give(None)},
    "parameters must return a dict of tensors by name, got 'a': float": {
        "parameters": give({"a": 1.0})
    },
    "parameters must return tensors of floats, which can be trained (a), got int64 of shape (2,)": {
        "parameters": give({"a": torch.arange(2)})
    },
    "parameters must return names that are words, got 'a.b'": {
        "parameters": give({"a.b": torch.ones(2)})
    },
    "buffers must return a dict of tensors by name, got list": {"buffers": give([])},
    "parameters failed with ZeroDivisionError: division by zero (test_own_architecture.py, line": {
        "parameters": lambda self: 1 / 0
    },
    "__init__ must call super().__init__(config)": {"__init__": lambda self, config: None},
    "infer must return an ops.SparseCode, got float32 of shape (9, 40)": {
        "infer": lambda self, weights, x, engine: torch.zeros(len(x), 40)
    },
    "infer must return an ops.SparseCode, got an ops.DenseCode: return code.listed()": {
        "infer": lambda self, weights, x, engine: engine.encode_dense(weights, x)
    },
    "infer must return an ops.SparseCode of 9 tokens and 40 latents, got (4, 40)": {
        "infer": lambda self, weights, x, engine: engine.encode_topk(weights, x[:4], 2)
    },
    "infer failed with KeyError: 'gain' (test_own_architecture.py, line": {
        "infer": lambda self, weights, x, engine: weights.own["gain"]
    },
}
LOST = {
    "Mine.loss must return an ArchitectureLoss, got None": give(None),
    "Mine.loss must return an ArchitectureLoss, got tuple": give((1, 2)),
    "Mine.loss must return code as an ops.SparseCode or ops.DenseCode, got float32 of shape": (
        with_loss(code=lambda found: found.code.dense())
    ),
    "Mine.loss must return residual as a tensor of floats of shape (9, 12), got": (
        with_loss(residual=lambda found: found.residual[:, :3])
    ),
    "Mine.loss must return squared_error as a tensor of floats of shape (9,), got float": (
        with_loss(squared_error=lambda found: 1.0)
    ),
    "Mine.loss must return recon_loss as a tensor of floats with no dimension (0-d), got": (
        with_loss(recon_loss=lambda found: found.squared_error)
    ),
    "Mine.loss must return terms as a dict of tensors by name, got 'gain': float": (
        with_loss(terms=lambda found: {"gain": 1.0})
    ),
    "arch mine: loss must return gain, which is in its term_names or metric_names": (
        with_loss(metrics=lambda found: {})
    ),
    "arch mine: loss returns the metric other, which is not in its metric_names": (
        with_loss(metrics=lambda found: {"other": found.recon_loss})
    ),
    "Mine.loss must return gain as a tensor of floats with no dimension (0-d), got float32": (
        with_loss(metrics=lambda found: {"gain": torch.ones(3)})
    ),
    "Mine.loss must return terms with gradients, and none of them has one": (
        with_loss(
            recon_loss=lambda found: found.recon_loss.detach(),
            terms=lambda found: {},
            metrics=lambda found: {"gain": torch.ones(())},
        )
    ),
}
IN_TRAINING = {
    "learning_rates must return a dict of factors by name, of b_enc, b_dec, got 'W_enc'": {
        "learning_rates": give({"W_enc": 2.0})
    },
    "learning_rates must return factors that are finite and at least 0 (b_enc), got nan": {
        "learning_rates": give({"b_enc": float("nan")})
    },
    "trained must return None or a tuple of some of W_enc, W_dec, b_enc, b_dec, got 'W_enc'": {
        "trained": give("W_enc")
    },
    "trained must return both of W_enc and W_dec or neither, got ('W_enc',)": {
        "trained": give(("W_enc",))
    },
    "observe must return a dict of tensors by name, got None": {"observe": give(None)},
    "after_step_ failed with ZeroDivisionError": {"after_step_": lambda self, *given: 1 / 0},
    "clamp_parameters_ failed with ZeroDivisionError": {
        "clamp_parameters_": lambda self, weights: 1 / 0
    },
    "warning must return a text or None, got int": {"warning": give(3)},
    "arch mine: step is the name of another metric, rename it": {
        "metric_names": ("step",),
        "loss": with_loss(metrics=lambda found: {"step": found.recon_loss}),
    },
}


@pytest.mark.parametrize("words", RETURNED)
def test_a_method_of_a_model_that_returns_something_else_is_named(words):
    with pytest.raises(ValueError, match=f"^{re.escape('arch mine: Mine.' + words)}") as caught:
        encode(made(**RETURNED[words]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", LOST)
def test_a_loss_of_another_form_is_named(words):
    sae = made(loss=LOST[words], metric_names=("gain",))
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        lose(sae)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", IN_TRAINING)
def test_a_method_of_a_training_that_returns_something_else_is_named(words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        train_briefly(made(**IN_TRAINING[words]))
    assert "\n" not in str(caught.value)


def test_thresholds_of_another_shape_are_named():
    sae = made(thresholds=give(torch.ones(3)))
    with pytest.raises(ValueError, match=r"Mine.thresholds must return None or a tensor of shape"):
        sae.threshold_of(1)


def test_numbers_of_other_dtypes_and_gradients_in_metrics_are_taken():
    loss = with_loss(
        terms=lambda found: {**found.terms, "gain_loss": found.recon_loss.double()},
        metrics=lambda found: {"gain": found.recon_loss},
    )
    sae = made(
        loss=loss,
        term_names=["gain_loss"],
        metric_names=["gain"],
        parameters=give({"a": torch.ones(2, dtype=torch.float64)}),
    )
    assert sae.a.dtype == torch.float32
    train_briefly(sae)


def test_settings_may_be_a_dataclass_and_may_be_derived(plugin):
    @dataclasses.dataclass
    class Further(ARCHITECTURES["gained_topk"].Settings):
        depth: int = setting(2, at_least=1)

    register_architecture(make_class(Settings=Further))
    config = SAEConfig(arch="mine", gain_decay=0.5, **SIZES)
    assert (config.gain_decay, config.depth) == (0.5, 2)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        SAEConfig(arch="mine", depth=0, **SIZES)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated")
def test_a_model_of_a_registered_architecture_is_compiled_and_exported(plugin):
    torch.compiler.reset()
    sae = make_gained().requires_grad_(False)
    x = torch.randn(6, 12)
    assert torch.equal(torch.compile(sae, backend="eager", fullgraph=True)(x), sae(x))
    shapes = ({0: torch.export.Dim("n", min=2)},)
    program = torch.export.export(sae, (x,), dynamic_shapes=shapes)
    assert torch.equal(program.module()(x[:3]), sae(x[:3]))


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
