"""The files of a capture: rows, their columns, the parts, and their metadata."""

import json

import h5py
import numpy as np
import pytest
import torch
from captured import all_rows, capture, make_inputs, shards, write_texts
from small_models import make_network, make_tokenizer, save_model
from small_texts import expected_rows, make_texts, rows_of

from sae_fast.activations import open_shards
from sae_fast.activations.capture.plan import open_capture
from sae_fast.config.model_text import CaptureConfig


def test_every_hook_has_shards_of_the_same_rows_and_a_part_held_out(whole):
    found = shards(whole)
    names = ["heldout_00.h5", *(f"shard_0000{index}.h5" for index in range(4))]
    assert list(found) == [
        f"{hook}/{name}" for hook in ("residual.0", "residual.2") for name in names
    ]
    for name in names:
        one, other = found[f"residual.0/{name}"][0], found[f"residual.2/{name}"][0]
        assert len(one["activations"]) == (
            100 if "heldout" in name else 300 if "3" in name else 400
        )
        for column in ("token_ids", "doc_id", "position"):
            np.testing.assert_array_equal(one[column], other[column])


def test_no_document_is_in_both_parts(whole):
    train = {document for document, *_ in all_rows(whole / "residual.0")}
    heldout = {document for document, *_ in all_rows(whole / "residual.0", "heldout*")}
    assert train
    assert heldout
    assert not train & heldout


def test_stored_rows_are_the_hidden_states_of_their_sequences(inputs, whole):
    config = CaptureConfig(*inputs, layers=(0,), heldout_tokens=100, batch_size=4)
    batches = open_capture(config).batches
    expected = {}
    network = make_network("llama")
    for batch in batches.iterate():
        with torch.no_grad():
            hidden = network(batch.tokens, output_hidden_states=True).hidden_states[1]
        rows = hidden[batch.kept].half().numpy()
        expected |= dict(zip(rows_of([batch]), rows, strict=True))
    stored = all_rows(whole / "residual.0")
    assert len(stored) == 1500
    for key, row in stored.items():
        np.testing.assert_array_equal(row, expected[key])


def test_shards_and_capture_json_say_where_they_come_from(inputs, whole):
    recipe = json.loads((whole / "capture.json").read_text())
    assert recipe["model"]["name"] == inputs[0]
    assert recipe["dataset"]["documents"] == 150
    assert recipe["dataset"]["text_column"] == "text"
    assert recipe["settings"]["dtype"] == "float16"
    assert recipe["settings"]["shuffle_seed"] == 42
    assert recipe["settings"]["ctx_len"] == 32
    assert {"torch", "transformers", "datasets", "device"} <= set(recipe["made_with"])
    with h5py.File(whole / "residual.2" / "shard_00001.h5") as file:
        attributes = dict(file.attrs)
    assert attributes["hook"] == "residual.2"
    assert attributes["layer"] == 2
    assert attributes["model"] == inputs[0]
    del recipe["format_version"], recipe["made_with"]
    assert json.loads(attributes["capture"]) == recipe


def test_a_folder_is_a_set_of_shards_with_a_manifest(whole):
    folder = whole / "residual.0"
    paths = sorted(folder.glob("shard*.h5"))
    assert open_shards(paths, verify=True).rows == 1500
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["file"] for entry in manifest["shards"]] == [
        "heldout_00.h5",
        *(path.name for path in paths),
    ]


