"""Models with an encoder and a decoder: which of the two is captured, and what each reads."""

import json

import numpy as np
import pytest
import torch
from captured import all_rows, shards
from small_models import PAIRED, make_encoder_decoder, make_tokenizer
from small_texts import make_texts

from sae_fast import SAEConfig, SparseAutoencoder
from sae_fast.activations.capture import HookedModel, find_blocks, resolve_hooks
from sae_fast.activations.capture.hooks import find_stacks
from sae_fast.activations.capture.language_model import load_language_model
from sae_fast.activations.capture.probe import Source, probe_tokens
from sae_fast.activations.capture.stream_check import checked_hooks
from sae_fast.capture import main

WIDTH, ENCODER_LAYERS, DECODER_LAYERS, START = 16, 2, 3, 2  # of the small models


@pytest.fixture(params=["t5", "bart"])
def model(request, tmp_path):
    """Make a folder of a model; return the folder and the network."""
    network = make_encoder_decoder(request.param)
    network.save_pretrained(tmp_path / "model")
    make_tokenizer(False).save_pretrained(tmp_path / "model")
    return tmp_path / "model", network


@pytest.fixture
def texts(tmp_path):
    """Write pairs of texts, some of them empty; return the file and the pairs."""
    pairs = list(zip(make_texts(25), make_texts(25, seed=1), strict=True))
    lines = [json.dumps({"article": one, "summary": other}) + "\n" for one, other in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return str(tmp_path / "pairs.jsonl"), pairs


def run(folder, texts, *flags):
    options = ("--dtype", "float32", "--num-threads", "1", "--out", str(folder.parent / "out"))
    command = [str(folder), texts, "--text-column", "article", *options, *flags]
    assert main(command) == 0
    return folder.parent / "out"


def test_the_names_of_hook_points_mean_the_encoder_and_with_a_prefix_the_decoder():
    for name in PAIRED:
        network = make_encoder_decoder(name)
        encoder, decoder = find_stacks(network)
        assert len(encoder.modules) == ENCODER_LAYERS
        assert len(decoder.modules) == DECODER_LAYERS
        assert find_blocks(network) == encoder
        for prefix, count, path in (
            ("", ENCODER_LAYERS, encoder.path),
            ("decoder.", DECODER_LAYERS, decoder.path),
        ):
            for kind in ("residual", "resid_pre", "attn_out", "mlp_out", "mlp_in", "z"):
                hooks = resolve_hooks(network, (), (f"{prefix}{kind}.*",))
                assert [hook.name for hook in hooks] == [
                    f"{prefix}{kind}.{layer}" for layer in range(count)
                ]
                assert [hook.layer for hook in hooks] == [*range(count)]
                assert all(hook.module.startswith(f"{path}.") for hook in hooks)
            (inner, *_) = resolve_hooks(network, (), (f"{path}.1.*.*",))
            assert inner.layer == 1
    heads = resolve_hooks(make_encoder_decoder("bart"), (), ("z.1.*", "decoder.z.1.*"))
    assert [hook.name for hook in heads] == [
        *("z.1.0", "z.1.1"),
        *(f"decoder.z.1.{head}" for head in range(4)),
    ]


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("prefix", ["", "decoder."])
def test_attn_out_and_mlp_out_are_what_a_block_adds(name, prefix):
    network = make_encoder_decoder(name)
    names = [f"{prefix}{kind}" for kind in ("resid_pre.1", "attn_out.1", "mlp_out.1", "residual.1")]
    tokens = probe_tokens(network)
    hooks = checked_hooks(network, resolve_hooks(network, (), names), tokens)
    tokens = torch.arange(6, 14)[None]
    source = Source(tokens, torch.ones(1, 8, dtype=torch.bool)) if prefix else None
    found = HookedModel(network, hooks).activations(tokens, source=source)
    before, attention, feed_forward, after = found.values()
    if name != "bart" and not prefix:  # BART's norms and a decoder's other attention lie between
        torch.testing.assert_close(before + attention + feed_forward, after)
    assert [hook.module for hook in hooks][1:3] == {
        ("t5", ""): [f"encoder.block.1.layer.{n}" for n in ("0.SelfAttention", "1.DenseReluDense")],
        ("umt5", ""): [
            f"encoder.block.1.layer.{n}" for n in ("0.SelfAttention", "1.DenseReluDense")
        ],
        ("t5", "decoder."): [
            f"decoder.block.1.layer.{n}" for n in ("0.SelfAttention", "2.DenseReluDense")
        ],
        ("umt5", "decoder."): [
            f"decoder.block.1.layer.{n}" for n in ("0.SelfAttention", "2.DenseReluDense")
        ],
        ("bart", ""): [f"model.encoder.layers.1.{n}" for n in ("self_attn", "fc2")],
        ("bart", "decoder."): [f"model.decoder.layers.1.{n}" for n in ("self_attn", "fc2")],
    }[name, prefix]


def test_the_rows_of_an_encoder_are_its_hidden_states(model, texts):
    folder, network = model
    path, pairs = texts
    rows = all_rows(run(folder, path, "--layers", "0", "--batch-size", "4") / "residual.0")
    tokenizer, expected = make_tokenizer(False), {}
    for number, (article, _) in enumerate(pairs):
        if article and article.strip():
            tokens = tokenizer(article, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                states = network.get_encoder()(tokens, output_hidden_states=True).hidden_states
            for place, token in enumerate(tokens[0].tolist()):
                expected[number, place, token] = states[1][0, place].numpy()
    assert set(rows) == set(expected)
    for key, row in rows.items():
        np.testing.assert_allclose(row, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [(), ("--streaming", "always", "--max-tokens", "99999")])
def test_the_rows_of_a_decoder_are_of_the_text_that_it_reads(model, texts, stream):
    folder, network = model
    path, pairs = texts
    flags = ("--hook-points", "decoder.residual.1", "--target-column", "summary", *stream)
    rows = all_rows(run(folder, path, *flags, "--batch-size", "4") / "decoder.residual.1")
    tokenizer, expected = make_tokenizer(False), {}
    for number, (article, summary) in enumerate(pairs):
        if summary and summary.strip():
            source = tokenizer(article if article and article.strip() else "", return_tensors="pt")
            labels = tokenizer(summary, return_tensors="pt")["input_ids"]
            read = torch.cat([torch.tensor([[START]]), labels[:, :-1]], dim=1)
            with torch.no_grad():
                states = network(
                    **{name: source[name].long() for name in ("input_ids", "attention_mask")},
                    decoder_input_ids=read,
                    output_hidden_states=True,
                ).decoder_hidden_states
            for place, token in enumerate(read[0].tolist()):
                expected[number, place, token] = states[2][0, place].numpy()
    assert set(rows) == set(expected)
    for key, row in rows.items():
        np.testing.assert_allclose(row, expected[key], rtol=1e-4, atol=1e-5)


def test_a_long_text_of_a_decoder_is_cut_and_the_start_token_is_left_out_on_demand(model, tmp_path):
    folder, _ = model
    line = json.dumps({"article": "the cat sat " * 20, "summary": "the dog ran " * 10})
    (tmp_path / "long.jsonl").write_text(line)
    flags = ("--hook-points", "decoder.residual.0", "--target-column", "summary")
    more = ("--ctx-len", "16", "--exclude-special-tokens")
    out = run(folder, str(tmp_path / "long.jsonl"), *flags, *more)
    (rows, _) = shards(out)["decoder.residual.0/shard_00000.h5"]
    assert rows["position"].tolist() == [place for place in range(32) if place > 1]
    assert rows["token_ids"].tolist() == [7, 13, 14] * 10


def test_the_class_of_a_checkpoint_is_loaded(tmp_path):
    import transformers

    tokenizer = make_tokenizer(False)
    kinds = {
        "whole": make_encoder_decoder("t5"),
        "headless": make_encoder_decoder("t5", head=False),
        "encoder": transformers.T5EncoderModel(transformers.T5Config(**PAIRED["t5"])),
    }
    for name, network in kinds.items():
        network.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load_language_model(str(tmp_path / name))
        assert type(loaded.network) is type(network)
        assert not loaded.causal
        assert len(find_stacks(loaded.network)) == (1 if name == "encoder" else 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--hook-points", "decoder.residual.0"],
            "decoder.residual.0 is in the decoder, which reads a text of its own: name the column",
        ),
        (
            ["--layers", "0", "--target-column", "summary"],
            "target_column = 'summary' is read by a decoder beside an encoder, and residual.0 is",
        ),
        (
            ["--layers", "0", "--hook-points", "decoder.residual.1"],
            "residual.0 is in the encoder and decoder.residual.1 in the decoder",
        ),
        (["--hook-points", "shared"], "shared: it is neither in the encoder nor in the decoder"),
        (
            ["--hook-points", "decoder.residual.0", "--target-column", "summry"],
            "target_column: ",
        ),
        (
            ["--hook-points", "decoder.residual.0", "--target-column", "article"],
            "target_column = 'article' is the column that the encoder reads too",
        ),
        (
            ["--hook-points", "decoder.residual.7", "--target-column", "summary"],
            "decoder.residual.0 to decoder.residual.2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, texts, capsys, flags, message):
    make_encoder_decoder("t5").save_pretrained(tmp_path / "t5")
    make_tokenizer(False).save_pretrained(tmp_path / "t5")
    command = [str(tmp_path / "t5"), texts[0], "--text-column", "article"]
    assert main([*command, *flags, "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_losses_through_an_encoder_and_a_decoder_are_refused(tmp_path, texts, capsys):
    from sae_fast import train

    make_encoder_decoder("t5").save_pretrained(tmp_path / "t5")
    make_tokenizer(False).save_pretrained(tmp_path / "t5")
    flags = ["--loss-fn", "ce", "--heldout-tokens", "0", "--k", "2", "--save-dir", str(tmp_path)]
    command = [str(tmp_path / "t5"), texts[0], "--text-column", "article", "--layers", "0"]
    assert train.main([*command, *flags]) == 2
    assert "T5ForConditionalGeneration has an encoder and a decoder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_dictionaries_are_attached_to_both_parts_while_the_model_generates(name):
    # The cache of T5 in transformers has as many layers as the encoder.
    network = make_encoder_decoder(
        name, **({"num_decoder_layers": ENCODER_LAYERS} if name == "t5" else {})
    )
    sae = SparseAutoencoder(SAEConfig(d_in=WIDTH, d_sae=32, k=4))
    tokens = torch.arange(6, 12)[None].repeat(2, 1)
    with torch.no_grad():
        wanted = network.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        with (
            sae.attached(network, "residual.1", "error") as encoder,
            sae.attached(network, "decoder.residual.1", "error") as decoder,
        ):
            found = network.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(found, wanted)
    assert [tuple(code.shape[:2]) for code in encoder.codes] == [(2, 6)]
    assert decoder.calls == 5
