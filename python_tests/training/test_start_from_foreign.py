"""Training that starts from raw parameters, of another library too, begins as the same function."""

from pathlib import Path

import pytest
import torch

from sae_fast import SAEConfig, SparseAutoencoder, TrainConfig, Trainer
from sae_fast.autoencoder.folding import unfold_normalization_

FOREIGN = Path(__file__).parents[1] / "interop" / "foreign"
RUN = {"batch_size": 64, "max_steps": 2, "lr": 1e-3, "seed": 0}
ARCHITECTURES = {
    "topk": {"k": 4},
    "batch_topk": {"k": 4},
    "relu": {},
    "jumprelu": {},
    "gated": {},
    "topk without subtraction": {"arch": "topk", "k": 4, "subtract_b_dec": False},
    "gated without subtraction": {"arch": "gated", "subtract_b_dec": False},
    "gated skip transcoder": {
        **{"arch": "gated", "transcoder": True, "d_out": 8, "skip_connection": True},
    },
}


def random_(sae):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.2)
            sae.threshold_updates.fill_(1)
        sae.architecture.clamp_parameters_(sae.weights)
    return sae


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_undoes_unfolding(name):
    fields = {"arch": name, "d_in": 8, "d_sae": 24, **ARCHITECTURES[name]}
    raw = random_(SparseAutoencoder(SAEConfig(**fields, normalize_activations="none")))
    sae = SparseAutoencoder(SAEConfig(**fields))
    mean = torch.linspace(-1, 2, 8)
    sae.set_normalization_(mean, 0.3)
    kept = ("activation_mean", "activation_scale", "target_mean", "target_scale")
    if sae.config.transcoder:
        sae.set_target_normalization_(mean * 2, 0.7)
    state = {name: tensor for name, tensor in raw.state_dict().items() if name not in kept}
    sae.load_state_dict(state, strict=False)
    unfold_normalization_(sae)
    again = sae.fold_normalization().state_dict()
    for key, tensor in raw.state_dict().items():
        torch.testing.assert_close(again[key], tensor, atol=2e-6, rtol=1e-5)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1
    code = sae.encode(x, units="raw")
    torch.testing.assert_close(code.dense(), raw.encode(x).dense(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *("saelens/topk", "saelens/jumprelu", "saelens/gated", "sparsify/layers.3"),
        *("dictionary_learning/MatryoshkaBatchTopKSAE", "openmoss/relu"),
    ],
)
@pytest.mark.parametrize("normalize", ["mean_scale", "none"])
def test_dictionaries_of_other_libraries_are_trained_on(name, normalize, caplog):
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1
    known = SparseAutoencoder.from_pretrained(FOREIGN / name)
    train = TrainConfig(**RUN, init_from=str(FOREIGN / name))
    trainer = Trainer(SAEConfig(normalize_activations=normalize), train, x, show_progress=False)
    assert trainer.sae.config.arch == known.config.arch
    assert trainer.sae.config.k == known.config.k
    assert trainer.sae.config.d_sae == 24
    selects = known.config.k is not None
    assert ("training puts them to 1" in caplog.text) == selects
    if selects:  # with rows put to 1 it would be another function
        expected = known.encode(x).dense()
        torch.testing.assert_close(
            trainer.sae.encode(x, units="raw").dense(), expected, atol=1e-5, rtol=1e-5
        )
    sae, code = trainer.sae, trainer.sae.encode(x)
    x_hat = known.decode(known.encode(x))
    torch.testing.assert_close(sae.decode(code), x_hat, atol=5e-5, rtol=1e-4)
    before = sae.W_enc.detach().clone()
    trained = trainer.train()
    assert not torch.equal(trained.W_enc, before)


def test_settings_that_are_given_must_fit():
    x = torch.randn(256, 8)
    train = TrainConfig(**RUN, start_from=str(FOREIGN / "saelens/topk"))
    for given, words in (
        ({"arch": "relu"}, "start_from: .* is of a model with arch = topk, this one has relu"),
        ({"d_sae": 30}, "start_from: .* is of a model with d_sae = 24, this one has 30"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer(SAEConfig(**given), train, x, show_progress=False)
    with pytest.raises(ValueError, match="with d_in = 8, this one has 10"):
        Trainer(SAEConfig(), train, torch.randn(256, 10), show_progress=False)
    trainer = Trainer(SAEConfig(k=5), train, x, show_progress=False)
    assert trainer.sae.config.k == 5


def test_a_damaged_dictionary_is_named(tmp_path):
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "sae.safetensors").write_text("")
    train = TrainConfig(**RUN, start_from=str(tmp_path))
    with pytest.raises(ValueError, match=r"start_from: .*cfg\.json: has no d_in"):
        Trainer(SAEConfig(), train, torch.randn(256, 8), show_progress=False)
