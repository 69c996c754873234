"""A model records its activations' origin, and is not trained on others by mistake."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_fast.activations import ShardMetadata, write_shard
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=32, k=3)
TRANSCODER = SAEConfig(d_sae=32, k=3, transcoder=True)
RUN = TrainConfig(batch_size=64, max_steps=1, learning_rate=1e-3)

Shards = Callable[..., str]


@pytest.fixture(name="shards")
def write_shards(tmp_path: Path, activations: torch.Tensor) -> Shards:
    """Write rows with the metadata of a hook; return their directory."""

    def write(hook: str | None, layer: int | None = None) -> str:
        directory = tmp_path / f"shards-{hook}"
        directory.mkdir()
        told = ShardMetadata(model="llama", hook=hook, layer=layer, dataset="texts", revision="a1")
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
    told |= {"dataset": "texts", "revision": "a1"}
    assert sae.origin == told
    sae.fold_normalization().save(tmp_path / "folded")
    for place in (tmp_path / "folded", run / "checkpoints" / "latest"):
        assert SparseAutoencoder.from_pretrained(place).origin == told


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
