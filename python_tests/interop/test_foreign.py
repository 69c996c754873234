"""Dictionaries made by other libraries' own code give the codes that these libraries compute.

`tools/foreign_dictionaries.py` made the files of `foreign/`, in environments with sae-lens 6.54.12,
eai-sparsify 1.3.3, dictionary-learning 0.1.0, circuit-tracer 0.5.0, llamascopium 2.0.0b34,
OpenAI's sparse_autoencoder, and saev at 3d73f1f. The releases are random weights in their
documented layouts; what is expected of them is what SAELens's loaders make of them.
"""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_fast import SparseAutoencoder, interop
from sae_fast.autoencoder.interchange import to_plain

FOREIGN = Path(__file__).parent / "foreign"
MADE = sorted(path.parent for path in FOREIGN.rglob("expected.safetensors"))
REFUSED = {
    "openai/topk": "normalise each token by its own",
    "saev/topk": "TopK is without ReLU in saev",
}
WEIGHED = "openmoss/topk"  # whose codes are divided by decoder norms after the selection


def place_of(directory):
    """Return the directory of a dictionary, or its only file where that is what is read."""
    if interop.recognise(directory) is not None:
        return directory
    (path,) = (path for path in directory.iterdir() if path.suffix in (".pt", ".pth"))
    return path


def name_of(directory):
    return str(directory.relative_to(FOREIGN))


def test_all_libraries_are_there():
    assert {path.relative_to(FOREIGN).parts[0] for path in MADE} == {
        *("saelens", "sparsify", "dictionary_learning", "circuit_tracer"),
        *("openai", "openmoss", "releases", "saev"),
    }
    assert len(MADE) == 45


@pytest.mark.parametrize("directory", MADE, ids=name_of)
def test_codes_and_reconstructions_are_those_of_the_library(directory):
    if name_of(directory) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name_of(directory)]):
            SparseAutoencoder.from_pretrained(place_of(directory))
        return
    expected = load_file(directory / "expected.safetensors")
    sae = SparseAutoencoder.from_pretrained(place_of(directory))
    x, code = expected["x"], sae.encode(expected["x"])
    wanted = expected["code"]
    if name_of(directory) == WEIGHED:
        # Selection by weighted values is the same as by codes in other units.
        own = load_file(directory / "sae_weights.safetensors")
        norms = torch.linalg.vector_norm(own["W_D"], dim=1)
        wanted = wanted * norms
    torch.testing.assert_close(code.dense(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(code, x), expected["x_hat"], atol=1e-5, rtol=1e-5)
    plain = to_plain(sae)
    torch.testing.assert_close(plain.encode(x).float(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        (
            "saelens/standard",
            {"model": "gpt2-small", "hook": "residual.3", "layer": 3, "dataset": "some/text"},
        ),
        ("saelens/older_standard", {"model": "gpt2-small", "hook": "resid_pre.1", "layer": 1}),
        ("sparsify/h.4.mlp", {"hook": "h.4.mlp", "layer": 4}),
        (
            "circuit_tracer/relu",
            {
                "model": "google/gemma-2-2b",
                "hook": "mlp_in.2",
                "layer": 2,
                "targets": {"model": "google/gemma-2-2b", "hook": "mlp_out.2", "layer": 2},
            },
        ),
        ("releases/goodfire", {
            "model": "meta-llama/Llama-3.1-8B-Instruct", "hook": "residual.19", "layer": 19,
        }),
    ],
)  # fmt: skip
def test_the_origin_is_taken_from_the_files(name, origin):
    sae = SparseAutoencoder.from_pretrained(place_of(FOREIGN / name))
    assert sae.origin == origin


def test_a_scale_that_the_files_lack_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        SparseAutoencoder.from_pretrained(FOREIGN / "releases/Llama-Scope-R1-Distill/L15R")
    assert "activations must be scaled to a mean norm of sqrt(d_in) first" in caplog.text


def test_a_folder_of_several_names_them():
    with pytest.raises(ValueError, match="name one of jumprelu, relu and topk") as told:
        SparseAutoencoder.from_pretrained(FOREIGN, subfolder="openmoss")
    assert "\n" not in str(told.value)
    sae = SparseAutoencoder.from_pretrained(FOREIGN / "sparsify", subfolder="layers.3")
    assert sae.config.k == 3
