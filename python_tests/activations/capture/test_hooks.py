"""Hook points: their tensors in every architecture, and the errors for wrong names."""

import pytest
import torch
from small_models import CAUSAL, LAYERS, MASKED, VOCABULARY, make_network

from sae_fast.activations.capture.hooks import find_blocks, resolve_hooks
from sae_fast.activations.capture.language_model import HookedModel

EVERY = [*CAUSAL, *MASKED]


@pytest.fixture(scope="module")
def networks():
    return {name: make_network(name) for name in EVERY}


def some_tokens(padded):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, len(VOCABULARY), (3, 12), generator=generator)
    if not padded:
        return tokens, None
    mask = torch.arange(12) < torch.tensor([12, 5, 9])[:, None]
    return tokens.masked_fill(~mask, 0), mask


def plain_outputs(network, paths, tokens, mask):
    """Return the first outputs of modules in a whole forward pass, taken by ordinary hooks."""
    found = {}

    def keep(path):
        def hook(_module, _inputs, output):
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [network.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        result = network(
            input_ids=tokens,
            attention_mask=None if mask is None else mask.long(),
            output_hidden_states=True,
        )
    for handle in handles:
        handle.remove()
    return found, result.hidden_states


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_residual_hooks_are_the_hidden_states_of_the_model(networks, name, padded):
    network = networks[name]
    hooks = resolve_hooks(network, range(LAYERS))
    tokens, mask = some_tokens(padded)
    rows = HookedModel(network, hooks).activations(tokens, mask)
    last = hooks[-1]
    plain, hidden = plain_outputs(network, [last.module], tokens, mask)
    for layer in range(LAYERS - 1):
        assert torch.equal(rows[f"residual.{layer}"], hidden[layer + 1]), layer
    # The last hidden state of transformers may be the output of the final norm.
    assert torch.equal(rows[last.name], plain[last.module])


@pytest.mark.parametrize("name", EVERY)
def test_a_single_layer_stops_early_with_the_bits_of_a_whole_pass(networks, name):
    network = networks[name]
    tokens, mask = some_tokens(True)
    seen = []
    blocks = find_blocks(network).modules
    handle = blocks[1].register_forward_hook(lambda *_: seen.append(1))
    (only,) = HookedModel(network, resolve_hooks(network, [0])).activations(tokens, mask).values()
    handle.remove()
    assert not seen
    assert torch.equal(only, plain_outputs(network, [], tokens, mask)[1][1])


@pytest.mark.parametrize(
    ("name", "attention", "feed_forward"),
    [
        ("gpt2", "transformer.h.1.attn", "transformer.h.1.mlp"),
        ("llama", "model.layers.1.self_attn", "model.layers.1.mlp"),
        ("gpt_neox", "gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp"),
        ("gemma2", "model.layers.1.self_attn", "model.layers.1.mlp"),
        ("qwen3", "model.layers.1.self_attn", "model.layers.1.mlp"),
        ("opt", "model.decoder.layers.1.self_attn", "model.decoder.layers.1.fc2"),
        (
            "bert",
            "bert.encoder.layer.1.attention.output.dense",
            "bert.encoder.layer.1.output.dense",
        ),
        (
            "distilbert",
            "distilbert.transformer.layer.1.attention",
            "distilbert.transformer.layer.1.ffn",
        ),
    ],
)
def test_attention_and_feed_forward_hooks_are_the_modules_of_the_block(
    networks, name, attention, feed_forward
):
    network = networks[name]
    hooks = resolve_hooks(network, hook_points=["attn_out.1", "mlp_out.1"])
    assert [hook.module for hook in hooks] == [attention, feed_forward]
    tokens, mask = some_tokens(True)
    rows = HookedModel(network, hooks).activations(tokens, mask)
    plain, _ = plain_outputs(network, [attention, feed_forward], tokens, mask)
    assert torch.equal(rows["attn_out.1"], plain[attention])
    assert torch.equal(rows["mlp_out.1"], plain[feed_forward].view(3, 12, 16))


def test_in_a_pre_norm_block_the_parts_add_up_to_the_residual_stream(networks):
    network = networks["llama"]
    hooks = resolve_hooks(network, [0, 1], ["attn_out.1", "mlp_out.1"])
    rows = HookedModel(network, hooks).activations(*some_tokens(False))
    total = rows["residual.0"] + rows["attn_out.1"] + rows["mlp_out.1"]
    torch.testing.assert_close(total, rows["residual.1"])


def test_wildcards_and_paths_name_modules(networks):
    network = networks["llama"]
    names = [hook.name for hook in resolve_hooks(network, hook_points=["mlp_out.*"])]
    assert names == [f"mlp_out.{layer}" for layer in range(LAYERS)]
    hooks = resolve_hooks(network, hook_points=["model.layers.*.mlp.down_proj"])
    assert [hook.layer for hook in hooks] == list(range(LAYERS))
    assert hooks[1].name == hooks[1].module == "model.layers.1.mlp.down_proj"
    (norm,) = resolve_hooks(network, hook_points=["model.norm"])
    assert norm.layer is None


def test_a_hook_asked_for_twice_is_there_once(networks):
    hooks = resolve_hooks(networks["gpt2"], [1], ["residual.*", "residual.1"])
    assert sorted(hook.name for hook in hooks) == ["residual.0", "residual.1", "residual.2"]


def test_layer_stride_takes_every_nth_block(networks):
    network = networks["gpt2"]
    assert [hook.name for hook in resolve_hooks(network, layer_stride=2)] == [
        "residual.0",
        "residual.2",
    ]
    strided = resolve_hooks(network, hook_points=["mlp_out.*"], layer_stride=2)
    assert [hook.name for hook in strided] == ["mlp_out.0", "mlp_out.2"]


def test_experts_in_a_block_are_not_taken_for_blocks():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(8))

    network = torch.nn.Module()
    network.layers = torch.nn.ModuleList(Block() for _ in range(2))
    assert find_blocks(network).path == "layers"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, "layers: GPT2LMHeadModel has blocks 0 to 2, got 3"),
        ({"layers": [-1]}, "blocks 0 to 2, got -1"),
        ({}, "no hook: give layers, layer_stride or hook_points"),
        ({"layers": [1], "layer_stride": 2}, "layer_stride chooses layers by itself"),
        ({"layer_stride": 0}, "layer_stride must be at least 1, got 0"),
        (
            {"hook_points": ["mlp_ot.1"]},
            r"no 'mlp_ot.1' \(did you mean mlp_out.1\?\); there are residual.0 to residual.2, "
            "attn_out.0 to attn_out.2, mlp_out.0 to mlp_out.2, resid_pre.0 to resid_pre.2, "
            "mlp_in.0 to mlp_in.2, z.0 to z.2, and its modules, such as",
        ),
        (
            {"hook_points": ["transformer.h.0.mlp.c_fk"]},
            r"did you mean transformer.h.0.mlp.c_fc\?",
        ),
    ],
)
def test_what_there_is_not_is_named_with_what_there_is(networks, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve_hooks(networks["gpt2"], **arguments)
    assert "\n" not in str(caught.value)


def test_a_module_that_puts_out_no_vector_a_token_is_named(networks):
    network = networks["gpt2"]
    hooks = resolve_hooks(network, hook_points=["transformer.wpe"])
    with pytest.raises(ValueError, match=r"transformer.wpe must put out one vector a token"):
        HookedModel(network, hooks).activations(*some_tokens(False))


def test_a_module_that_runs_twice_is_named():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(5, 4)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

        def forward(self, input_ids, attention_mask):
            return self.layers[1](self.layers[0](self.layers[0](self.embed(input_ids))))

    network = Twice()
    with pytest.raises(ValueError, match=r"residual.0: layers.0 runs more than once in a pass"):
        HookedModel(network, resolve_hooks(network, [0, 1])).activations(torch.zeros(1, 2).long())


def test_an_output_that_is_changed_in_place_later_is_refused():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(5, 4)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

        def forward(self, input_ids, attention_mask):
            return self.layers[1](self.layers[0](self.embed(input_ids)).add_(1))

    network = InPlace()
    with pytest.raises(ValueError, match=r"residual.0: the model changes this output in place"):
        HookedModel(network, resolve_hooks(network, [0, 1])).activations(torch.zeros(1, 2).long())


def test_widths_are_those_of_the_outputs(networks):
    network = networks["gpt2"]
    hooks = resolve_hooks(network, [0], ["transformer.h.0.mlp.c_fc"])
    widths = HookedModel(network, hooks).widths()
    assert widths == {"residual.0": 16, "transformer.h.0.mlp.c_fc": 64}
