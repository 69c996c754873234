"""Dictionaries written for other libraries are read back as they were, in their layouts."""

import json
from pathlib import Path

import pytest
import torch
from plain_models import D_IN, D_SAE, KINDS, make, rows, units_of
from safetensors import safe_open

from sae_fast import SparseAutoencoder, interop
from sae_fast.activations import ShardMetadata, open_shards, write_shard
from sae_fast.activations.mixing import origin_of
from sae_fast.autoencoder.interchange import to_plain
from sae_fast.interop import FORMATS, DictionaryError

FOREIGN = Path(__file__).parent / "foreign"
WRITTEN = tuple(known.name for known in FORMATS if known.can_write)
# Kinds that a format has no form for.
REFUSED = {
    "saelens": {"groupmax", "topk skip transcoder"},
    "sparsify": {
        kind for kind in KINDS if "topk" not in kind.split("_")[0] and kind != "groupmax"
    } | {"abs_topk", "batch_topk", "batch_topk transcoder of two widths", "topk with layer_norm"},
    "dictionary_learning": {
        kind for kind in KINDS if "transcoder" in kind or kind.endswith("_norm")
    } | {"abs_topk", "groupmax"},
    "circuit_tracer": {
        kind for kind in KINDS if kind not in ("relu transcoder", "jumprelu skip transcoder")
    },
}  # fmt: skip
# Where the format has another rule of subtraction, b_enc changes and the function does not.
SUBTRACTED = {
    "sparsify": {"topk without subtraction"},
    "dictionary_learning": {
        *("topk without subtraction", "gated without subtraction", "jumprelu"),
    },
}
CASES = [(kind, to) for kind in KINDS for to in WRITTEN]


@pytest.mark.parametrize("normalize", ["mean_scale", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_formula_is_the_model(kind, normalize):
    sae, x = make(kind, normalize), rows()
    plain, code = to_plain(sae), sae.encode(x, units=units_of(sae))
    reference = plain.encode(x)
    torch.testing.assert_close(code.dense().double(), reference, atol=2e-5, rtol=1e-5)
    x_hat = sae.decode(code, x).double()
    torch.testing.assert_close(x_hat, plain.decode(reference, x), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "to"), CASES)
def test_a_round_trip_keeps_all_bits(kind, to, tmp_path):
    plain, x = to_plain(make(kind)), rows()
    if kind in REFUSED[to]:
        with pytest.raises(DictionaryError, match="cannot express") as told:
            interop.write(plain, tmp_path / "out", to)
        assert "\n" not in str(told.value)
        assert not (tmp_path / "out").exists()
        return
    place = interop.write(plain, tmp_path / "out", to)
    back = interop.read(place)
    expected = plain.tensors()
    if kind in SUBTRACTED.get(to, ()):
        back = interop.with_subtraction(back, plain.subtract_b_dec)
        for name, tensor in back.tensors().items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)
    else:
        assert back.tensors().keys() == expected.keys()
        assert all(torch.equal(part, expected[name]) for name, part in back.tensors().items())
    assert (back.arch, back.k, back.prefixes) == (plain.arch, plain.k, plain.prefixes)
    torch.testing.assert_close(back.encode(x), plain.encode(x), atol=1e-5, rtol=1e-5)
    loaded = SparseAutoencoder.from_pretrained(place)
    code = loaded.encode(x)
    torch.testing.assert_close(code.dense().double(), plain.encode(x), atol=2e-5, rtol=1e-5)
    assert loaded.origin == plain.origin


