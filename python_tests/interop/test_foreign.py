"""Dictionaries made by other libraries' own code give the codes that these libraries compute.

`tools/foreign_dictionaries.py` made the files of `foreign/`, in environments with sae-lens 6.54.12,
eai-sparsify 1.3.3, dictionary-learning 0.1.0, circuit-tracer 0.5.0, llamascopium 2.0.0b34,
OpenAI's sparse_autoencoder, and saev at 3d73f1f. The releases are random weights in their
documented layouts; what is expected of them is what SAELens's loaders make of them.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_fast import SparseAutoencoder, interop
from sae_fast.autoencoder.interchange import to_plain

FOREIGN = Path(__file__).parent / "foreign"
MADE = sorted(path.parent for path in FOREIGN.rglob("expected.safetensors"))
REFUSED = {
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
    assert len(MADE) == 48


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
                "hook": "blocks.2.ln2.hook_normalized",
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
    with pytest.raises(
        ValueError, match="name one of jumprelu, relu, relu_token_wise and topk"
    ) as told:
        SparseAutoencoder.from_pretrained(FOREIGN, subfolder="openmoss")
    assert "\n" not in str(told.value)
    sae = SparseAutoencoder.from_pretrained(FOREIGN / "sparsify", subfolder="layers.3")
    assert sae.config.k == 3


@pytest.fixture
def copied(tmp_path):
    """Return a function that copies a dictionary of `foreign/` into a folder of some path."""

    def copy(name, path):
        return Path(shutil.copytree(FOREIGN / name, tmp_path / path))

    return copy


GEMMA_2 = "releases/gemma-scope-2-270m-pt/transcoder/layer_3_width_16k_l0_small_affine"


@pytest.mark.parametrize(
    ("path", "settings", "is_transcoder"),
    [
        ("resid_post/layer_5", {"type": "sae", "hf_hook_point_out": "a"}, False),
        ("resid_post/layer_5", {"hf_hook_point_out": "a"}, False),
        ("my_transcoders/more/resid_post/layer_5", None, False),
        ("mlp_out/layer_5", {"hf_hook_point_out": "b"}, True),
        ("transcoder_all/layer_5", None, True),
    ],
)
def test_the_kind_of_a_gemma_scope_2_is_told_by_its_hooks(path, settings, is_transcoder, copied):
    place = copied(GEMMA_2, path)
    tensors = load_file(place / "params.safetensors")
    del tensors["affine_skip_connection"]
    save_file(tensors, place / "params.safetensors")
    (place / "config.json").unlink()
    if settings is not None:
        content = {"architecture": "jump_relu", "hf_hook_point_in": "a", **settings}
        (place / "config.json").write_text(json.dumps(content))
    sae = SparseAutoencoder.from_pretrained(place)
    assert sae.config.transcoder == is_transcoder
    assert ("targets" in sae.origin) == (is_transcoder and settings is not None)


def test_links_of_a_cache_keep_the_names_of_their_folders(tmp_path):
    name = "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_10"
    place = tmp_path / name
    place.mkdir(parents=True)
    (place / "params.npz").symlink_to(FOREIGN / "releases" / name / "params.npz")
    blob = tmp_path / "blob"
    shutil.copy(FOREIGN / "releases" / name / "params.npz", blob)
    (place / "params.npz").unlink()
    (place / "params.npz").symlink_to(blob)
    sae = SparseAutoencoder.from_pretrained(place)
    assert sae.origin == {"model": "google/gemma-2-2b", "hook": "residual.3", "layer": 3}


def test_a_skip_connection_of_sparsify_that_is_no_transcoder_subtracts_b_dec(copied):
    place = copied("sparsify/layers.5.mlp", "layers.5.mlp")
    settings = json.loads((place / "cfg.json").read_text()) | {"transcode": False}
    (place / "cfg.json").write_text(json.dumps(settings))
    tensors, x = load_file(place / "sae.safetensors"), torch.randn(9, 8)
    pre = (x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    values, indices = pre.relu().topk(3, dim=1)
    code = torch.zeros(9, 24).scatter(1, indices, values)
    x_hat = code @ tensors["W_dec"] + tensors["b_dec"] + x @ tensors["W_skip"].T
    sae = SparseAutoencoder.from_pretrained(place)
    torch.testing.assert_close(sae.encode(x).dense(), code, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x), x), x_hat, atol=1e-5, rtol=1e-5)


def test_negative_values_of_circuit_tracer_are_refused(copied):
    place = copied("circuit_tracer/jumprelu_skip", "plt")
    tensors = load_file(place / "layer_2.safetensors")
    tensors["activation_function.threshold"][4] = -0.5
    save_file(tensors, place / "layer_2.safetensors")
    with pytest.raises(ValueError, match="thresholds below 0 let negative values through"):
        SparseAutoencoder.from_pretrained(place)


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
def test_factors_of_older_saelens_are_used_where_the_settings_say_so(name, copied):
    place = copied("saelens/older_standard", "older")
    x = torch.randn(9, 8)
    before = SparseAutoencoder.from_pretrained(place)
    tensors = load_file(place / "sae_weights.safetensors")
    factor = torch.rand(24) + 0.5
    save_file({**tensors, name: factor}, place / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="that they are not used"):
        SparseAutoencoder.from_pretrained(place)
    settings = json.loads((place / "cfg.json").read_text()) | {"finetuning_scaling_factor": True}
    (place / "cfg.json").write_text(json.dumps(settings))
    sae, code = SparseAutoencoder.from_pretrained(place), before.encode(x).dense()
    torch.testing.assert_close(sae.encode(x).dense(), code)
    expected = (code * factor) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(sae(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("submodule", "layer", "hook"),
    [
        ("resid_post_layer_12", 12, "residual.12"),
        ("mlp_out", 5, "mlp_out.5"),
        (None, "5", "residual.5"),
        ("something", 1, "something"),
    ],
)
def test_the_hook_of_dictionary_learning_is_the_submodule(submodule, layer, hook, copied):
    place = copied("dictionary_learning/AutoEncoder", "run")
    content = json.loads((place / "config.json").read_text())
    content["trainer"] |= {"submodule_name": submodule, "layer": layer}
    (place / "config.json").write_text(json.dumps(content))
    origin = SparseAutoencoder.from_pretrained(place).origin
    assert (origin["hook"], origin["layer"]) == (hook, int(layer))


def test_the_only_dictionary_of_a_folder_is_read():
    sae = SparseAutoencoder.from_pretrained(FOREIGN / "releases" / "goodfire")
    assert sae.origin["layer"] == 19


def openmoss_settings(place, **changes):
    path = place / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("weights", ["sae_weights.pt", "checkpoints/final.pt"])
def test_pickled_weights_of_openmoss_are_the_same_dictionary(weights, copied):
    place = copied("openmoss/jumprelu", "run")
    expected = SparseAutoencoder.from_pretrained(place).state_dict()
    tensors = load_file(place / "sae_weights.safetensors")
    (place / "sae_weights.safetensors").unlink()
    (place / weights).parent.mkdir(exist_ok=True)
    torch.save({"sae": tensors, "version": "2.0"}, place / weights)
    for named in (place, place / weights):
        found = SparseAutoencoder.from_pretrained(named).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    tensors["b_D"] += 1
    save_file(tensors, place / "sae_weights.safetensors")  # which a file that is named goes before
    for named, is_changed in ((place, True), (place / weights, False)):
        found = SparseAutoencoder.from_pretrained(named).state_dict()
        assert torch.equal(found["b_dec"], expected["b_dec"]) != is_changed


def test_a_distributed_checkpoint_of_openmoss_is_refused_with_the_reason(copied):
    place = copied("openmoss/jumprelu", "run")
    (place / "sae_weights.safetensors").unlink()
    (place / "sae_weights.dcp").mkdir()
    (place / "sae_weights.dcp" / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sae_weights\.dcp: a distributed checkpoint, whose"):
        SparseAutoencoder.from_pretrained(place)


def test_the_expansion_factor_of_openmoss_is_cut_to_a_whole_number(copied):
    place = copied("openmoss/jumprelu", "run")
    expected = SparseAutoencoder.from_pretrained(place)
    openmoss_settings(place, d_sae=None, expansion_factor=(expected.d_sae + 0.9) / expected.d_in)
    assert SparseAutoencoder.from_pretrained(place).d_sae == expected.d_sae


def test_a_scale_without_the_name_of_its_hook_is_refused(copied):
    place = copied("openmoss/jumprelu", "run")
    openmoss_settings(place, hook_point_in=None, norm_activation="dataset-wise")
    with pytest.raises(ValueError, match="hook_point_in is not there, and the scale"):
        SparseAutoencoder.from_pretrained(place)


@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_k_of_dictionary_learning_may_stand_in_the_settings_alone(kind, copied):
    place = copied(f"dictionary_learning/{kind}", "run")
    expected = SparseAutoencoder.from_pretrained(place)
    state = torch.load(place / "ae.pt", weights_only=True)
    k = int(state.pop("k"))
    torch.save(state, place / "ae.pt")
    content = json.loads((place / "config.json").read_text())

    def read(k):
        content["trainer"]["k"] = k
        (place / "config.json").write_text(json.dumps(content))
        return SparseAutoencoder.from_pretrained(place)

    assert read(k).config == expected.config
    with pytest.raises(ValueError, match="has no tensor k, and no k is in"):
        read(None)
    torch.save(state | {"k": torch.tensor(k)}, place / "ae.pt")
    assert read(None).config == expected.config
    with pytest.raises(ValueError, match=f"k is {k + 1}, .*has {k}"):
        read(k + 1)


def test_gemma_scope_is_read_under_the_other_names_of_its_tensors(copied):
    place = copied("releases/gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_10", "gemma")
    expected = SparseAutoencoder.from_pretrained(place).state_dict()
    arrays = dict(np.load(place / "params.npz"))
    for names in (("wenc", "wdec", "benc", "bdec"), ("W_E", "W_D", "b_e", "b_d")):
        own = dict(zip(("W_enc", "W_dec", "b_enc", "b_dec"), names, strict=True))
        named = {own.get(name, name): array for name, array in arrays.items()}
        np.savez(place / "params.npz", **named)
        found = SparseAutoencoder.from_pretrained(place).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("name", ["sparsify/h.4.mlp", "saelens/topk", "openmoss/topk"])
def test_a_k_of_more_latents_than_there_are_names_the_file(name, copied):
    place = copied(name, "sae")
    path = next(path for path in place.glob("c*g.json"))
    key = "top_k" if "openmoss" in name else "k"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 100}))
    with pytest.raises(ValueError, match=f"{place}: k.*100"):
        SparseAutoencoder.from_pretrained(place)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_interplm_is_read_with_the_scale_of_each_token(as_tensor, copied, caplog):
    place = copied("dictionary_learning/AutoEncoder", "run")
    expected = SparseAutoencoder.from_pretrained(place).state_dict()
    (place / "config.json").unlink()
    state = torch.load(place / "ae.pt", weights_only=True)
    state["activation_rescale_factor"] = torch.rand(24)
    for scales in (False, True):
        flag = torch.tensor(scales) if as_tensor else scales
        torch.save({**state, "normalize_to_sqrt_d": flag}, place / "ae.pt")
        sae = SparseAutoencoder.from_pretrained(place)
        found = sae.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert sae.config.normalize_activations == ("constant_norm" if scales else "none")
        assert ("as unnormalize=True gives them" in caplog.text) == scales
    x = torch.randn(9, 8) * 5
    scaled = x / x.norm(dim=1, keepdim=True) * 8**0.5
    pre = (scaled - state["bias"]) @ state["encoder.weight"].T + state["encoder.bias"]
    torch.testing.assert_close(sae.encode(x).dense(), pre.relu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "Identity"}, "activation 'Identity' has no counterpart here"),
        (
            {"activation_state_dict": {"k": True}},
            "k must be a whole number of at least 1, got True",
        ),
        ({"activation_state_dict": {}}, "k must be a whole number of at least 1, got None"),
        ({"activation_state_dict": {"k": 99, "postact_fn": "ReLU"}}, "k must be at most d_sae"),
        ({"activation_state_dict": {"k": 3, "postact_fn": "Identity"}}, "postact_fn 'Identity'"),
    ],
)
def test_what_openai_selects_by_is_named_where_it_is_not_read(changes, words, copied):
    path = copied("openai/topk", "openai") / "3.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    with pytest.raises(ValueError, match=words) as told:
        SparseAutoencoder.from_pretrained(path)
    assert str(path) in str(told.value)


def test_a_transcoder_of_saelens_that_normalises_tokens_is_refused(copied):
    place = copied("saelens/transcoder", "transcoder")
    settings = json.loads((place / "cfg.json").read_text())
    settings["normalize_activations"] = "layer_norm"
    (place / "cfg.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="'layer_norm' of a transcoder has no counterpart here"):
        SparseAutoencoder.from_pretrained(place)


@pytest.mark.parametrize("changes", [
    {"norm_activation": "batch-wise"},
    {"norm_activation": "token-wise", "hook_point_out": "blocks.3.hook_mlp_out"},
])  # fmt: skip
def test_scales_of_batches_and_of_a_transcoder_of_openmoss_are_refused(changes, copied):
    place = copied("openmoss/relu", "sae")
    settings = json.loads((place / "config.json").read_text()) | changes
    (place / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{changes['norm_activation']}' has no counterpart here"):
        SparseAutoencoder.from_pretrained(place)
