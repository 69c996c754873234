"""Damaged and hostile dictionaries end in one line; nothing crashes, allocates or runs code."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_fast import SparseAutoencoder, interop

FOREIGN = Path(__file__).parent / "foreign"
SOURCES = [
    *("saelens/topk", "saelens/gated", "sparsify/layers.5.mlp", "circuit_tracer/jumprelu_skip"),
    *("dictionary_learning/MatryoshkaBatchTopKSAE", "openmoss/jumprelu", "openai/relu"),
    "releases/gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_10",
    "releases/gemma-scope-2-270m-pt/transcoder/layer_3_width_16k_l0_small_affine",
    "releases/Llama3_1-8B-Base-L15R-8x",
    *("releases/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3", "releases/goodfire"),
]


def read(directory):
    """Read a dictionary; return the line of the error, None where it is read."""
    lone = [path for path in directory.iterdir() if path.suffix in (".pt", ".pth")]
    try:
        place = directory if interop.recognise(directory) is not None else (*lone, directory)[0]
        SparseAutoencoder.from_pretrained(place)
    except (ValueError, OSError) as error:
        line = str(error)
    else:
        return None
    assert "\n" not in line
    assert len(line) < 2000
    return line


def mutated(content, draw):
    """Return bytes with a piece cut out, changed, doubled or replaced by numbers."""
    start = draw.randrange(len(content) + 1)
    stop = min(len(content), start + draw.choice((1, 2, 8, 100, 10_000)))
    piece = {
        "cut": b"",
        "end": b"",
        "flip": bytes(byte ^ draw.randrange(256) for byte in content[start:stop]),
        "twice": content[start:stop] * 2,
        "huge": b"\xff" * (stop - start),
        "digits": b"9" * draw.randrange(1, 25),
    }
    kind = draw.choice(list(piece))
    return content[:start] + piece[kind] + (b"" if kind == "end" else content[stop:])


@pytest.mark.parametrize("source", SOURCES)
def test_damaged_files_are_read_or_refused_in_a_line(source, tmp_path):
    draw = random.Random(source)
    refused = 0
    for attempt in range(25):
        directory = tmp_path / f"{attempt}" / Path(source).name
        shutil.copytree(FOREIGN / source, directory)
        files = [path for path in directory.rglob("*") if path.is_file()]
        victim = draw.choice([path for path in files if not path.name.startswith("expected")])
        victim.write_bytes(mutated(victim.read_bytes(), draw))
        refused += read(directory) is not None
    assert refused > 5


class Runs:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["ae.pt", "3.pt", "layer4.sae.pt", "model.pth"])
def test_no_code_in_a_pickle_runs(name, tmp_path):
    content = {"encoder.weight": torch.zeros(4, 2), "run": Runs(tmp_path / "ran")}
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match="Python objects") as told:
        SparseAutoencoder.from_pretrained(tmp_path / name)
    assert "\n" not in str(told.value)
    (tmp_path / "old.pt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"old\.pt"):
        SparseAutoencoder.from_pretrained(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


def settings_of(directory, **changes):
    path = directory / "cfg.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_sae": 10**12}, "W_enc must have shape"),
        ({"d_in": 9}, r"W_enc must have shape \[8, 24\]|W_enc must have shape"),
        ({"d_sae": -3}, "d_sae must be a whole number of at least 1, got -3"),
        ({"d_sae": "many"}, "d_sae must be a whole number of at least 1, got 'many'"),
        ({"k": None}, "has no k"),
        ({"k": 1000}, "k"),
        ({"architecture": "temporal"}, "architecture 'temporal' has no counterpart here"),
        ({"normalize_activations": "layer"}, "normalize_activations 'layer' is not known"),
        ({"apply_b_dec_to_input": "yes"}, "must be true or false, got 'yes'"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, words, tmp_path):
    shutil.copytree(FOREIGN / "saelens" / "topk", tmp_path / "sae")
    settings_of(tmp_path / "sae", **changes)
    with pytest.raises(ValueError, match=words) as told:
        SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert "\n" not in str(told.value)


def test_a_tensor_that_claims_more_than_its_file_is_not_allocated(tmp_path):
    header = {"W_enc": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    settings = {"architecture": "standard", "d_in": 1 << 20, "d_sae": 1 << 20}
    settings["sae_lens_version"] = "6.0.0"
    (tmp_path / "cfg.json").write_text(json.dumps(settings))
    assert "cannot be read" in read(tmp_path)


@pytest.mark.slow
def test_a_compressed_bomb_is_refused(tmp_path):
    array = io.BytesIO()
    np.save(array, np.zeros((1 << 13, 1 << 13), np.float32))
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            archive.writestr(f"{name}.npy", array.getvalue())
    assert "more than the file holds" in read(tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    shutil.copytree(FOREIGN / "sparsify" / "layers.3", tmp_path / "layers.3")
    path = tmp_path / "layers.3" / "sae.safetensors"
    tensors = load_file(path)
    tensors["encoder.bias"][3] = float("nan")
    save_file(tensors, path)
    assert "encoder.bias holds NaN or Inf" in read(tmp_path / "layers.3")


def test_links_in_place_of_files_are_followed_or_refused_but_not_looped(tmp_path):
    (tmp_path / "cfg.json").symlink_to(tmp_path / "cfg.json")
    (tmp_path / "sae.safetensors").symlink_to("/dev/zero")
    assert read(tmp_path) is not None
    os.mkfifo(tmp_path / "ae.pt")
    assert read(tmp_path) is not None


def torchscript():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"archive/{name}", b"3")
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02" + b"x" * 100, b"hello world\n", b"", b"a" * 20, torchscript()],
    ids=["pickle", "text", "empty", "letters", "torchscript"],
)
def test_junk_is_not_said_to_need_a_load_that_runs_code(content, tmp_path):
    (tmp_path / "ae.pt").write_bytes(content)
    line = read(tmp_path)
    assert line.endswith(
        "ae.pt: cannot be read, damaged or cut short: no file of torch.save, or it holds objects "
        "that are not tensors, which could run code"
    )


def test_the_folder_of_the_checkpoints_of_a_run_is_said_to_be_one(tmp_path):
    (tmp_path / "checkpoints" / "step-00000040").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoints: name one, such as step-00000040"):
        SparseAutoencoder.from_pretrained(tmp_path / "checkpoints")


@pytest.mark.parametrize("place", ["runs/nothing", "runs/nothing/deeper"])
def test_a_path_below_a_folder_here_is_no_name_on_the_hub(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^{place}: no such directory$"):
        SparseAutoencoder.from_pretrained(place)


@pytest.mark.parametrize("place", ["owner/../other/name", "owner/name/..", "owner/name@../x/.."])
def test_a_path_that_climbs_is_no_name_on_the_hub(place):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        SparseAutoencoder.from_pretrained(place)


@pytest.mark.parametrize("threshold", [1e308, -1, True, "low", None])
def test_a_threshold_that_is_no_float32_is_named(threshold, tmp_path):
    place = tmp_path / "Llama3_1-8B-Base-L15R-8x"
    shutil.copytree(FOREIGN / "releases" / place.name, place)
    path = place / "hyperparams.json"
    content = json.loads(path.read_text()) | {"jump_relu_threshold": threshold}
    path.write_text(json.dumps(content))
    assert "jump_relu_threshold must be a number from 0 to 3.4e+38" in read(place)


def test_the_name_of_a_hook_does_not_break_the_line(tmp_path):
    shutil.copytree(FOREIGN / "openmoss" / "topk", tmp_path / "sae")
    path = tmp_path / "sae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hook_point_in": "a\nb"}))
    assert "has no tensor dataset_average_activation_norm.a b, it has" in read(tmp_path / "sae")
