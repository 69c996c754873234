"""With lazy checks rows are looked at when they are first read; nothing is read before."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import h5py
import pytest
import torch
from torch import Tensor

from sae_fast.activations import (
    ActivationStream,
    ShardError,
    estimate_normalization,
    open_shards,
    write_manifest,
    write_shard,
)
from sae_fast.activations.normalization import sample_spans
from sae_fast.activations.order import Block
from sae_fast.activations.pool import BlockReader
from sae_fast.activations.row_scan import RowScanner
from sae_fast.activations.scanning import BESIDE_MANIFEST, ScanRecord
from sae_fast.activations.shard import inspect_shard, stated_digest
from sae_fast.activations.shard_set import ShardSet


def random_rows(count: int = 600, d_in: int = 8) -> Tensor:
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(0))


def settle(record: ScanRecord) -> None:
    """Date the scans of a record one second later, so that every file is older."""
    for entry in record._known.values():
        entry["scanned_at"] += 10**9


def read_epoch(shards: ShardSet, seed: int = 0) -> int:
    """Serve every row once, in a random order, and return how many rows there are."""
    with ActivationStream(shards, batch_size=50, pool_rows=120, seed=seed) as stream:
        for _ in range(shards.rows // 50):
            stream.next_batch()
    return shards.rows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_shard_states_the_digest_that_a_scan_finds(tmp_path: Path, dtype: str) -> None:
    write_shard(tmp_path / "a.h5", random_rows(), dtype=dtype, chunk_rows=7)
    (digest,) = open_shards(tmp_path).digests
    assert stated_digest(inspect_shard(tmp_path / "a.h5")) == digest


def test_nothing_is_read_before_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    write_manifest(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(RowScanner, "add", lambda *_: pytest.fail("read"))
        shards = open_shards(tmp_path, lazy=True)
    assert read_epoch(shards) == 600


def test_each_row_is_looked_at_once_whatever_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.h5", random_rows(), chunk_rows=20)
    seen: list[int] = []
    add = RowScanner.add

    def noted(self: RowScanner, start: int, rows: object) -> None:
        seen.extend(range(start, start + len(rows)))  # type: ignore[arg-type]
        add(self, start, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(RowScanner, "add", noted)
    shards = open_shards(tmp_path, lazy=True)
    assert shards.first_reads is not None
    shards.first_reads.note(0, 30, random_rows()[30:90].numpy())
    for seed in range(2):
        read_epoch(shards, seed)
    assert sorted(seen) == list(range(600))


def test_damage_is_told_when_the_last_row_has_been_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["activations"][300, 3] += 1
    with pytest.raises(ShardError, match=r"a\.h5: damaged: its rows do not match their digest"):
        read_epoch(open_shards(tmp_path, lazy=True))


@pytest.mark.parametrize(("bad", "stop"), [(torch.nan, 301), (0.0, 400)])
def test_rows_that_are_refused_are_told_when_they_are_read(
    tmp_path: Path, bad: float, stop: int
) -> None:
    rows = random_rows()
    rows[300:stop] = bad
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = rows.numpy()
    shards = open_shards(tmp_path, lazy=True)
    with pytest.raises(ShardError, match=r"a\.h5: row 3.*(holds NaN|are zero or equal)"):
        read_epoch(shards)


def test_what_was_read_whole_is_known_to_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    record = ScanRecord()
    read_epoch(open_shards(tmp_path, lazy=True, record=record))
    settle(record)
    monkeypatch.setattr(RowScanner, "add", lambda *_: pytest.fail("read again"))
    again = open_shards(tmp_path, lazy=True, record=record)
    assert again.first_reads is None
    assert again.digests != ("",)


def test_shards_without_a_digest_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = random_rows().numpy()
    with caplog.at_level(logging.WARNING, "sae_fast"):
        read_epoch(open_shards(tmp_path, lazy=True))
    assert "verify lazy: 1 of 1 shards state no digest of their rows" in caplog.text


def test_rows_cannot_be_dropped_lazily(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    for options in ({"skip_nonfinite": True}, {"repeated_rows": "drop"}):
        with pytest.raises(ValueError, match="lazy: which rows are dropped must be known"):
            open_shards(tmp_path, lazy=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("lazy", [False, True])
def test_the_sample_for_mean_and_scale_is_read_once_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    expected = estimate_normalization(open_shards(tmp_path))
    read: list[int] = []
    read_block = BlockReader.read

    def noted(self: BlockReader, block: Block, *out: Tensor) -> None:
        read.extend(range(block.start, block.stop))
        read_block(self, block, *out)

    monkeypatch.setattr(BlockReader, "read", noted)
    found = estimate_normalization(open_shards(tmp_path, lazy=lazy, sample=sample_spans))
    assert read == (list(range(600)) if lazy else [])
    assert torch.equal(found.mean, expected.mean)
    assert found.scale == expected.scale


# ---- beside the manifest -----------------------------------------------------------------------


def scan_and_remember(directory: Path) -> None:
    """Check the shards of a directory, and keep what was found beside its manifest, if it has one.

    The scan is dated one second later, so that every file is older.
    """
    record = ScanRecord()
    open_shards(directory, record=record)
    settle(record)
    record.save_beside_manifests()


def test_a_scan_is_remembered_beside_the_manifest_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    write_manifest(tmp_path)
    scan_and_remember(tmp_path)
    write_shard(tmp_path / "b.h5", random_rows(40))
    write_manifest(tmp_path)
    scan_and_remember(tmp_path)  # adds b to what is known of a
    assert len(json.loads((tmp_path / BESIDE_MANIFEST).read_text())["shards"]) == 2
    monkeypatch.setattr(RowScanner, "add", lambda *_: pytest.fail("read again"))
    assert open_shards(tmp_path, record=ScanRecord()).rows == 640


def test_without_a_manifest_nothing_is_written_beside_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    scan_and_remember(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_a_shard_that_changed_is_read_whatever_lies_beside_the_manifest(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    write_manifest(tmp_path)
    scan_and_remember(tmp_path)
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(ShardError, match="damaged: its SHA-256 is not the one in manifest"):
        open_shards(tmp_path, record=ScanRecord())


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 3, "shards": {"a.h5::x": 3}}'])
def test_a_damaged_record_beside_the_manifest_is_an_empty_one(tmp_path: Path, content: str) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    write_manifest(tmp_path)
    (tmp_path / BESIDE_MANIFEST).write_text(content)
    assert open_shards(tmp_path, record=ScanRecord()).rows == 600


def test_a_place_that_cannot_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.h5", random_rows())
    write_manifest(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    scan_and_remember(tmp_path)
    assert not (tmp_path / BESIDE_MANIFEST).exists()
