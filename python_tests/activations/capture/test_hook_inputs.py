"""Hook points at the inputs of modules and of heads, and the names of TransformerLens."""

import json

import h5py
import pytest
import torch
from small_models import CAUSAL, MASKED, VOCABULARY, make_network, save_model

from sae_fast import train
from sae_fast.activations.capture.hooks import resolve_hooks
from sae_fast.activations.capture.language_model import HookedModel
from sae_fast.capture import main

TOKENS = torch.arange(7, 7 + 10)[None] % len(VOCABULARY)


def rows_of(network, *names):
    hooks = resolve_hooks(network, (), names)
    return HookedModel(network, hooks).activations(TOKENS)


def plain_input(network, path):
    """Return the first input of a module, taken by an ordinary hook."""
    seen = []

    def keep(_module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = network.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        network(input_ids=TOKENS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_the_stream_before_a_block_is_the_stream_behind_the_block_before(name):
    rows = rows_of(make_network(name), "resid_pre.1", "residual.0")
    assert torch.equal(rows["resid_pre.1"], rows["residual.0"])


@pytest.mark.parametrize(
    ("name", "feed_forward", "matrix"),
    [
        ("gpt2", "transformer.h.1.mlp", "transformer.h.1.attn.c_proj"),
        ("llama", "model.layers.1.mlp", "model.layers.1.self_attn.o_proj"),
        ("gpt_neox", "gpt_neox.layers.1.mlp", "gpt_neox.layers.1.attention.dense"),
        ("gemma2", "model.layers.1.mlp", "model.layers.1.self_attn.o_proj"),
        ("opt", "model.decoder.layers.1.fc1", "model.decoder.layers.1.self_attn.out_proj"),
        (
            "bert",
            "bert.encoder.layer.1.intermediate",
            "bert.encoder.layer.1.attention.output.dense",
        ),
        (
            "distilbert",
            "distilbert.transformer.layer.1.ffn",
            "distilbert.transformer.layer.1.attention.out_lin",
        ),
    ],
)
def test_inputs_of_both_parts_of_a_block(name, feed_forward, matrix):
    network = make_network(name)
    rows = rows_of(network, "mlp_in.1", "z.1", f"{matrix}:in")
    wanted = plain_input(network, feed_forward).view(1, 10, -1)
    assert torch.equal(rows["mlp_in.1"], wanted)
    assert torch.equal(rows["z.1"], plain_input(network, matrix))
    assert torch.equal(rows["z.1"], rows[f"{matrix}:in"])


def test_a_head_is_its_columns_of_all_heads():
    network = make_network("llama")
    hooks = resolve_hooks(network, (), ["z.1", "z.1.*"])
    assert [hook.name for hook in hooks] == ["z.1", "z.1.0", "z.1.1"]
    rows = HookedModel(network, hooks).activations(TOKENS)
    assert torch.equal(torch.cat([rows["z.1.0"], rows["z.1.1"]], 2), rows["z.1"])
    assert HookedModel(network, hooks).widths() == {"z.1": 16, "z.1.0": 8, "z.1.1": 8}


def test_heads_make_the_output_of_attention():
    network = make_network("llama")
    rows = rows_of(network, "z.1", "attn_out.1")
    made = network.model.layers[1].self_attn.o_proj(rows["z.1"])
    torch.testing.assert_close(made, rows["attn_out.1"])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("blocks.1.hook_resid_post", "residual.1"),
        ("blocks.1.hook_resid_pre", "resid_pre.1"),
        ("blocks.1.hook_attn_out", "attn_out.1"),
        ("blocks.1.hook_mlp_out", "mlp_out.1"),
        ("blocks.1.mlp.hook_in", "mlp_in.1"),
        ("blocks.1.attn.hook_z", "z.1"),
        ("blocks.1.hook_out", "residual.1"),
        ("blocks.1.hook_in", "resid_pre.1"),
        ("blocks.1.attn.o.hook_in", "z.1"),
    ],
)
def test_names_of_transformer_lens_mean_hook_points(name, meant):
    network = make_network("gpt2")
    assert resolve_hooks(network, (), (name,)) == resolve_hooks(network, (), (meant,))


def test_patterns_of_transformer_lens_and_of_inputs_mean_every_block():
    network = make_network("llama")
    hooks = resolve_hooks(network, (), ("blocks.*.hook_resid_pre",))
    assert [hook.name for hook in hooks] == ["resid_pre.0", "resid_pre.1", "resid_pre.2"]
    hooks = resolve_hooks(network, (), ("model.layers.*.mlp.down_proj:in",))
    assert [hook.place for hook in hooks] == [hook.name for hook in hooks]
    assert [hook.layer for hook in hooks] == [0, 1, 2]


def test_an_unknown_name_of_transformer_lens_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no 'blocks\.1\.hook_resid_mid'") as caught:
        resolve_hooks(make_network("gpt2"), (), ("blocks.1.hook_resid_mid",))
    assert "blocks.L.hook_resid_post for residual.L" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_input_that_is_no_vector_a_token_is_named():
    with pytest.raises(ValueError, match=r"wpe:in: transformer.wpe must read one vector a token"):
        rows_of(make_network("gpt2"), "transformer.wpe:in")


def test_both_sides_of_a_transcoder_come_from_one_capture(tmp_path, capsys):
    save_model(tmp_path / "model", "gemma2")
    texts = [{"text": "the cat sat on a mat . the dog ran far away ."} for _ in range(8)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    out = tmp_path / "out"
    arguments = [str(tmp_path / "model"), str(tmp_path / "texts.jsonl"), "--out", str(out)]
    arguments += ["--hook-points", "mlp_in.1", "mlp_out.1", "z.1.0", "model.norm:in"]
    arguments += ["--num-threads", "1", "--dtype", "float32", "--heldout-tokens", "20"]
    assert main(arguments) == 0
    found = {}
    for name in ("mlp_in.1", "mlp_out.1", "z.1.0", "model.norm:in"):
        with h5py.File(out / name / "shard_00000.h5") as file:
            found[name] = (file["token_ids"][:].tolist(), file["activations"].shape)
            assert file.attrs["hook"] == name
    assert len({str(tokens) for tokens, _ in found.values()}) == 1
    assert found["z.1.0"][1][1] == 8
    recipe = json.loads((out / "capture.json").read_text())
    kept = {hook["name"]: hook for hook in recipe["hooks"]}
    assert kept["z.1.0"]["columns"] == [0, 8]
    assert "scale" not in kept["mlp_in.1"]
    assert main(arguments) == 0  # the capture is recognised as the same
    sides = ["--shard-dir", str(out / "mlp_in.1"), "--target-shard-dir", str(out / "mlp_out.1")]
    more = [
        "--transcoder",
        "--k",
        "2",
        "--expansion-factor",
        "2",
        "--max-steps",
        "2",
        "--batch-size",
        "16",
    ]
    run = ["--checkpoint-dir", str(tmp_path / "run"), "--num-threads", "1"]
    assert train.main([*sides, *more, *run]) == 0
    origin = json.loads((tmp_path / "run/checkpoints/latest/config.json").read_text())["origin"]
    assert (origin["hook"], origin["targets"]["hook"]) == ("mlp_in.1", "mlp_out.1")
    capsys.readouterr()
