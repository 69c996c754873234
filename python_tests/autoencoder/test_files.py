import json
import os
import stat

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
    loaded = SparseAutoencoder.from_pretrained(saved[1], trainable=True)
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


def damage(path):
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half:] = bytes(len(content) - half)  # zeros, as in blocks that a crash left unwritten
    path.write_bytes(bytes(content))


def test_damaged_content_of_full_length_is_refused_by_name(saved):
    damage(saved[1] / "sae.safetensors")
    with pytest.raises(ValueError, match=r"sae\.safetensors: the content is damaged"):
        SparseAutoencoder.from_pretrained(saved[1])


def test_older_file_without_a_checksum_still_loads(saved):
    sae, directory = saved
    change_tensors(directory)
    assert torch.equal(SparseAutoencoder.from_pretrained(directory).W_enc, sae.W_enc)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": torch.full((40, 12), float("nan"))}, "W_enc holds NaN or Inf"),
        ({"b_dec": torch.full((12,), float("inf"))}, "b_dec holds NaN or Inf"),
        ({"b_dec": torch.full((12,), 1e300, dtype=torch.float64)}, "b_dec holds NaN or Inf"),
        ({"activation_scale": torch.tensor(0.0)}, "activation_scale must be greater than 0"),
        ({"tokens_since_fired": torch.full((40,), -1)}, "tokens_since_fired must not be negative"),
        ({"tokens_since_fired": torch.zeros(40)}, "tokens_since_fired must be of torch.int64"),
        *(
            (
                {"W_enc": torch.zeros(40, 12).to(dtype)},
                f"W_enc must be of floating-point numbers, got {dtype}",
            )
            for dtype in (
                *(torch.int64, torch.int32, torch.uint8, torch.bool),
                *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16),
            )
        ),
    ],
)
def test_tensor_of_another_kind_or_range_is_refused_by_name(saved, changes, message):
    change_tensors(saved[1], **changes)
    with pytest.raises(ValueError, match=rf"sae\.safetensors: {message}"):
        SparseAutoencoder.from_pretrained(saved[1])


def test_sizes_are_compared_before_a_model_is_made(saved):
    path = saved[1] / "config.json"
    values = json.loads(path.read_text())
    values["sae"].update(d_sae=2**60, expansion_factor=None)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="W_enc must have shape"):
        SparseAutoencoder.from_pretrained(saved[1])


def test_saved_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        make_sae().save(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {0o640}


def test_pipe_in_place_of_a_file_is_refused_without_waiting(saved):
    path = saved[1] / "sae.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError, match=r"it has no sae\.safetensors"):
        SparseAutoencoder.from_pretrained(saved[1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("cfg.json", "sae_weights.safetensors"), "weights.safetensors: cannot be read"),
        (("params.npz",), "params.npz: cannot be read, damaged or cut short"),
        (("config.json", "ae.pt"), "ae.pt: cannot be read, damaged or cut short"),
        (("cfg.json", "sae.safetensors"), "cfg.json: has no d_in"),
        (("a/cfg.json", "a/sae.safetensors"), "cfg.json: has no d_in"),
        (("config.json", "model.safetensors"), "its config.json is not the one of a model"),
        ((), r"not a saved model, it has no config\.json, and no dictionary of SAELens, sparsify"),
        (("checkpoints/x",), "a run that has no checkpoint yet"),
        (("layer.3/checkpoints/x",), r"but a folder of runs: name one, .*layer\.3"),
    ],
)
def test_what_is_no_saved_model_is_told_apart(tmp_path, files, message):
    place = tmp_path / "place"
    place.mkdir()
    for name in files:
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_text("{}" if name.endswith("json") else "")
    with pytest.raises((ValueError, FileNotFoundError), match=f"place[:/].*{message}") as caught:
        SparseAutoencoder.from_pretrained(place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("EleutherAI/sae-llama-3-8b-32x", "no such directory, and the Hugging Face hub answers"),
        ("deep/er/no_such_folder", "no such directory"),
        ("params.npz", "cannot be read, damaged or cut short"),
        ("sae.safetensors", "a file of a saved model: name its directory"),
        ("notes.txt", "a file, and neither a saved model, which is a directory, nor of SAELens"),
    ],
)
def test_file_or_name_in_place_of_a_directory_is_told_apart(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    if "/" not in name:
        (tmp_path / name).write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: .*{message}"):
        SparseAutoencoder.from_pretrained(name)


def test_path_that_is_not_unicode_is_refused_before_anything_is_written(tmp_path):
    directory = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")
    with pytest.raises(ValueError, match=r"m\\xff/\.sae\.safetensors\.\d+\.tmp: must be a path in"):
        make_sae().save(directory)
    assert not os.path.exists(directory) or os.listdir(directory) == []