def test_without_max_tokens_everything_is_captured(inputs, tmp_path):
    more = ("--max-tokens", "None", "--heldout-tokens", "0")
    assert capture(inputs, tmp_path / "out", *more) == 0
    expected = expected_rows(make_texts(150), make_tokenizer(True), [2], [])
    assert sorted(all_rows(tmp_path / "out/residual.0")) == sorted(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_stored_in_the_type_asked_for(inputs, whole, tmp_path, dtype):
    assert capture(inputs, tmp_path / "out", "--dtype", dtype) == 0
    with h5py.File(tmp_path / "out/residual.0/shard_00000.h5") as file:
        assert file.attrs["dtype"] == dtype
        rows = torch.from_numpy(
            file["activations"][:].astype(np.int64 if dtype != "float32" else np.float32)
        )
    reference = torch.from_numpy(
        shards(whole)["residual.0/shard_00000.h5"][0]["activations"]
    ).float()
    if dtype == "bfloat16":
        rows = rows.to(torch.int16).view(torch.bfloat16).float()
    torch.testing.assert_close(rows, reference, rtol=2**-8, atol=1e-3)


def test_an_encoder_has_one_document_a_row_and_special_tokens_can_be_left_out(tmp_path):
    inputs = make_inputs(tmp_path, "bert")
    assert capture(inputs, tmp_path / "with") == 0
    assert capture(inputs, tmp_path / "without", "--exclude-special-tokens") == 0
    tokens = {token for *_, token in all_rows_encoder(tmp_path / "with")}
    assert {4, 5} <= tokens
    assert not {4, 5} & {token for *_, token in all_rows_encoder(tmp_path / "without")}


def all_rows_encoder(out):
    """Return (doc_id, position, token) of an encoder's rows; its parts share a position."""
    found = shards(out)
    return [
        row
        for name, (content, _) in found.items()
        if name.startswith("residual.0/")
        for row in zip(*(content[key] for key in ("doc_id", "position", "token_ids")), strict=True)
    ]


def test_an_overflow_of_float16_names_place_and_remedy(tmp_path, capsys):
    network = make_network("llama")
    with torch.no_grad():
        network.model.embed_tokens.weight[12] *= 1e7
    save_model(tmp_path / "big", "llama")
    network.save_pretrained(tmp_path / "big")
    inputs = [str(tmp_path / "big"), str(write_texts(tmp_path / "texts.jsonl"))]
    assert capture(inputs, tmp_path / "out", "--dtype", "float16") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "residual.0: an activation at document " in error
    assert "more than float16 holds (65,504): capture again with --dtype bfloat16 or" in error
    assert not list((tmp_path / "out").rglob("*.h5"))
    assert capture(inputs, tmp_path / "wide", "--dtype", "bfloat16") == 0


def test_activations_that_are_not_finite_are_named(tmp_path, capsys):
    network = make_network("llama")
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    save_model(tmp_path / "bad", "llama")
    network.save_pretrained(tmp_path / "bad")
    inputs = [str(tmp_path / "bad"), str(write_texts(tmp_path / "texts.jsonl"))]
    assert capture(inputs, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "residual.2: the model's activations at document " in error
    assert error.endswith("are not finite")


@pytest.mark.parametrize(("scale", "said"), [(1e7, "reaches"), (1e-7, "reach only")])
def test_a_sample_that_float16_does_not_hold_is_stored_as_bfloat16(tmp_path, caplog, scale, said):
    network = make_network("llama")
    with torch.no_grad():
        # One token with large activations, or all with small ones.
        network.model.embed_tokens.weight[12 if scale > 1 else slice(None)] *= scale
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    save_model(tmp_path / "model", "llama")
    network.save_pretrained(tmp_path / "model")
    # Only the last document has that token.
    texts = [text for text in make_texts(150) if text and "mat" not in text]
    inputs = [
        str(tmp_path / "model"),
        str(write_texts(tmp_path / "t.jsonl", [*texts, "a sat mat"])),
    ]
    more = ("--shuffle-seed", "None", "--max-tokens", "None", "--heldout-tokens", "0")
    assert capture(inputs, tmp_path / "out", *more) == 0
    (line,) = [text for text in caplog.messages if text.startswith("storing bfloat16")]
    assert said in line
    assert (
        json.loads((tmp_path / "out/capture.json").read_text())["settings"]["dtype"] == "bfloat16"
    )
    with h5py.File(tmp_path / "out/residual.0/shard_00000.h5") as file:
        assert file.attrs["dtype"] == "bfloat16"
    caplog.clear()
    assert capture(inputs, tmp_path / "out", *more) == 0  # complete: nothing is sampled again
    assert not caplog.messages
