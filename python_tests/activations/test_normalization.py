"""Mean and scale, and rows read in order."""

from __future__ import annotations

import math
from typing import Any

import h5py
import pytest
import torch

from sae_fast.activations import (
    HeldOut,
    TensorStream,
    Transform,
    estimate_normalization,
    open_heldout,
    open_shards,
    write_shard,
)
from sae_fast.activations import normalization as normalization_module
from sae_fast.activations.normalization import sample_spans
from sae_fast.activations.order import Block
from sae_fast.activations.pool import BlockReader


def test_normalised_rows_have_mean_zero_and_mean_norm_sqrt_d(sample_dir):
    shards = open_shards(sample_dir)
    transform = estimate_normalization(shards, max_rows=None)
    rows = torch.cat(list(HeldOut(shards, batch_size=1000, transform=transform))).double()
    assert rows.mean(dim=0).abs().max() < 1e-5
    assert rows.norm(dim=1).mean() == pytest.approx(math.sqrt(384), rel=1e-6)


def test_a_sample_comes_close_and_is_the_same_every_time(sample_dir):
    shards = open_shards(sample_dir)
    exact = estimate_normalization(shards, max_rows=None)
    sampled = estimate_normalization(shards, max_rows=4096)
    again = estimate_normalization(shards, max_rows=4096)
    assert torch.equal(sampled.mean, again.mean)
    assert sampled.scale == again.scale
    assert sampled.scale == pytest.approx(exact.scale, rel=0.02)
    assert not torch.equal(sampled.mean, exact.mean)


def test_all_shards_are_sampled_not_the_first(tmp_path):
    for number in range(8):
        rows = torch.randn(3000, 8) * 0.1 + number
        write_shard(tmp_path / f"{number}.h5", rows, chunk_rows=100)
    transform = estimate_normalization(open_shards(tmp_path), max_rows=2400)
    assert torch.allclose(transform.mean, torch.full((8,), 3.5), atol=0.05)


def test_a_tensor_and_its_shards_agree(sample_dir):
    shards = open_shards(sample_dir)
    rows = torch.cat(list(HeldOut(shards, batch_size=1000)))
    from_shards = estimate_normalization(shards, max_rows=None)
    from_tensor = estimate_normalization(rows)
    assert torch.allclose(from_shards.mean, from_tensor.mean, atol=1e-7)
    assert from_shards.scale == pytest.approx(from_tensor.scale, rel=1e-9)


def test_sums_do_not_lose_small_differences():
    rows = 1e4 + torch.tensor([[-1.0], [1.0]]).repeat(50_000, 1)
    transform = estimate_normalization(rows)
    assert transform.mean.item() == 1e4
    assert transform.scale == 1.0


def test_equal_rows_are_refused():
    with pytest.raises(ValueError, match="all rows are equal"):
        estimate_normalization(torch.ones(5, 3))


@pytest.mark.parametrize("batch_size", [1, 7, 500, 2331, 5000])
@pytest.mark.parametrize("max_rows", [None, 1, 1000, 10_000])
def test_held_out_rows_come_in_order_each_time(sample_dir, batch_size, max_rows):
    if batch_size == 1 and max_rows != 1:
        batch_size = 3
    shards = open_heldout(sample_dir)
    assert shards is not None
    held = HeldOut(shards, batch_size=batch_size, max_rows=max_rows)
    whole = torch.cat(list(HeldOut(shards, batch_size=2331)))
    for _ in range(2):
        batches = list(held)
        assert len(batches) == len(held)
        assert torch.equal(torch.cat(batches), whole[:max_rows])
        assert all(len(batch) == batch_size for batch in batches[:-1])


def test_held_out_documents_are_in_no_training_shard(sample_dir):
    held = open_heldout(sample_dir)
    assert held is not None
    assert [shard.path.name for shard in held.shards] == ["heldout_00.h5"]
    documents = {}
    for path in sorted(sample_dir.glob("*.h5")):
        with h5py.File(path) as file:
            documents[path.name] = set(file["doc_id"][:].tolist())
    held_out = documents.pop("heldout_00.h5")
    assert len(held_out) == 2
    assert not held_out & set().union(*documents.values())


def test_held_out_rows_that_are_not_finite_are_dropped_as_asked(tmp_path):
    values = torch.arange(12.0).reshape(6, 2)
    values[2, 0] = float("nan")
    with h5py.File(tmp_path / "heldout.h5", "w") as file:
        file["activations"] = values.numpy()
    write_shard(tmp_path / "a.h5", torch.ones(3, 2))
    shards = open_heldout(tmp_path, skip_nonfinite=True)
    assert shards is not None
    rows = torch.cat(list(HeldOut(shards, batch_size=4)))
    assert rows[:, 0].tolist() == [0, 2, 6, 8, 10]


def test_streams_and_held_out_rows_transform_alike():
    rows = torch.randn(10, 3)
    transform = Transform(torch.randn(3), 1.7)
    batch = TensorStream(rows, batch_size=10, transform=transform).next_batch()
    assert torch.equal(batch.sort(dim=0).values, ((rows - transform.mean) * 1.7).sort(dim=0).values)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_the_sample_that_the_scan_keeps_gives_the_same_bits(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(normalization_module, "DEFAULT_MAX_ROWS", 1500)
    for number, dtype in enumerate(("float16", "float32")):
        rows = torch.randn(4000 - 300 * number, 5, generator=torch.Generator().manual_seed(number))
        if number:
            rows[77, 3] = torch.nan
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            shape = {"chunks": (100, 5), "compression": compression}
            file.create_dataset("activations", data=rows.numpy().astype(dtype), **shape)
    read = open_shards(tmp_path, skip_nonfinite=True)
    kept = open_shards(tmp_path, skip_nonfinite=True, sample=sample_spans)
    expected = estimate_normalization(read, 1500)
    blocks = count_blocks(monkeypatch)
    result = estimate_normalization(kept, 1500)
    assert torch.equal(result.mean, expected.mean)
    assert result.scale == expected.scale
    assert len(blocks) <= 2  # each time the block with the row that is left out
    kept.forget_kept()
    assert estimate_normalization(kept, 1500).scale == expected.scale
    assert len(blocks) > 2


def count_blocks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    read, blocks = BlockReader.read, list[object]()

    def counting(self: BlockReader, block: Block, *arguments: Any) -> None:
        blocks.append(block)
        read(self, block, *arguments)

    monkeypatch.setattr(BlockReader, "read", counting)
    return blocks
