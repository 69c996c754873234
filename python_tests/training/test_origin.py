"""A model records its activations' origin, and is not trained on others by mistake."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_fast.activations import ShardMetadata, write_shard
from sae_fast.activations.origin import joined, origin_of_attributes
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=32, k=3)
TRANSCODER = SAEConfig(d_sae=32, k=3, transcoder=True)
RUN = TrainConfig(batch_size=64, max_steps=1, learning_rate=1e-3)

# As a capture records it, and what of it the activations depend on.
RECIPE = {
    "model": {"name": "llama", "weights": "sha256:cd"},
    "dataset": {"config": None, "split": "train", "chat": {"template": "sha256:ef", "roles": []}},
    "settings": {"ctx_len": 128, "pack": False, "dtype": "float16", "shard_tokens": 1000},
}
SETTINGS = {
    **{"weights": "sha256:cd", "split": "train", "chat_template": "sha256:ef"},
    **{"ctx_len": 128, "pack": False, "dtype": "float16"},
}

Shards = Callable[..., str]


@pytest.fixture(name="shards")
def write_shards(tmp_path: Path, activations: torch.Tensor) -> Shards:
    """Write rows with the metadata of a hook; return their directory."""

    def write(hook: str | None, layer: int | None = None) -> str:
        directory = tmp_path / f"shards-{hook}"
        directory.mkdir()
        told = ShardMetadata(
            **{"model": "llama", "hook": hook, "layer": layer, "dataset": "texts"},
            **{"revision": "a1", "tokenizer": "sha256:ab", "special_tokens": "excluded"},
            extra={"capture": json.dumps(RECIPE)},
        )
        metadata = None if hook is None else told
        write_shard(directory / "a.h5", activations[:500], metadata=metadata)
        return str(directory)

    return write


def _train(sae: SAEConfig, **settings: str | bool) -> SparseAutoencoder:
    return Trainer(sae, replace(RUN, **settings), show_progress=False).train()  # type: ignore[arg-type]


def test_origin_is_kept_by_all_that_is_made_of_a_model(shards: Shards, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sae = _train(SAE, shard_dir=shards("residual.3", 3), checkpoint_dir=str(run))
    told = {"model": "llama", "hook": "residual.3", "layer": "3"}
    told |= {"dataset": "texts", "revision": "a1", "tokenizer": "sha256:ab"}
    assert sae.origin == {**told, "special_tokens": "excluded", "settings": SETTINGS}
    sae.fold_normalization().save(tmp_path / "folded")
    sae.export(tmp_path / "converted", "sparsify")
    for place in (*(tmp_path / name for name in ("folded", "converted")), run):
        assert SparseAutoencoder.from_pretrained(place).origin == sae.origin


def test_model_of_another_layer_is_started_from_only_on_purpose(
    shards: Shards, tmp_path: Path
) -> None:
    _train(SAE, shard_dir=shards("residual.0", 0)).save(tmp_path / "zero")
    start = {"start_from": str(tmp_path / "zero")}
    one = shards("residual.1", 1)
    message = r"zero is of hook 'residual.0', not 'residual.1'.*--start-from-elsewhere"
    with pytest.raises(ValueError, match=message):
        _train(SAE, shard_dir=one, **start)
    sae = _train(SAE, shard_dir=one, start_from_elsewhere=True, **start)
    assert sae.origin["hook"] == "residual.1"
    _train(SAE, shard_dir=str(tmp_path / "shards-residual.0"), **start)


def test_activations_that_do_not_say_what_they_are_may_follow_any(
    shards: Shards, tmp_path: Path
) -> None:
    _train(SAE, shard_dir=shards("residual.0", 0)).save(tmp_path / "zero")
    sae = _train(SAE, shard_dir=shards(None), start_from=str(tmp_path / "zero"))
    assert sae.origin == {}


def test_transcoder_tells_of_its_targets_and_is_not_started_on_others(
    shards: Shards, tmp_path: Path
) -> None:
    x, y, other = shards("mlp_in.0", 0), shards("mlp_out.0", 0), shards("mlp_out.1", 1)
    sae = _train(TRANSCODER, shard_dir=x, target_shard_dir=y)
    assert (sae.origin["hook"], sae.origin["targets"]["hook"]) == ("mlp_in.0", "mlp_out.0")
    sae.save(tmp_path / "model")
    start = {"start_from": str(tmp_path / "model")}
    with pytest.raises(ValueError, match=r"of targets of hook 'mlp_out.0', not 'mlp_out.1'"):
        _train(TRANSCODER, shard_dir=x, target_shard_dir=other, **start)
    _train(TRANSCODER, shard_dir=x, target_shard_dir=y, **start)


def test_what_is_no_recipe_of_a_capture_tells_nothing() -> None:
    for recipe in ("nonsense", "[1]", '{"model": 3, "settings": {"ctx_len": [1]}}', 7):
        assert origin_of_attributes({"model": "llama", "capture": recipe}) == {"model": "llama"}


def test_a_known_description_of_a_hook_point_is_its_name(tmp_path: Path) -> None:
    described = {"hook": "hidden_states[3] (residual stream after layer 3, post-LayerNorm)"}
    told = origin_of_attributes({**described, "layer": 3, "model": "m"})
    assert told == {"hook": "residual.2", "layer": "2", "model": "m"}
    model = SparseAutoencoder(SAEConfig(d_in=4, d_sae=8, k=2))
    model.origin = {**described, "layer": "3"}
    model.save(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert loaded.origin == {"hook": "residual.2", "layer": "2"}


def test_settings_in_which_shards_differ_are_all_told() -> None:
    one, other = {"settings": {"ctx_len": 128, "pack": True}}, {"settings": {"ctx_len": 64}}
    assert joined([one, other]) == {"settings": {"ctx_len": "128, 64", "pack": True}}


def test_origin_that_is_no_origin_is_refused(tmp_path: Path) -> None:
    SparseAutoencoder(replace(SAE, d_in=8)).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for origin, message in (
        ([1], "origin must be a JSON object"),
        ({"settings": {"ctx_len": [1]}}, r"origin\.settings\.ctx_len must be a string"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "origin": origin}))
        with pytest.raises(ValueError, match=message):
            SparseAutoencoder.from_pretrained(tmp_path)
