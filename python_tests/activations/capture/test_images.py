"""Images: the patches of a model that reads images are the rows, and images are the documents."""

import json

import numpy as np
import pytest
import torch
from captured import all_rows, assert_same_shards, shards
from small_models import SEEING, make_image_model, save_image_model, save_model

from sae_fast import SAEConfig, SparseAutoencoder
from sae_fast.activations.capture import HookedModel, load_documents, resolve_hooks
from sae_fast.activations.capture.documents import Kind
from sae_fast.activations.capture.image_model import load_image_model
from sae_fast.activations.capture.stream_check import checked_hooks, find_hook
from sae_fast.capture import main

Image = pytest.importorskip("PIL.Image")
COUNT = 7
OTHER_TOKENS = {"siglip": [], "dinov2_with_registers": [1, 2, 2]}  # in the column token_ids


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write images of different sizes and kinds; return their folder."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image = image.convert(("RGB", "L", "RGBA", "P")[number % 4])
        image.save(folder / f"{number}.png")
    return folder


def run(model, images, out, *flags):
    fixed = ("--dtype", "float32", "--num-threads", "1", "--shuffle-seed", "None")
    return main([str(model), str(images), *fixed, *flags, "--out", str(out)])


def states_of(network, processor, folder, number):
    """Return the hidden states of an image by the model itself."""
    with Image.open(folder / f"{number}.png") as image:
        pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    part = network.vision_model if hasattr(network, "vision_model") else network
    with torch.no_grad():
        return part(pixel_values=pixels, output_hidden_states=True).hidden_states


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEING)
def test_the_rows_of_an_image_are_its_hidden_states(name, photos, tmp_path):
    network, processor = make_image_model(name)
    folder = save_image_model(tmp_path / name, name)
    flags = ("--layers", "1", "--batch-size", "3", "--exclude-special-tokens", "false")
    assert run(folder, photos, tmp_path / "all", *flags) == 0
    others = OTHER_TOKENS.get(name, [1])
    rows = all_rows(tmp_path / "all" / "residual.1")
    for number in range(COUNT):
        expected = states_of(network, processor, photos, number)[2][0].numpy()
        for place, kind in enumerate([*others, *[0] * 16]):
            row = rows.pop((number, place, kind))
            np.testing.assert_allclose(row, expected[place], rtol=1e-4, atol=1e-5)
    assert not rows
    assert run(folder, photos, tmp_path / "patches", "--layers", "1") == 0
    kept = all_rows(tmp_path / "patches" / "residual.1")
    assert sorted(kept) == [
        (number, place + len(others), 0) for number in range(COUNT) for place in range(16)
    ]


@pytest.mark.parametrize("name", ["clip_vision_model", "dinov2", "vit"])
def test_attn_out_and_mlp_out_are_what_a_block_adds_to_the_stream_of_images(name):
    network, _ = make_image_model(name)
    pixels = torch.randn(1, 3, 16, 16)
    names = ("resid_pre.1", "attn_out.1", "mlp_out.1", "residual.1")
    tokens = torch.zeros(1, 17, dtype=torch.int64)
    hooks = checked_hooks(network, resolve_hooks(network, (), names), tokens, pixels)
    found = HookedModel(network, hooks).activations(tokens, pixels=pixels)
    before, attention, feed_forward, after = found.values()
    torch.testing.assert_close(before + attention + feed_forward, after)


def test_columns_of_images_and_patterns_of_files_give_the_rows_of_a_folder(photos, tmp_path):
    import datasets

    folder = save_image_model(tmp_path / "clip", "clip")
    assert run(folder, photos, tmp_path / "folder", "--layers", "0") == 0
    assert run(folder, photos / "*.png", tmp_path / "files", "--layers", "0") == 0
    assert_same_shards(tmp_path / "folder", tmp_path / "files")
    paths = [str(photos / f"{number}.png") for number in range(COUNT)]
    table = datasets.Dataset.from_dict({"photo": paths, "caption": ["a cat"] * COUNT})
    table = table.cast_column("photo", datasets.Image())
    table.to_parquet(str(tmp_path / "photos.parquet"))
    flags = ("--layers", "0", "--image-column", "photo", "--num-proc", "2")
    for out, more in (("table", ()), ("stream", ("--streaming", "always", "--max-tokens", "999"))):
        assert run(folder, tmp_path / "photos.parquet", tmp_path / out, *flags, *more) == 0
        for path, (content, _) in shards(tmp_path / "folder").items():
            found = shards(tmp_path / out)[path][0]
            assert all(np.array_equal(found[column], content[column]) for column in content)
    recipe = json.loads((tmp_path / "table" / "capture.json").read_text())
    assert recipe["dataset"]["text_column"] == "photo"
    assert recipe["settings"]["ctx_len"] == 17


