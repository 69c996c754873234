"""An autoencoder inside a model under other conditions: beams, copies, checkpoints, own hooks."""

import copy
import pickle
import re

import pytest
import torch
from small_models import VOCABULARY, make_network

from sae_fast import SAEConfig, SparseAutoencoder

WIDTH, LATENTS, HOOK = 16, 48, "residual.1"


def make_sae(seed=0):
    torch.manual_seed(seed)
    sae = SparseAutoencoder(SAEConfig(d_in=WIDTH, d_sae=LATENTS, k=4))
    return sae.requires_grad_(False).eval()


def some_tokens(batch=2, length=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(7, len(VOCABULARY), (batch, length), generator=generator)


def hooks_of(network):
    modules = list(network.modules())
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def generated(network, tokens, **settings):
    defaults = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return network.generate(tokens, **{**defaults, **settings})


# ---- generating ------------------------------------------------------------------------------


def test_a_mask_for_beams_is_repeated_as_generate_repeats_the_sequences():
    network, tokens, sae = make_network("llama"), some_tokens(), make_sae()
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[1, 3] = mask[0, 9:] = True
    with sae.attached(network, HOOK, "error") as run:
        run.add(3, 4.0, positions=mask.repeat_interleave(3, 0))
        together = generated(network, tokens, num_beams=3)
    assert run.codes[0].shape == (6, 9, LATENTS)
    for row in (0, 1):
        with sae.attached(network, HOOK, "error") as run:
            run.add(3, 4.0, positions=mask[row])
            alone = generated(network, tokens[row : row + 1], num_beams=3)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 3}])
def test_a_mask_of_fewer_sequences_is_refused_with_what_repeats_it(settings):
    network, tokens = make_network("llama"), some_tokens()
    mask = torch.ones(2, 12, dtype=torch.bool)
    words = re.escape("of one sequence, got (2, 12); generate repeats each sequence for its beams")
    with make_sae().attached(network, HOOK, "error") as run:
        run.add(3, 1.0, positions=mask)
        with pytest.raises(
            ValueError, match=f"{words}.*{re.escape('mask.repeat_interleave(3, 0)')}"
        ):
            generated(network, tokens, do_sample="num_beams" not in settings, **settings)
        run.reset().add(3, 1.0, positions=torch.ones(3, 9, dtype=torch.bool))
        words = re.escape("(2, 9), or of one sequence, got (3, 9)")
        with pytest.raises(ValueError, match=f"{words}$"):
            network(tokens)


@pytest.mark.parametrize(
    "settings", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}]
)
def test_other_caches_and_a_prompt_in_parts_keep_positions(settings):
    network, tokens, sae = make_network("llama"), some_tokens(), make_sae()
    found = []
    for more in ({}, settings):
        with sae.attached(network, HOOK, "error") as run:
            run.add(3, 4.0, positions=[2, 9, 10])
            found.append(generated(network, tokens, **more))
    assert torch.equal(*found)


def test_an_error_while_generating_leaves_nothing_behind():
    network, tokens = make_network("gpt2"), some_tokens()
    passes = []

    def fail_at_the_second(*_):
        passes.append(0)
        if len(passes) == 2:
            raise RuntimeError("planted")

    handle = network.transformer.h[2].register_forward_hook(fail_at_the_second)
    with (
        pytest.raises(RuntimeError, match="planted"),
        make_sae().attached(network, HOOK, "replace"),
    ):
        generated(network, tokens)
    assert hooks_of(network) == 1
    handle.remove()
    with make_sae().attached(network, HOOK, "error") as run:  # positions count from 0 again
        run.add(3, 4.0, positions=0)
        edited = network(tokens).logits
    assert not torch.allclose(edited[:, 0], network(tokens).logits[:, 0], atol=1e-3)


# ---- other hooks, modes and copies ---------------------------------------------------------------


