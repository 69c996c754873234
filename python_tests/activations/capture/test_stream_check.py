"""attn_out and mlp_out are added to the residual stream, or they are refused in one line."""

import json

import pytest
import torch
import transformers
from small_models import CAUSAL, MASKED, TRANSFORMER, make_network, make_tokenizer, save_model

from sae_fast.activations.capture.hooks import resolve_hooks
from sae_fast.activations.capture.language_model import HookedModel
from sae_fast.activations.capture.probe import probe_tokens
from sae_fast.activations.capture.stream_check import checked_hooks
from sae_fast.capture import main

SHAPE = {**TRANSFORMER, "initializer_range": 0.2}
HEADS = {"head_dim": 16}
NAMES = ("residual.0", "residual.1", "attn_out.1", "mlp_out.1")


def network_of(kind, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def checked(network, names, tokenizer=None):
    tokens = probe_tokens(network, tokenizer or make_tokenizer(True), None)
    return checked_hooks(network, resolve_hooks(network, (), names), tokens)


@pytest.mark.parametrize(
    ("kind", "more", "modules"),
    [
        ("llama", {}, ("self_attn", "mlp")),
        ("gpt_neox", {}, ("attention", "mlp")),  # beside each other
        ("gemma2", HEADS, ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("gemma3_text", HEADS, ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("glm4", HEADS, ("post_self_attn_layernorm", "post_mlp_layernorm")),
        ("olmo2", {}, ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("olmo3", {}, ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("exaone4", {}, ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 32}, ("attn", "mlp")),
        ("phi", {}, ("self_attn", "mlp")),
        ("cohere", {}, ("self_attn", "mlp")),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, ("self_attn", "fc2")),
        ("mixtral", {"num_local_experts": 2}, ("self_attn", "mlp")),
        ("bloom", {"n_layer": 2, "n_head": 2}, ("self_attention.dense", "mlp.dense_4h_to_h")),
        (
            "mpt",
            {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
            ("attn", "ffn.down_proj"),
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_and_both_parts_make_the_next_residual(kind, more, modules, dtype):
    network = network_of(kind, **more).to(dtype)
    hooks = checked(network, NAMES)
    for hook, module in zip(hooks[2:], modules, strict=True):
        assert hook.module.endswith(f".1.{module}")
    tokens = torch.arange(7, 16)[None]
    rows = HookedModel(network, hooks).activations(tokens)
    before, behind, attention, feed_forward = (rows[name].float() for name in NAMES)
    change = behind - before
    assert (before + attention + feed_forward - behind).norm() <= (
        (1e-6 if dtype == torch.float32 else 0.1) * change.norm()
    )


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_modules_whose_output_is_added_stay(name):
    network = make_network(name)
    hooks = resolve_hooks(network, (), ("attn_out.*", "mlp_out.*"))
    tokens = probe_tokens(network, make_tokenizer(name in CAUSAL), None)
    found = checked_hooks(network, hooks, tokens)
    if name == "gemma2":
        assert all("layernorm" in hook.module for hook in found)
    else:
        assert found == hooks


@pytest.mark.parametrize("kind", ["granite", "granitemoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_that_the_model_scales_is_captured_as_it_is_added(kind, dtype):
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "granitemoe" else {}
    network = network_of(kind, residual_multiplier=0.22, **experts).to(dtype)
    hooks = checked(network, NAMES)
    assert [hook.scale for hook in hooks] == [1.0, 1.0, 0.22, 0.22]
    tokens = torch.arange(7, 16)[None]
    rows = HookedModel(network, hooks).activations(tokens)
    before, behind, attention, feed_forward = (rows[name] for name in NAMES)
    assert torch.equal(before + attention + feed_forward, behind)
    (same,) = checked(network, (hooks[2].module,))
    own = HookedModel(network, [same]).activations(tokens)[same.name]
    assert torch.equal(own * 0.22, attention)


@pytest.mark.parametrize("hook", ["attn_out.1", "mlp_out.1"])
def test_an_output_whose_scale_nothing_states_is_refused(hook):
    network = network_of("granite", residual_multiplier=0.22)
    network.model.layers[1].residual_multiplier = torch.tensor(0.37)  # no number of the block
    module = "self_attn" if hook == "attn_out.1" else "mlp"
    with pytest.raises(ValueError, match=f"^{hook}: GraniteForCausalLM does not add") as error:
        checked(network, (hook,))
    assert "(it adds 0.37 times it)" in str(error.value)
    path = f"model.layers.1.{module}"
    assert str(error.value).endswith(f"give --hook-points {path}")
    (same,) = checked(network, (path,))
    assert same.module == path


def test_a_capture_of_another_module_by_the_same_name_is_not_gone_on_with(tmp_path, capsys):
    save_model(tmp_path / "model", "gemma2")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "the cat sat on a mat"}))
    out = tmp_path / "out"
    arguments = [str(tmp_path / "model"), str(tmp_path / "texts.jsonl"), "--out", str(out)]
    arguments += ["--hook-points", "mlp_out.1", "--num-threads", "1"]
    assert main(arguments) == 0
    recipe = json.loads((out / "capture.json").read_text())
    (hook,) = recipe["hooks"]
    assert hook["module"] == "model.layers.1.post_feedforward_layernorm"
    hook["module"] = "model.layers.1.mlp"
    (out / "capture.json").write_text(json.dumps(recipe))
    assert main(arguments) == 2
    assert (
        "its mlp_out.1 is the output of model.layers.1.mlp, asked for is the output of "
        "model.layers.1.post_feedforward_layernorm" in capsys.readouterr().err
    )
