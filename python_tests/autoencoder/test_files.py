import json

import pytest
import torch
from plain_sae import make_batch, make_sae
from safetensors.torch import load_file, save_file

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import RunConfig


@pytest.fixture(name="saved")
def save_model(tmp_path):
    sae = make_sae(dead=(1, 2))
    sae.set_normalization_(torch.linspace(-1, 1, 12), 0.5)
    sae.save(tmp_path / "model")
    return sae, tmp_path / "model"


def change_tensors(directory, **changes):
    tensors = {**load_file(directory / "sae.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "sae.safetensors")


def test_saved_model_comes_back_exactly(saved):
    sae, directory = saved
    loaded = SparseAutoencoder.from_pretrained(directory)
    assert loaded.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    x = make_batch(sae)
    assert torch.equal(loaded(x), sae(x))


def test_directory_holds_two_files_and_no_pickle(saved):
    assert sorted(path.name for path in saved[1].iterdir()) == ["config.json", "sae.safetensors"]


def test_loaded_model_can_be_trained(saved):
    loaded = SparseAutoencoder.from_pretrained(saved[1])
    loaded.training_loss(make_batch(loaded)).total.backward()
    assert loaded.W_enc.grad is not None


def test_model_is_read_beside_the_configuration_of_its_run(saved):
    sae, directory = saved
    RunConfig(sae=sae.config).save(directory / "config.json")
    assert SparseAutoencoder.from_pretrained(directory).config == sae.config


def test_low_precision_file_becomes_float32(saved):
    sae, directory = saved
    change_tensors(directory, W_enc=sae.W_enc.detach().half())
    loaded = SparseAutoencoder.from_pretrained(directory)
    assert torch.equal(loaded.W_enc, sae.W_enc.half().float())


@pytest.mark.parametrize("name", ["config.json", "sae.safetensors"])
def test_missing_file_is_named(saved, name):
    (saved[1] / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"model: not a saved model, it has no {name}"):
        SparseAutoencoder.from_pretrained(saved[1])


def test_model_of_another_width_is_refused_in_one_line(saved):
    path = saved[1] / "config.json"
    values = json.loads(path.read_text())
    values["sae"]["d_in"] = 16
    path.write_text(json.dumps(values))
    message = r"W_enc must have shape \(40, 16\) by config.json, got \(40, 12\)"
    with pytest.raises(ValueError, match=message) as caught:
        SparseAutoencoder.from_pretrained(saved[1])
    assert "\n" not in str(caught.value)


def test_missing_tensor_is_named(saved):
    change_tensors(saved[1], b_enc=None)
    with pytest.raises(ValueError, match=r"sae\.safetensors: has no tensor b_enc"):
        SparseAutoencoder.from_pretrained(saved[1])


def test_unknown_tensor_is_named(saved):
    change_tensors(saved[1], threshold=torch.zeros(40))
    with pytest.raises(ValueError, match=r"sae\.safetensors: unknown tensor threshold"):
        SparseAutoencoder.from_pretrained(saved[1])


def test_truncated_file_is_named(saved):
    path = saved[1] / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"sae\.safetensors: not a readable safetensors file"):
        SparseAutoencoder.from_pretrained(saved[1])


def test_saving_again_replaces_the_model(saved):
    other = make_sae(seed=9)
    other.save(saved[1])
    assert torch.equal(SparseAutoencoder.from_pretrained(saved[1]).W_enc, other.W_enc)