# A dictionary of the library itself, and the kind of ours that is written in its form.
SAME_LAYOUT = {
    "saelens/topk": "topk",
    "saelens/topk_layer_norm": "topk with layer_norm",
    "saelens/abstopk": "abs_topk",
    "saelens/standard": "relu",
    "saelens/jumprelu": "jumprelu",
    "saelens/batchtopk_for_inference": "batch_topk",
    "saelens/gated": "gated",
    "saelens/transcoder": "relu transcoder",
    "saelens/jumprelu_skip_transcoder": "jumprelu skip transcoder",
    "sparsify/layers.3": "topk",
    "sparsify/layers.5.mlp": "topk skip transcoder",
    "dictionary_learning/AutoEncoder": "relu",
    "dictionary_learning/AutoEncoderNew": "relu without subtraction",
    "dictionary_learning/AutoEncoderTopK": "topk",
    "dictionary_learning/BatchTopKSAE": "batch_topk",
    "dictionary_learning/MatryoshkaBatchTopKSAE": "matryoshka",
    "dictionary_learning/JumpReluAutoEncoder": "jumprelu",
    "dictionary_learning/GatedAutoEncoder": "gated",
    "circuit_tracer/jumprelu_skip": "jumprelu skip transcoder",
}


def layout_of(directory):
    """Return the types and shapes of all tensors, sizes by name, and the keys of the settings."""
    found = {}
    for path in directory.iterdir():
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            found |= {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
        elif path.suffix == ".safetensors" and not path.name.startswith("expected"):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found |= {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    sizes = {8: "D", D_IN: "D", 10: "M", 24: "F", D_SAE: "F"}
    return {name: (kind, [sizes.get(n, n) for n in shape]) for name, (kind, shape) in found.items()}


@pytest.mark.parametrize("theirs", SAME_LAYOUT)
def test_the_layout_is_the_one_that_the_library_writes(theirs, tmp_path):
    to = theirs.split("/")[0]
    interop.write(to_plain(make(SAME_LAYOUT[theirs])), tmp_path, to)
    ours, own = layout_of(tmp_path), layout_of(FOREIGN / theirs)
    own = {
        name: (kind, ["D" if n == "M" else n for n in shape]) for name, (kind, shape) in own.items()
    }
    own.pop("group_sizes", None), ours.pop("group_sizes", None)
    assert ours == own


@pytest.mark.parametrize("theirs", [name for name in SAME_LAYOUT if name.startswith("saelens")])
def test_the_settings_of_saelens_are_all_there(theirs, tmp_path):
    interop.write(to_plain(make(SAME_LAYOUT[theirs])), tmp_path, "saelens")
    ours, own = (
        json.loads((place / "cfg.json").read_text()) for place in (tmp_path, FOREIGN / theirs)
    )
    assert ours.keys() == own.keys()
    for name in ("architecture", "normalize_activations"):
        assert ours[name] == own[name]
    assert ours["metadata"]["sae_lens_version"].split(".")[0] == "6"


def test_several_layers_of_circuit_tracer_share_a_directory(tmp_path):
    for layer in (0, 1):
        sae = make("jumprelu skip transcoder")
        sae.origin = {
            "model": "gpt2",
            "hook": f"mlp_in.{layer}",
            "layer": layer,
            "targets": {"model": "gpt2", "hook": f"mlp_out.{layer}", "layer": layer},
        }
        sae.export(tmp_path, "circuit_tracer")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.yaml", "layer_0.safetensors", "layer_1.safetensors"),
        *(f"expected_codes_layer_{layer}.safetensors" for layer in (0, 1)),
    }
    text = (tmp_path / "config.yaml").read_text()
    assert 'feature_input_hook: "mlp.hook_in"\n' in text
    assert 'feature_output_hook: "hook_mlp_out"\n' in text
    sae.origin["model"] = "another"
    with pytest.raises(DictionaryError, match="model_name is 'gpt2', and this transcoder has"):
        sae.export(tmp_path, "circuit_tracer")


DESCRIPTION = "the output of the third block (after its norm)"


@pytest.mark.parametrize("to", ["saelens", "dictionary_learning", "sparsify"])
def test_a_description_in_place_of_a_hook_point_is_written_as_no_name(to, tmp_path, caplog):
    sae = make("topk")
    sae.origin = {"model": "gpt2", "hook": DESCRIPTION, "layer": 2}
    place = tmp_path / "out"
    assert sae.export(place, to).holds
    assert f"hook {DESCRIPTION!r} is no name of a hook point" in caplog.text
    files = {
        "saelens": ("cfg.json", lambda content: content["metadata"]["hook_name"]),
        "dictionary_learning": (
            "config.json",
            lambda content: content["trainer"]["submodule_name"],
        ),
        "sparsify": ("cfg.json", lambda content: content.get("hookpoint")),
    }
    name, read = files[to]
    assert read(json.loads((place / name).read_text())) is None
    assert SparseAutoencoder.from_pretrained(place).origin == sae.origin
    with pytest.raises(ValueError, match="does not name the hook point that it is of"):
        sae.to_saebench()


@pytest.mark.parametrize("side", ["input", "output"])
def test_circuit_tracer_is_given_no_description_of_a_hook_point(side, tmp_path):
    sae = make("relu transcoder")
    hooks = ("mlp_in.0", DESCRIPTION) if side == "output" else (DESCRIPTION, "mlp_out.0")
    targets = {"model": "gpt2", "hook": hooks[1], "layer": 0}
    sae.origin = {"model": "gpt2", "hook": hooks[0], "layer": 0, "targets": targets}
    with pytest.raises(DictionaryError, match="a hook point without a name, 'the output of the"):
        sae.export(tmp_path / "out", "circuit_tracer")
    assert not (tmp_path / "out").exists()


def test_the_shipped_activations_name_their_hook_point_to_other_programs(tmp_path):
    shards = Path(__file__).parents[2] / "examples" / "activations"
    sae = make("topk")
    for source in (open_shards(shards, verify=False), described_shards(tmp_path)):
        sae.origin = dict(origin_of(source))
        assert (sae.origin["hook"], sae.origin["layer"]) == ("residual.2", "2")
        place = tmp_path / f"out_{len(list(tmp_path.iterdir()))}"
        sae.export(place, "saelens")
        metadata = json.loads((place / "cfg.json").read_text())["metadata"]
        assert metadata["hook_name"] == "blocks.2.hook_resid_post"
        assert metadata["model_name"] == "sentence-transformers/all-MiniLM-L6-v2"


def described_shards(tmp_path):
    """Return shards whose hook point is the description that activations of MiniLM had."""
    path = tmp_path / "described.h5"
    description = "hidden_states[3] (residual stream after layer 3, post-LayerNorm)"
    metadata = ShardMetadata(
        model="sentence-transformers/all-MiniLM-L6-v2", hook=description, layer=3
    )
    write_shard(path, torch.eye(4), metadata=metadata)
    return open_shards([path], verify=False)


def test_what_no_format_has_is_refused(tmp_path):
    from sae_fast import SAEConfig

    slots = SparseAutoencoder(SAEConfig(arch="slots", d_in=8, d_sae=24, n_relations=2, n_answers=3))
    with pytest.raises(DictionaryError, match="arch slots is of sae_fast alone"):
        slots.export(tmp_path, "saelens")
    linear = SparseAutoencoder(SAEConfig(arch="relu", use_relu=False, d_in=8, d_sae=24))
    for to in WRITTEN:
        with pytest.raises(DictionaryError, match="cannot express"):
            linear.export(tmp_path / to, to)
    fresh = SparseAutoencoder(SAEConfig(arch="batch_topk", d_in=8, d_sae=24, k=2))
    with pytest.raises(DictionaryError, match="set in training"):
        fresh.export(tmp_path / "fresh", "saelens")
    with pytest.raises(DictionaryError, match="to must be one of sae_fast, saelens"):
        make("topk").export(tmp_path / "other", "gemma_scope")
    with pytest.raises(DictionaryError, match=r"got 'sae_lens' \(did you mean 'saelens'\?\)"):
        make("topk").export(tmp_path / "other", "sae_lens")
