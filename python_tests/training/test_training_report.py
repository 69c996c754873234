"""The report at the end of a training: its top latents, with contexts where there are tokens."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from sae_fast import SAEConfig, TrainConfig, Trainer
from sae_fast.activations import ShardMetadata, write_shard

SAE = SAEConfig(d_in=8, d_sae=16, k=2)
ROWS = 64


def _shards(place: Path, metadata: ShardMetadata, **columns: torch.Tensor) -> Path:
    place.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in ("train_00", "heldout_00"):
        rows = torch.randn(ROWS, 8, generator=generator)
        write_shard(place / f"{name}.h5", rows, metadata=metadata, **columns)
    return place


def _report(place: Path, shards: Path, heldout_fraction: float = 0.0) -> str:
    config = TrainConfig(
        shard_dir=str(shards),
        checkpoint_dir=str(place / "run"),
        batch_size=16,
        max_steps=2,
        heldout_fraction=heldout_fraction,
    )
    Trainer(SAE, config, show_progress=False).train()
    return (place / "run" / "report.html").read_text()


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_top_latents_have_contexts_where_shards_have_tokens(
    tmp_path: Path, fraction: float
) -> None:
    words = {f"word{number}": number for number in range(7)}
    (tmp_path / "model").mkdir()
    tokenizer = Tokenizer(models.WordLevel({**words, "[UNK]": 7}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    # A capture names the model, and has a hash of its tokenizer.
    metadata = ShardMetadata(model=str(tmp_path / "model"), tokenizer="sha256:0123")
    columns = {"token_ids": torch.arange(ROWS) % 7, "doc_id": torch.arange(ROWS) // 8}
    shards = _shards(tmp_path / "shards", metadata, **columns)
    if fraction:
        (shards / "heldout_00.h5").unlink()
    html = _report(tmp_path, shards, fraction)
    assert f"Top latents on {int(ROWS * (fraction or 1))} held-out rows" in html
    assert '<p class="context">' in html
    assert "<mark>word" in html


def test_without_tokens_top_latents_have_their_numbers(tmp_path: Path) -> None:
    html = _report(tmp_path, _shards(tmp_path / "shards", ShardMetadata(model="a/model")))
    assert "Top latents on 64 held-out rows" in html
    assert "Contexts need rows with tokens" in html
    assert '<p class="context">' not in html


def test_other_data_by_the_name_of_tokens_are_no_tokens(tmp_path: Path) -> None:
    shards = _shards(tmp_path / "shards", ShardMetadata())
    with h5py.File(shards / "heldout_00.h5", "a") as file:
        file["token_ids"] = np.random.default_rng(0).random(ROWS)
    assert "Contexts need rows with tokens" in _report(tmp_path, shards)