def test_a_capture_of_images_continues_and_holds_the_last_ones_out(photos, tmp_path):
    folder = save_image_model(tmp_path / "clip", "clip")
    flags = ("--layers", "0", "--batch-size", "2", "--shard-tokens", "20", "--heldout-tokens", "20")
    assert run(folder, photos, tmp_path / "whole", *flags) == 0
    assert run(folder, photos, tmp_path / "cut", *flags) == 0
    held_out = shards(tmp_path / "whole")["residual.0/heldout_00.h5"][0]["doc_id"]
    assert set(held_out.tolist()) == {COUNT - 2, COUNT - 1}
    # As a kill in the second shard leaves it.
    progress = tmp_path / "cut" / "progress_00.json"
    content = json.loads(progress.read_text())
    for path in sorted((tmp_path / "cut" / "residual.0").glob("shard_*.h5"))[1:]:
        path.unlink()
    (tmp_path / "cut" / "residual.0" / "manifest.json").unlink()
    cursor = {"document": 0, "offset": 0, "skip": 0, "batch": 0, "rows": 0, "empty": 0}
    content |= {"shards": 1, "rows": 20, "cursor": cursor, "taken": 20, "complete": False}
    progress.write_text(json.dumps(content))
    assert run(folder, photos, tmp_path / "cut", *flags) == 0
    assert_same_shards(tmp_path / "whole", tmp_path / "cut")


def test_an_image_that_is_not_there_is_skipped(photos, tmp_path):
    import datasets

    paths = [None, str(photos / "0.png"), None, str(photos / "1.png")]
    table = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "saved"))
    documents = load_documents(str(tmp_path / "saved"))
    assert documents.kind is Kind.IMAGES
    folder = save_image_model(tmp_path / "clip", "clip")
    assert run(folder, tmp_path / "saved", tmp_path / "out", "--layers", "0") == 0
    content, _ = shards(tmp_path / "out")["residual.0/shard_00000.h5"]
    assert content["doc_id"].tolist() == [1] * 16 + [3] * 16


def error_of(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_what_cannot_be_read_is_refused_in_one_line(photos, tmp_path, capsys):
    model = save_image_model(tmp_path / "clip", "clip")
    llama = save_model(tmp_path / "llama", "llama")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat"}\n')
    vit = save_image_model(tmp_path / "vit", "vit")
    for given, message in (
        ([model, tmp_path / "broken"], f"image 0 of {tmp_path / 'broken'} ({tmp_path}"),
        ([model, photos, "--ctx-len", "9"], "ctx_len = 9 is for texts: an image has as many"),
        ([model, photos, "--image-column", "photo"], "has no column 'photo'; it has image"),
        ([llama, photos], "it reads no images, and the documents are images"),
        ([vit, tmp_path / "texts.jsonl"], "it reads images, and the documents are texts"),
        (
            [model, photos, "--image-column", "image", "--text-column", "a"],
            "image_column = 'image' and text_column = 'a': give one of the two",
        ),
    ):
        assert run(*given[:2], tmp_path / "out", "--layers", "0", *given[2:]) == 2
        assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_without_pillow_the_extra_is_named(photos, tmp_path, monkeypatch, capsys):
    import sys

    model = save_image_model(tmp_path / "clip", "clip")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert run(model, photos, tmp_path / "out", "--layers", "0") == 2
    assert "needs pillow: install it (pip install 'sae_fast[images]')" in error_of(capsys)


def test_a_checkpoint_without_weights_of_the_blocks_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_image_model(tmp_path / "clip", "clip_vision_model")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.2.mlp" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="its checkpoint has no weights for 4 parameters"):
        load_image_model(str(folder))


@pytest.mark.slow
def test_a_dictionary_is_trained_on_images_and_attached_to_their_model(photos, tmp_path):
    from sae_fast import train

    folder = save_image_model(tmp_path / "clip", "clip_vision_model")
    flags = ["--layers", "1", "--k", "2", "--num-latents", "32", "--max-tokens", "100"]
    sizes = ["--heldout-tokens", "16", "--batch-sequences", "2", "--num-threads", "1"]
    place = ["--save-dir", str(tmp_path), "--run-name", "run", "--quiet"]
    assert train.main([str(folder), str(photos), *flags, *sizes, *place]) == 0
    network, _ = make_image_model("dinov2")
    sae = SparseAutoencoder(SAEConfig(d_in=16, d_sae=32, k=4))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = network(pixel_values=pixels).last_hidden_state
        with sae.attached(network, "attn_out.1", "error") as run:
            found = network(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, wanted)
    assert find_hook(network, "attn_out.1").module == "encoder.layer.1.layer_scale1"
    assert run.codes[0].shape == (2, 17, 32)
