"""An autoencoder inside a transformers model: what it changes, records and leaves behind."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
from small_models import VOCABULARY, make_network, make_tokenizer, save_model

from sae_fast import SAEConfig, SparseAutoencoder
from sae_fast.activations.capture import find_blocks

WIDTH, LATENTS = 16, 48
HOOK = "residual.1"


def make_sae(seed=0, **settings):
    """Make an autoencoder whose code is in other units than the activations."""
    torch.manual_seed(seed)
    chosen = {"d_in": WIDTH, "d_sae": LATENTS, "k": 4, "normalize_activations": "mean_scale"}
    sae = SparseAutoencoder(SAEConfig(**chosen | settings))
    sae.set_normalization_(0.1 * torch.randn(sae.config.d_in), 0.37)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
    if sae.config.transcoder:
        sae.set_target_normalization_(0.1 * torch.randn(sae.config.d_out), 0.8)
    return sae.requires_grad_(False).eval()


def some_tokens(batch=2, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, len(VOCABULARY), (batch, length), generator=generator)


def logits(network, tokens, **more):
    with torch.no_grad():
        return network(input_ids=tokens, **more).logits


def with_hook(network, path, change, tokens, **more):
    """Return logits with a function of the output of a module in its place, by an ordinary hook."""

    def behind(_module, _args, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = network.get_submodule(path).register_forward_hook(behind)
    try:
        return logits(network, tokens, **more)
    finally:
        handle.remove()


def hooks_of(network):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()
    )


# ---- what is changed -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["error", "observe"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_edits_the_output_keeps_its_bits(mode, name, dtype):
    network, tokens = make_network(name).to(dtype), some_tokens()
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    clean = logits(network, tokens, attention_mask=mask)
    for hook in (HOOK, "resid_pre.1", "mlp_out.1", "z.1"):
        with make_sae().attached(network, hook, mode) as run:
            assert torch.equal(logits(network, tokens, attention_mask=mask), clean), hook
        assert run.calls == 1
        assert run.codes[0].shape == (2, 9, LATENTS)
        assert not run.codes[0].dense()[1, :4].any()
    assert hooks_of(network) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replacing_is_an_ordinary_hook_with_the_reconstruction(dtype):
    network, tokens, sae = make_network("llama").to(dtype), some_tokens(), make_sae()
    wanted = with_hook(network, "model.layers.1", lambda x: sae(x).to(dtype), tokens)
    with sae.attached(network, HOOK) as run:
        found = logits(network, tokens)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        x = network(tokens, output_hidden_states=True).hidden_states[2]
    raw = sae.encode(x, units="raw")
    torch.testing.assert_close(run.codes[0].dense(), raw.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dictionary_of_another_dtype_does_what_it_does_in_float32(dtype):
    network, tokens, sae = make_network("llama"), some_tokens(), make_sae()
    other = copy.deepcopy(sae).to(dtype)
    found = []
    for each in (sae, other):
        with each.attached(network, HOOK) as run:
            run.add(3, 2.0).scale(range(10), 0.5)
            found.append(logits(network, tokens))
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[1], found[0], atol=rounding, rtol=rounding)


def test_a_model_of_pictures_has_positions_too():
    import transformers

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=32, image_size=16, patch_size=8)
    network, pictures = transformers.ViTModel(config).eval(), torch.randn(2, 3, 16, 16)

    def states():
        seen = []
        block = find_blocks(network).modules[2]
        handle = block.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        with torch.no_grad():
            network(pictures)
        handle.remove()
        return seen[0]

    sae, clean = make_sae(), states()
    with sae.attached(network, HOOK, "error") as run:
        run.add(3, 2.0, positions=0)
        found = states()
    assert run.codes[0].shape == (2, 5, LATENTS)
    torch.testing.assert_close(found[:, 0], clean[:, 0] + 2.0 * sae.W_dec[3])
    assert torch.equal(found[:, 1:], clean[:, 1:])


def test_padding_is_left_as_it_is():
    network, tokens, sae = make_network("gpt2"), some_tokens(), make_sae()
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0

    def change(x):
        return torch.where(mask.bool()[..., None], sae(x), x)

    wanted = with_hook(network, "transformer.h.1", change, tokens, attention_mask=mask)
    with sae.attached(network, HOOK) as run:
        found = logits(network, tokens, attention_mask=mask)
    torch.testing.assert_close(found, wanted)
    assert run.codes[0].l0()[1].tolist() == [4] * 6 + [0] * 3


def plain_edit(f, steps):
    """Return a dense code [N, F] after edits, one after another, in float64."""
    f = f.clone()
    for name, latents, numbers in steps:
        own = f[:, latents]
        if name == "add":
            own = own + numbers[0]
        elif name == "set":
            own = torch.full_like(own, numbers[0])
        elif name == "scale":
            own = own * numbers[0]
        elif name == "clamp":
            own = own.clamp(*numbers)
        else:
            own = torch.zeros_like(own)
        f[:, latents] = own
    return f


EDITS = [
    [("add", [3], (0.7,))],
    [("set", [0, 5, 9], (1.5,))],
    [("scale", [1, 2, 3, 4], (-2.0,))],
    [("clamp", list(range(20)), (0.25, 0.5))],
    [("clamp", list(range(20)), (0.0, 0.3))],
    [("ablate", list(range(30)), ())],
    [("scale", [7, 8], (3.0,)), ("add", [8, 9], (0.5,)), ("ablate", [9], ()), ("add", [9], (1.0,))],
]


@pytest.mark.parametrize("steps", EDITS, ids=lambda steps: "-".join(step[0] for step in steps))
@pytest.mark.parametrize("mode", ["error", "replace"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"arch": "relu", "k": None},
        {"arch": "jumprelu", "k": None},
        {"arch": "batch_topk"},
        {"activation": "abs_topk"},
    ],
    ids=lambda settings: "_".join(str(value) for value in settings.values()) or "topk",
)
def test_edits_are_edits_of_the_dense_code(steps, mode, settings):
    sae, x = make_sae(**settings), torch.randn(3, 7, WIDTH)
    run = sae.hook(mode)
    for name, latents, numbers in steps:
        getattr(run, name)(latents, *numbers)
    found = run(x)
    f = sae.encode(x, units="raw").dense().double().flatten(0, 1)
    W = sae.W_dec.double()
    constant = sae.b_dec.double() / sae.activation_scale.double() + sae.activation_mean.double()
    before, after = f @ W + constant, plain_edit(f, steps) @ W + constant
    rows = x.double().flatten(0, 1)
    wanted = after if mode == "replace" else rows + after - before
    torch.testing.assert_close(found.flatten(0, 1).double(), wanted, atol=2e-5, rtol=1e-5)


def test_an_edit_that_changes_nothing_keeps_the_bits_of_a_token():
    sae, x = make_sae(), torch.randn(5, WIDTH)
    code = sae.encode(x, units="raw").dense()
    silent = int((code == 0).all(0).nonzero()[0])
    run = sae.hook("error").ablate(silent).clamp(silent, maximum=2.0).set(silent, 0.0)
    assert torch.equal(run(x), x)
    assert torch.equal(sae.hook("error").scale(range(LATENTS), 1.0)(x), x)


def test_latents_are_a_mask_and_numbers_are_one_for_each():
    sae, x = make_sae(), torch.randn(5, WIDTH)
    mask = torch.zeros(LATENTS, dtype=torch.bool)
    mask[[4, 7]] = True
    one = sae.hook("error").add(mask, torch.tensor([1.0, -2.0]))(x)
    other = x + sae.W_dec[4] - 2 * sae.W_dec[7]
    torch.testing.assert_close(one, other)
    run = sae.hook("error").add(4, 1.0)
    assert torch.equal(run.reset()(x), x)


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (2, [2]),
        ([0, 3], [0, 3]),
        (slice(4, None), [4, 5, 6]),
        (slice(1, 6, 2), [1, 3, 5]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_positions_choose_tokens(positions, chosen):
    sae, x = make_sae(), torch.randn(2, 7, WIDTH)
    found = sae.hook("error").add(5, 3.0, positions=positions)(x)
    wanted = x.clone()
    wanted[:, chosen] += 3.0 * sae.W_dec[5]
    torch.testing.assert_close(found, wanted)


def test_a_mask_of_positions_is_one_for_each_sequence():
    sae, x = make_sae(), torch.randn(2, 3, WIDTH)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    found = sae.hook("error").add(5, 3.0, positions=mask)(x)
    torch.testing.assert_close(found, x + 3.0 * mask[..., None] * sae.W_dec[5])


# ---- generating ------------------------------------------------------------------------------


def generated(network, tokens, use_cache, **more):
    return network.generate(
        tokens,
        max_new_tokens=5,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_and_without_a_cache_is_edited_alike(name):
    network, tokens, sae = make_network(name), some_tokens(), make_sae()
    results = {}
    for use_cache in (True, False):
        with sae.attached(network, HOOK, "error") as run:
            run.add(3, 4.0, positions=slice(7, 11)).add(5, 4.0, positions=2)
            results[use_cache] = generated(network, tokens, use_cache)
        assert run.calls == 5
        lengths = [code.shape[1] for code in run.codes]
        assert lengths == ([9, 1, 1, 1, 1] if use_cache else [9, 10, 11, 12, 13])
    assert torch.equal(results[True].sequences, results[False].sequences)
    for one, other in zip(results[True].logits, results[False].logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    clean = generated(network, tokens, True)
    assert not torch.allclose(clean.logits[0], results[True].logits[0], atol=1e-3)


def test_a_padded_prompt_is_continued_as_without_padding():
    network, tokens, sae = make_network("llama"), some_tokens(), make_sae()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), tokens], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, 12)
    with sae.attached(network, HOOK) as run:
        one = generated(network, tokens, True)
        other = generated(network, padded, True, attention_mask=mask)
    assert torch.equal(one.sequences, other.sequences[:, 3:])
    assert run.codes[5].l0()[:, :3].sum() == 0
    assert [int(code.l0().min()) for code in run.codes[6:]] == [4] * 4


# ---- several at once -------------------------------------------------------------------------


def test_dictionaries_at_several_places_act_together():
    network, tokens = make_network("llama"), some_tokens()
    first, second = make_sae(1), make_sae(2)
    block = network.model.layers[2]
    handle = block.register_forward_hook(
        lambda _m, _a, output: second(output).as_subclass(torch.Tensor)
    )
    wanted = with_hook(
        network, "model.layers.0", lambda x: first(x).as_subclass(torch.Tensor), tokens
    )
    handle.remove()
    with (
        first.attached(network, "residual.0") as one,
        second.attached(network, "residual.2") as other,
    ):
        found = logits(network, tokens)
    torch.testing.assert_close(found, wanted)
    assert (one.calls, other.calls) == (1, 1)


def test_at_one_place_they_act_in_the_order_in_which_they_were_attached():
    network, tokens = make_network("llama"), some_tokens()
    first, second = make_sae(1), make_sae(2)
    wanted = with_hook(network, "model.layers.1", lambda x: second(first(x)).clone(), tokens)
    with first.attached(network, HOOK), second.attached(network, HOOK):
        found = logits(network, tokens)
    torch.testing.assert_close(found, wanted)


def test_finding_a_place_runs_no_dictionary_that_is_attached_already():
    network = make_network("gemma2")  # whose mlp_out is found by running it
    with make_sae().attached(network, HOOK) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with make_sae().attached(network, "mlp_out.1"):
            assert run.calls == 0
        logits(network, some_tokens())
    assert run.calls == 1


# ---- transcoders -----------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "opt"])
def test_a_transcoder_reads_at_one_place_and_writes_at_another(name, skip):
    network, tokens = make_network(name), some_tokens()
    sae = make_sae(transcoder=True, d_out=WIDTH, skip_connection=skip)
    if skip:
        sae.W_skip.normal_(0, 0.3)
    clean = logits(network, tokens)
    with sae.attached(network, "mlp_in.1", "error", target_hook="mlp_out.1") as run:
        assert torch.equal(logits(network, tokens), clean)
        run.add(3, 2.0)
        found = logits(network, tokens)
    path = {
        "gemma2": "model.layers.1.post_feedforward_layernorm",
        "opt": "model.decoder.layers.1.fc2",
    }
    wanted = with_hook(network, path[name], lambda y: y + 2.0 * sae.W_dec[3], tokens)
    torch.testing.assert_close(found, wanted)

    read = {"gemma2": "model.layers.1.mlp", "opt": "model.decoder.layers.1.fc1"}[name]
    seen = []
    module = network.get_submodule(read)
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    wanted = with_hook(network, path[name], lambda y: sae(seen[-1]).clone(), tokens)
    handle.remove()
    with sae.attached(network, "mlp_in.1", target_hook="mlp_out.1"):
        found = logits(network, tokens)
    torch.testing.assert_close(found, wanted)


def test_places_are_known_from_the_origin():
    network = make_network("gpt2")
    sae = make_sae()
    sae.origin = {"model": "gpt2", "hook": "residual.2"}
    with sae.attached(network) as run:
        logits(network, some_tokens())
    assert run.calls == 1
    transcoder = make_sae(transcoder=True, d_out=WIDTH)
    transcoder.origin = {"hook": "mlp_in.1", "targets": {"hook": "mlp_out.1"}}
    with transcoder.attached(network) as run:
        logits(network, some_tokens())
    assert run.calls == 1


def test_model_of_another_name_is_refused_or_warned_of():
    network, sae = make_network("gpt2"), make_sae()
    sae.origin = {"model": "gpt2-small", "hook": "residual.2"}  # as TransformerLens names it
    network.config.name_or_path = "openai-community/gpt2"
    with sae.attached(network) as run:
        logits(network, some_tokens())
    assert run.calls == 1
    network.config.name_or_path = "gpt2-finetuned"
    message = "the autoencoder is of model 'gpt2-small', this one is 'gpt2-finetuned'"
    with pytest.raises(ValueError, match=f"{message}: name the hook point"), sae.attached(network):
        pass
    with pytest.warns(UserWarning, match=message) as warned, sae.attached(network, "residual.2"):
        logits(network, some_tokens())
    assert warned[0].filename == __file__


# ---- gradients -------------------------------------------------------------------------------


def metric_of(output):
    return output.logits[:, -1, 8].sum() - output.logits[:, 3, 9].sum().square()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["error", "replace"])
@pytest.mark.parametrize("edits", [False, True])
def test_gradients_of_a_code_are_finite_differences(mode, edits):
    network, tokens = make_network("gpt2").double(), some_tokens(1, 6)
    upstream, downstream = make_sae(1).double(), make_sae(2).double()

    def value(latent=None, position=None, step=0.0):
        with (
            torch.no_grad(),
            upstream.attached(network, "residual.0", mode) as run,
            downstream.attached(network, "residual.1", "error"),
        ):
            if latent is not None:
                run.add(latent, step, positions=position)
            if edits:
                run.scale(latent, 1.5).scale(list(range(0, LATENTS, 3)), 0.5)
            return float(metric_of(network(tokens)))

    with (
        upstream.attached(network, "residual.0", mode, gradients=True) as run,
        downstream.attached(network, "residual.1", "error"),
    ):
        output = network(tokens)
        code = run.codes[0]
        tried = [(t, int(code.indices[t, e])) for t in range(6) for e in (0, 2)]
        if edits:  # the edits need the latents before the pass
            run.clear()
    for position, latent in tried:
        if edits:
            with (
                upstream.attached(network, "residual.0", mode, gradients=True) as run,
                downstream.attached(network, "residual.1", "error"),
            ):
                run.scale(latent, 1.5).scale(list(range(0, LATENTS, 3)), 0.5)
                output = network(tokens)
        metric = metric_of(output)
        gradient = float(run.gradient(metric).dense()[0, position, latent])
        step = 1e-5
        ends = [value(latent, position, sign * step) for sign in (1, -1)]
        assert gradient == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-9)
        effect = float(run.attribution(metric).dense()[0, position, latent])
        active = float(code.dense()[0, position, latent])
        assert effect == pytest.approx(gradient * active, rel=1e-9)


def test_attribution_in_one_call_is_the_one_of_a_run():
    network, tokens, sae = make_network("llama"), some_tokens(), make_sae()
    one = sae.attribution(metric_of, network, tokens, HOOK)
    with sae.attached(network, HOOK, "error", gradients=True) as run:
        other = run.attribution(metric_of(network(tokens)))
    assert one.shape == (2, 9, LATENTS)
    assert torch.equal(one.dense(), other.dense())
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(sae.attribution(metric_of, network, given, HOOK).dense(), one.dense())
    assert one.dense().abs().sum() > 0


def patched_case(**settings):
    network, sae = make_network("gpt2").double(), make_sae(1, **settings).double()
    inputs, other = some_tokens(1, 6), some_tokens(1, 6, seed=7)
    with sae.attached(network, "residual.0", "observe") as run, torch.no_grad():
        network(inputs)
        network(other)
    return network, sae, inputs, other, [code.dense() for code in run.codes]


def with_dense_code(network, sae, inputs, clean, dense):
    """Return the metric of a model in which a dense code takes the place of the clean one."""

    def behind(_module, _args, output):
        added = (dense - clean) @ sae.W_dec
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    handle = network.get_submodule("transformer.h.0").register_forward_hook(behind)
    try:
        with torch.no_grad():
            return float(metric_of(network(inputs)))
    finally:
        handle.remove()


@pytest.mark.parametrize("settings", [{}, {"arch": "relu", "k": None}], ids=["topk", "relu"])
def test_effects_of_a_patch_are_finite_differences(settings):
    network, sae, inputs, other, (clean, ends) = patched_case(**settings)
    effects = sae.attribution(metric_of, network, inputs, "residual.0", patched=other).dense()
    only_patched = ((clean == 0) & (ends != 0)).nonzero()[:6].tolist()
    in_both = ((clean != 0) & (ends != 0)).nonzero()[:6].tolist()
    only_clean = ((clean != 0) & (ends == 0)).nonzero()[:6].tolist()
    if not settings:  # the bias decides here which latents of relu are active
        assert only_patched
        assert only_clean
    assert in_both
    for place in map(tuple, only_patched + in_both + only_clean):
        values = []
        for step in (1e-5, -1e-5):
            moved = clean.clone()
            moved[place] += step * (clean - ends)[place]
            values.append(with_dense_code(network, sae, inputs, clean, moved))
        wanted = (values[0] - values[1]) / 2e-5
        assert float(effects[place]) == pytest.approx(wanted, rel=1e-5, abs=1e-8)
    assert not effects[(clean == 0) & (ends == 0)].any()


@pytest.mark.parametrize("has_other", [False, True])
def test_integrated_gradients_add_up_to_what_the_whole_change_does(has_other):
    network, sae, inputs, other, (clean, ends) = patched_case()
    given = {"patched": other} if has_other else {}
    ends = ends if has_other else torch.zeros_like(clean)
    lost = with_dense_code(network, sae, inputs, clean, clean)
    lost -= with_dense_code(network, sae, inputs, clean, ends)
    errors = []
    for steps in (None, 1, 48):
        effects = sae.attribution(metric_of, network, inputs, "residual.0", steps=steps, **given)
        assert effects.shape == (1, 6, LATENTS)
        errors.append(abs(float(effects.dense().sum()) - lost))
    assert errors[2] < 1e-2 * abs(lost)
    assert errors[2] < 0.1 * max(errors[:2])


def test_a_patch_gives_the_values_of_the_other_inputs():
    network, sae, inputs, other, (clean, ends) = patched_case()
    with sae.attached(network, "residual.0", "observe") as run:
        logits(network, other)
    code = run.codes[0]
    for share in (1.0, 0.25):
        between = torch.lerp(clean, ends, share)
        wanted = with_dense_code(network, sae, inputs, clean, between)
        with sae.attached(network, "residual.0", "error") as run, torch.no_grad():
            run.patch(code, share)
            found = float(metric_of(network(inputs)))
        assert found == pytest.approx(wanted)
    with sae.attached(network, "residual.0", "error") as run:
        run.patch(code).reset()
        found = logits(network, inputs)
    assert torch.equal(found, logits(network, inputs))
    padded = {"input_ids": inputs, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    effects = sae.attribution(metric_of, network, padded, "residual.0", patched=other)
    assert not effects.dense()[0, :2].any()


def test_a_patch_that_does_not_fit_is_refused_in_one_line():
    network, sae, inputs, _, _ = patched_case()
    with pytest.raises(ValueError, match=r"patch: .* shape of the pass, \(1, 6, 48\), got \(1, 5"):
        sae.attribution(metric_of, network, inputs, HOOK, patched=some_tokens(1, 5))
    with pytest.raises(ValueError, match="steps must be a whole number from 1, got 0"):
        sae.attribution(metric_of, network, inputs, HOOK, steps=0)
    with pytest.raises(TypeError, match="metric must be a tensor, got float"):
        sae.attribution(lambda output: 1.0, network, inputs, HOOK)
    run, code = sae.hook("error"), sae.encode(torch.randn(1, 6, WIDTH, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be in raw units, got normalized"):
        run.patch(code)(torch.randn(1, 6, WIDTH, dtype=torch.float64))
    with pytest.raises(ValueError, match="share must be from 0 to 1, got 2"):
        run.patch(code, 2)
    with pytest.raises(TypeError, match="code must be a code, as in codes, got Tensor"):
        run.patch(code.dense())
    with pytest.raises(ValueError, match="a patch needs mode error or replace"):
        sae.hook("observe").patch(code)


def test_attribution_asked_for_without_what_it_needs_is_refused():
    network, tokens, sae = make_network("llama"), some_tokens(), make_sae()
    with sae.attached(network, HOOK, "error") as run:
        metric = metric_of(network(tokens))
    with pytest.raises(ValueError, match=r"^gradients of codes are recorded with gradients=True"):
        run.attribution(metric)
    with sae.attached(network, HOOK, "error", gradients=True) as run:
        network(tokens)
        output = network(tokens)
    with pytest.raises(ValueError, match=r"there were 2: call clear\(\) before the pass"):
        run.attribution(metric_of(output))
    with sae.attached(network, "residual.2", "error", gradients=True) as run:
        hidden = network(tokens, output_hidden_states=True).hidden_states[1]
    with pytest.raises(ValueError, match="does not depend on the code"):
        run.attribution(hidden.sum())
    with pytest.raises(ValueError, match=r"metric must be 0-d .* got shape \(2,\)"):
        run.attribution(torch.zeros(2))


# ---- left behind, refused, warned of -----------------------------------------------------------


def test_an_error_leaves_nothing_behind():
    network, tokens, sae = make_network("gpt2"), some_tokens(), make_sae()
    clean = logits(network, tokens)

    def fail(*_):
        raise RuntimeError("planted")

    handle = network.transformer.h[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"), sae.attached(network, HOOK):
        logits(network, tokens)
    handle.remove()
    assert hooks_of(network) == 0
    assert torch.equal(logits(network, tokens), clean)
    with sae.attached(network, HOOK) as run:
        with pytest.raises(IndexError):
            run.add(LATENTS, 1.0)
        logits(network, tokens)
    assert hooks_of(network) == 0


def test_a_place_that_never_runs_is_warned_of():
    network = make_network("gpt2")
    with (
        pytest.warns(UserWarning, match=r"^residual.1 of GPT2LMHeadModel never ran") as caught,
        make_sae().attached(network, HOOK),
    ):
        pass
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hook": "residual.7"}, "GPT2LMHeadModel has no 'residual.7'"),
        ({"hook": "residual.*"}, r"'residual\.\*' means 3 hook points"),
        ({"hook": HOOK, "mode": "swap"}, "mode must be one of replace, error, observe, got 'swap'"),
        ({}, "hook must be given, such as residual.3"),
        ({"hook": HOOK, "target_hook": "mlp_out.1"}, "target_hook belongs to a transcoder"),
        (
            {"hook": HOOK, "mode": "observe", "gradients": True},
            "gradients of codes need mode error or replace",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message):
    with (
        pytest.raises(ValueError, match=message) as caught,
        make_sae().attached(make_network("gpt2"), **arguments),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_said_where_it_is_met():
    network, tokens = make_network("gpt2"), some_tokens()
    with (
        pytest.raises(ValueError, match=r"d_in 16, the activations here have 64 columns"),
        make_sae().attached(network, "transformer.h.1.mlp.c_fc"),
    ):
        logits(network, tokens)
    transcoder = make_sae(transcoder=True, d_out=8)
    with (
        pytest.raises(ValueError, match=r"d_out 8, the activations at mlp_out.1 have 16"),
        transcoder.attached(network, "mlp_in.1", target_hook="mlp_out.1"),
    ):
        logits(network, tokens)
    with (
        pytest.raises(ValueError, match=r"comes to mlp_out.0 before mlp_in.1"),
        make_sae(transcoder=True, d_out=16).attached(network, "mlp_in.1", target_hook="mlp_out.0"),
    ):
        logits(network, tokens)
    with (
        pytest.raises(TypeError, match="model must be a model in memory, got str"),
        make_sae().attached("gpt2", HOOK),
    ):
        pass
    assert hooks_of(network) == 0
    run = make_sae().hook("observe")
    with pytest.raises(ValueError, match="edits need mode error or replace, got observe"):
        run.add(3, 1.0)
    with pytest.raises(ValueError, match="positions must be whole numbers from 0"):
        make_sae().hook().add(3, 1.0, positions=-1)
    with pytest.raises(ValueError, match="value must be one number, or one for each of 2 latents"):
        make_sae().hook().add([3, 4], torch.ones(3))
    with pytest.raises(ValueError, match="use attached, not hook"):
        transcoder.hook()


def test_threads_have_passes_of_their_own():
    network, sae = make_network("gpt2"), make_sae()
    transcoder = make_sae(transcoder=True, d_out=WIDTH)
    inputs = []
    for number in (1, 2):
        tokens = some_tokens(2, 4 + number, seed=number)
        mask = torch.ones_like(tokens)
        mask[0, :number] = 0
        inputs.append((tokens, mask))
    together = threading.Barrier(2, timeout=60)
    waits = False

    def meet(*_):  # both threads have begun their passes before one goes on
        if waits:
            together.wait()

    handle = network.transformer.h[0].register_forward_hook(meet)
    with (
        sae.attached(network, HOOK),
        transcoder.attached(network, "mlp_in.2", target_hook="mlp_out.2"),
    ):
        wanted = [logits(network, tokens, attention_mask=mask) for tokens, mask in inputs]
        waits = True
        with ThreadPoolExecutor(2) as pool:
            found = list(
                pool.map(lambda one: logits(network, one[0], attention_mask=one[1]), inputs)
            )
    handle.remove()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_compiled_model_is_edited_as_the_model_is():
    network, tokens, sae = make_network("gpt2"), some_tokens(), make_sae()
    with sae.attached(network, HOOK, "error") as run:
        run.add(3, 1.0)
        wanted = logits(network, tokens)
    compiled = torch.compile(network, backend="eager")
    with sae.attached(compiled, HOOK, "error") as run:
        run.add(3, 1.0)
        found = logits(compiled, tokens)
    torch.testing.assert_close(found, wanted)
    assert run.calls == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda sae, run: run.add(3, None), TypeError, "value must be a number or a tensor"),
        (lambda sae, run: run.scale(3, "a"), TypeError, "factor must be a number or a tensor"),
        (lambda sae, run: run.clamp(3, 2.0, 1.0), ValueError, "minimum must be at most maximum"),
        (lambda sae, run: run.add(3, 1.0, positions="a"), ValueError, "positions must be whole"),
        (lambda sae, run: run.add(3, 1.0, positions=True), ValueError, "positions must be whole"),
        (lambda sae, run: run(None), TypeError, "activations must be a tensor, got NoneType"),
        (lambda sae, run: run(torch.tensor(1.0)), ValueError, "d_in 16, .* have 0 columns"),
        (lambda sae, run: sae(torch.zeros(1, 16) * 1j), TypeError, "x must be real numbers"),
        (lambda sae, run: sae.direction(-1), IndexError, "latent must be 0 to 47, got -1"),
        (lambda sae, run: sae.direction(48), IndexError, "latent must be 0 to 47, got 48"),
        (
            lambda sae, run: sae.encode(torch.zeros(1, 16)).set(3, [1.0]),
            TypeError,
            "value must be a number or a tensor, got list",
        ),
    ],
)
def test_what_is_no_number_or_no_tensor_is_refused_in_one_line(call, error, message):
    sae = make_sae()
    with pytest.raises(error, match=message) as caught:
        call(sae, sae.hook("error"))
    assert "\n" not in str(caught.value)


def test_a_list_of_truth_values_is_a_mask_of_positions():
    sae, x = make_sae(), torch.randn(2, 3, WIDTH)
    found = sae.hook("error").add(5, 3.0, positions=[False, True, False])(x)
    wanted = sae.hook("error").add(5, 3.0, positions=1)(x)
    assert torch.equal(found, wanted)


# ---- as a function -----------------------------------------------------------------------------


def test_a_hook_is_called_as_torch_and_transformer_lens_call_it():
    network, tokens, sae = make_network("gpt2"), some_tokens(), make_sae()
    with sae.attached(network, HOOK) as run:
        run.add(3, 1.0)
        wanted = logits(network, tokens)
    hook = sae.hook().add(3, 1.0)
    handle = network.transformer.h[1].register_forward_hook(hook)
    assert torch.equal(logits(network, tokens), wanted)
    handle.remove()
    handle = network.transformer.h[2].register_forward_pre_hook(hook)
    torch.testing.assert_close(logits(network, tokens), wanted)
    handle.remove()
    assert hook.calls == 2
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(hook(x, hook=object()), hook(x))
    heads = x.unflatten(-1, (4, 4))
    assert torch.equal(hook(heads, hook=object()).flatten(-2), hook(x))
    watch = sae.hook("observe")
    assert watch(x, hook=object()) is x
    assert len(watch.codes) == 1


def make_lens_model(lens, folder):
    """Make a small model of TransformerLens: of version 4 round one of transformers."""
    if int(version("transformer-lens").partition(".")[0]) < 4:
        sizes = {"n_layers": 2, "d_model": WIDTH, "n_ctx": 16, "d_head": 8, "n_heads": 2}
        return lens.HookedTransformer(
            lens.HookedTransformerConfig(**sizes, d_vocab=20, act_fn="gelu", seed=0, device="cpu")
        )
    from transformers import AutoTokenizer

    save_model(folder, "gpt2")
    return lens.TransformerBridge.boot_transformers(
        str(folder),
        hf_model=make_network("gpt2"),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformer_lens_runs_with_a_hook(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lens = pytest.importorskip("transformer_lens")
    model, sae = make_lens_model(lens, tmp_path), make_sae()
    tokens = some_tokens()
    clean = model(tokens)
    name = "blocks.1.hook_resid_post"
    watch = sae.hook("observe")
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, watch)]), clean)
    _, cache = model.run_with_cache(tokens)
    assert torch.equal(watch.codes[0].dense(), sae.encode(cache[name], units="raw").dense())
    steer = sae.hook("error").add(3, 2.0)
    found = model.run_with_hooks(tokens, fwd_hooks=[(name, steer)])

    def plain(x, hook):
        return x + 2.0 * sae.W_dec[3]

    torch.testing.assert_close(found, model.run_with_hooks(tokens, fwd_hooks=[(name, plain)]))
    assert not torch.allclose(found, clean)
    heads = sae.hook()  # of z [B, T, 2, 8]
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", heads)])
    assert heads.codes[0].shape == (2, 9, LATENTS)
    if type(model).__name__ == "HookedTransformer":
        with sae.attached(model, name, "error") as run:
            run.add(3, 2.0)
            torch.testing.assert_close(model(tokens), found)


def test_nnsight_runs_with_a_hook():
    nnsight = pytest.importorskip("nnsight")
    network, tokens, sae = make_network("gpt2"), some_tokens(), make_sae()
    with sae.attached(network, HOOK, "error") as run:
        run.add(3, 2.0)
        wanted = logits(network, tokens)
    model = nnsight.NNsight(network)
    steer = sae.hook("error").add(3, 2.0)
    with model.trace(tokens):
        block = model.transformer.h[1]
        output = block.output
        if isinstance(output, tuple):
            block.output = (steer(output[0]), *output[1:])
        else:
            block.output = steer(output)
        found = model.output.logits.save()
    torch.testing.assert_close(found, wanted)
    assert steer.calls == 1


def test_weights_that_are_fetched_for_each_module_are_no_hindrance():
    accelerate = pytest.importorskip("accelerate")
    network, tokens, sae = make_network("llama"), some_tokens(), make_sae()
    with sae.attached(network, "mlp_out.1", "replace") as run:
        wanted = logits(network, tokens)
    accelerate.cpu_offload(network, execution_device="cpu")
    assert next(network.model.layers[1].parameters()).is_meta
    with sae.attached(network, "mlp_out.1", "replace") as run:
        torch.testing.assert_close(logits(network, tokens), wanted)
    assert run.calls == 1


def test_the_tokenizer_of_a_model_pads_and_the_masks_are_read():
    network, sae, tokenizer = make_network("bert"), make_sae(), make_tokenizer(False)
    batch = tokenizer(["the cat sat", "the dog ran far away ."], padding=True, return_tensors="pt")
    with sae.attached(network, HOOK) as run, torch.no_grad():
        network(**batch)
    assert torch.equal(run.codes[0].l0() > 0, batch["attention_mask"].bool())