def test_hooks_of_the_user_see_what_is_there_in_the_order_of_registration():
    network, tokens, seen = make_network("gpt2"), some_tokens(), []

    def look(_module, _arguments, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    block = network.transformer.h[1]
    before = block.register_forward_hook(look)
    with make_sae().attached(network, HOOK) as run:
        behind = block.register_forward_hook(look)
        network(tokens)
    x, spliced = seen
    torch.testing.assert_close(spliced, make_sae()(x))
    torch.testing.assert_close(run.codes[0].dense(), make_sae().encode(x, units="raw").dense())
    assert hooks_of(network) == 2
    before.remove()
    behind.remove()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_watched_model_is_not_copied_with_its_hooks(copied):
    network, tokens = make_network("gpt2"), some_tokens()
    with make_sae().attached(network, HOOK) as run:
        network(tokens)
        with pytest.raises(TypeError, match="copy, pickle or save it outside of the context"):
            copied(network)
        assert copied(network.state_dict())
        assert copied(run)
    assert copied(network)


def test_a_model_is_trained_through_an_autoencoder():
    network, tokens = make_network("gpt2").train(), some_tokens()
    with make_sae().attached(network, HOOK) as run:
        network(tokens, labels=tokens).loss.backward()
    assert network.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0
    assert not run.codes[0].values.requires_grad


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing_runs_an_edit_again_and_keeps_gradients():
    plain, tokens, sae = make_network("llama").train(), some_tokens(), make_sae()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    calls = {}
    for name, network in (("plain", plain), ("saving", saving)):
        with sae.attached(network, "mlp_out.1") as run:
            run.add(3, 2.0)
            network(tokens, labels=tokens, use_cache=False).loss.backward()
        calls[name] = run.calls
    assert calls == {"plain": 1, "saving": 2}
    weights = plain.model.embed_tokens.weight, saving.model.embed_tokens.weight
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


# ---- dtypes, sizes and devices -----------------------------------------------------------------


def test_float16_on_a_cpu_and_one_token():
    network, tokens = make_network("gpt2").half(), some_tokens(1, 1)
    for sae in (make_sae(), make_sae().half()):
        with sae.attached(network, HOOK, "error") as run, torch.no_grad():
            run.add(3, 2.0, positions=0)
            found = network(tokens).logits
        assert found.dtype == torch.float16
        assert found.isfinite().all()
        assert run.codes[0].shape == (1, 1, LATENTS)


def test_no_tokens_have_a_code_and_a_reconstruction():
    sae = make_sae()
    run = sae.hook("error").add(3, 1.0)
    for shape in ((0, WIDTH), (2, 0, WIDTH), (0, 3, WIDTH)):
        x = torch.empty(shape)
        assert sae(x).shape == run(x).shape == shape
        assert run.codes[-1].dense().shape == (*shape[:-1], LATENTS)


def test_inference_mode_and_autocast_give_usable_codes():
    network, tokens, sae = make_network("gpt2"), some_tokens(), make_sae()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):  # noqa: SIM117
        with sae.attached(network, HOOK, "error") as run:
            run.add(3, 1.0)
            network(tokens)
    assert run.codes[0].set(3, 1.0).shape == (2, 9, LATENTS)


def test_a_model_without_numbers_is_refused_in_one_line():
    with torch.device("meta"):
        network = make_network("gpt2")
    with (
        pytest.raises(ValueError, match="x must hold numbers, got a tensor on the meta device"),
        make_sae().attached(network, HOOK),
    ):
        network(some_tokens().to("meta"))
    assert hooks_of(network) == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[0.0] * WIDTH], "got list: torch.tensor makes one"),
        (torch.zeros(2, WIDTH).numpy(), "got ndarray: torch.from_numpy makes one"),
        ({"x": 1}, "got dict: name the part of it that is one, as in output.last_hidden_state"),
    ],
)
def test_what_is_no_tensor_is_refused_with_what_makes_one(given, words):
    with pytest.raises(TypeError, match=words):
        make_sae()(given)
