"""Dictionaries go to the Hugging Face hub and come from it: against a stand-in of its file API."""

import os
import sys
from pathlib import Path

import pytest
import warm_python
from local_hub import LocalHub
from plain_models import make

from sae_fast import interop
from sae_fast.interop.hub import files_of

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[2]
FOREIGN = Path(__file__).parent / "foreign"


@pytest.fixture
def hub():
    local = LocalHub()
    yield local
    local.close()


def run(hub, tmp_path, program, **variables):
    """Run a program in a process that knows the stand-in as the hub; return what it prints."""
    environment = {
        **os.environ,
        **{"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")},
        **{"HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
        **variables,
    }
    done = warm_python.run(["-c", program], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def put(hub, name, source, below=""):
    files = hub.files.setdefault(name, {})
    for path in source.rglob("*"):
        if path.is_file() and not path.name.startswith("expected"):
            files[f"{below}{path.relative_to(source)}"] = path.read_bytes()


@pytest.mark.slow
def test_a_model_goes_up_and_comes_down_as_it_was(hub, tmp_path):
    printed = run(hub, tmp_path, """
from plain_models import make, rows
from sae_fast import SparseAutoencoder
sae = make("topk")
print(sae.push_to_hub("owner/mine", figures={"fvu": 0.12345, "L0": 4}))
print(sae.push_to_hub("owner/mine", "saelens", subfolder="for_saelens"))
import torch
for below in (None, "for_saelens"):
    back = SparseAutoencoder.from_pretrained("owner/mine", subfolder=below)
    x = rows()
    off = (back.decode(back.encode(x)) - sae.decode(sae.encode(x))).abs().max()
    print(below, back, bool(off < 5e-5), back.origin == sae.origin)
""")  # fmt: skip
    lines = printed.splitlines()
    assert lines[0] == f"{hub.address}/owner/mine/commit/{'a' * 40}"
    for line in lines[2:]:
        assert line.endswith("SparseAutoencoder(topk, d_in=16, d_sae=40, k=4) True True")
    files = hub.files["owner/mine"]
    assert {path for path in files if "/" not in path} == {
        *("README.md", "config.json", "sae.safetensors", "expected_codes.safetensors"),
    }
    card = files["README.md"].decode()
    assert card.startswith('---\nlibrary_name: "sae_fast"\n')
    assert 'base_model: "gpt2"\n' in card
    assert "# A sparse autoencoder of mlp_in.3 of gpt2\n" in card
    assert "| fvu | 0.1235 |\n| L0 | 4 |" in card
    assert 'SparseAutoencoder.from_pretrained("owner/mine")' in card
    assert 'library_name: "sae_lens"' in files["for_saelens/README.md"].decode()


@pytest.mark.slow
def test_only_the_files_of_one_dictionary_are_downloaded(hub, tmp_path):
    put(hub, "owner/many", FOREIGN / "sparsify")
    hub.files["owner/many"]["layers.3/optimizer.bin"] = b"x" * 1000
    printed = run(hub, tmp_path, """
from sae_fast import SparseAutoencoder, convert
sae = SparseAutoencoder.from_pretrained("owner/many", subfolder="layers.3", revision="main")
print(sae, sae.origin)
print(convert.main(["owner/many", "out", "--subfolder", "h.4.mlp"]))
try:
    SparseAutoencoder.from_pretrained("owner/many")
except ValueError as error:
    print(error)
try:
    SparseAutoencoder.from_pretrained("owner/nothing")
except ValueError as error:
    print(str(error).count(chr(10)), str(error)[:80])
""")  # fmt: skip
    again = run(hub, tmp_path, """
from sae_fast import SparseAutoencoder
print(SparseAutoencoder.from_pretrained("owner/many/layers.3").config.k)
try:
    SparseAutoencoder.from_pretrained("owner/many/none")
except ValueError as error:
    print(error)
""", HF_HUB_OFFLINE="1")  # fmt: skip
    assert again.startswith(
        "3\nowner/many/none: no such directory, and the Hugging Face hub answers"
    )
    lines = printed.splitlines()
    assert "d_in=8, d_sae=24, k=3) {'hook': 'layers.3', 'layer': 3}" in lines[0]
    assert lines[2] == "0"
    assert "owner/many: has no dictionary: name one as subfolder, as h.4.mlp" in lines[3]
    assert lines[4].startswith(
        "0 owner/nothing: no such directory, and the Hugging Face hub answers:"
    )
    assert set(hub.downloads) == {
        f"{place}/{name}"
        for place in ("layers.3", "h.4.mlp")
        for name in ("cfg.json", "sae.safetensors")
    }


def test_one_name_says_repository_folder_and_revision(hub, tmp_path):
    put(hub, "owner/many", FOREIGN / "sparsify", "deep/")
    make("topk").export(tmp_path / "out", "sparsify")
    hub.files["owner/many"] |= {
        f"out/{p.name}": p.read_bytes() for p in (tmp_path / "out").iterdir()
    }
    printed = run(hub, tmp_path, """
import os
from sae_fast import SparseAutoencoder, TrainConfig, compare, verify
from sae_fast.training.start import model_to_start_from
name = "owner/many/deep/layers.3"
for sae in (
    SparseAutoencoder.from_pretrained(f"{name}@main"),
    SparseAutoencoder.from_pretrained("owner/many/deep@refs/pr/1", subfolder="layers.3"),
    model_to_start_from(TrainConfig(start_from=name)),
):
    print(sae.config.k, sae.origin)
print(verify.main(["owner/many/out@main"]))
print(compare.main([f"{name}@main", "owner/many/deep/h.4.mlp"]))
os.mkdir("owner")
for place, settings in ((name, {}), (f"{name}@main", {"revision": "main"})):
    try:
        SparseAutoencoder.from_pretrained(place, **settings)
    except (ValueError, OSError) as error:
        print(error)
""")  # fmt: skip
    lines = printed.splitlines()
    assert lines[:3] == ["3 {'hook': 'layers.3', 'layer': 3}"] * 3
    assert ": equal; 32 rows" in lines[3]
    assert lines[4] == "0"
    assert lines[-4].startswith("mean PW-MCC ")
    assert lines[-3:-1] == ["0", "owner/many/deep/layers.3: no such directory"]
    assert "deep/layers.3@main: the revision is given twice, also as 'main'" in lines[-1]


@pytest.mark.parametrize(
    ("files", "subfolder", "chosen"),
    [
        (["a/cfg.json", "a/sae.safetensors", "b/x.pt"], "a", {"a/cfg.json", "a/sae.safetensors"}),
        (["layer1.sae.pt", "layer2.sae.pt", "README.md"], "layer2.sae.pt", {"layer2.sae.pt"}),
        (
            ["L/hyperparams.json", "L/checkpoints/final.safetensors", "L/lm_config.json"],
            "L",
            {"L/hyperparams.json", "L/checkpoints/final.safetensors", "L/lm_config.json"},
        ),
        (["config.yaml", "layer_0.safetensors", "layer_1.safetensors"], "layer_1.safetensors",
         {"config.yaml", "layer_1.safetensors"}),
        (["layer_1.safetensors", "expected_codes_layer_1.safetensors", "config.yaml"], None,
         {"layer_1.safetensors", "expected_codes_layer_1.safetensors", "config.yaml"}),
        (["config.json", "checkpoints/ae_1.pt", "checkpoints/ae_2.pt"], "checkpoints/ae_2.pt",
         {"checkpoints/ae_2.pt", "config.json"}),
        (["params.npz"], None, {"params.npz"}),
        (["layer1.sae.pt", "layer2.sae.pt"], None, "has several dictionaries: name one"),
        (["README.md"], None, "the repository has no dictionary"),
        (["a/ae.pt"], "b", "has no dictionary in b: name one as subfolder, as a"),
    ],
)  # fmt: skip
def test_the_files_of_a_dictionary_are_found_in_a_listing(files, subfolder, chosen):
    if isinstance(chosen, set):
        assert set(files_of("owner/name", files, subfolder)) == chosen
    else:
        with pytest.raises(interop.DictionaryError, match=chosen):
            files_of("owner/name", files, subfolder)


def test_without_the_library_a_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        make("topk").push_to_hub("owner/name")
