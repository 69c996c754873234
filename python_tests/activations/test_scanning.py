"""One pass over the rows finds repeated rows and outliers, and its result is kept."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from sae_fast.activations import HeldOut, ShardError, open_shards, write_manifest, write_shard
from sae_fast.activations.row_scan import RowScan, RowScanner, repeated_limit
from sae_fast.activations.scanning import ScanRecord
from sae_fast.activations.shard import Shard, ShardFile, inspect_shard
from sae_fast.activations.storage import STORAGES, as_numpy


def random_rows(count: int = 4000, d_in: int = 8) -> Tensor:
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(0))


def write_plain(path: Path, rows: Tensor, dtype: str = "float32") -> None:
    """Write rows like other tools, without checks and without a checksum."""
    with h5py.File(path, "w") as file:
        stored = rows.to(STORAGES[dtype].torch_dtype)
        file["activations"] = as_numpy(stored, STORAGES[dtype])
        file.attrs["dtype"] = dtype


def settle(record: ScanRecord) -> None:
    """Date the scans of a record one second later, so that every file is older."""
    assert record._known
    for entry in record._known.values():
        entry["scanned_at"] += 10**9


def scanned(shard: Shard, pieces: list[tuple[int, int]]) -> RowScan:
    scanner = RowScanner(shard, skip_nonfinite=True, repeated_rows="keep")
    with ShardFile(shard) as file:
        for start, stop in pieces:
            out = np.empty((stop - start, shard.d_in), shard.storage.numpy_dtype)
            file.read(start, stop, out)
            scanner.add(start, out)
    return scanner.result()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_zero_and_repeated_rows_are_found_in_pieces_of_any_order(tmp_path, dtype):
    rows = random_rows(100)
    rows[0] = rows[17] = 0
    rows[[30, 31, 60]] = rows[[29, 29, 59]]
    rows[70] = -0.0
    write_shard(tmp_path / "a.h5", rows, dtype=dtype)
    shard = inspect_shard(tmp_path / "a.h5")
    for pieces in ([(0, 100)], [(60, 100), (0, 31), (31, 60)], [(i, i + 1) for i in range(100)]):
        found = scanned(shard, pieces)
        assert found.repeated.tolist() == [0, 17, 30, 31, 60, 70]
        assert sum(found.norms.values()) == 100
        assert RowScan.from_dict(found.to_dict(), 100).to_dict() == found.to_dict()


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("listed", [False, True])
def test_many_repeated_rows_are_refused_dropped_or_kept(tmp_path, compression, listed):
    rows = random_rows()
    rows[1000:1500] = 0
    rows[2000:2100] = rows[1999]
    write_shard(tmp_path / "a.h5", rows, chunk_rows=100, compression=compression)
    if listed:
        write_manifest(tmp_path)
    with pytest.raises(ShardError, match=r"a.h5: row 1000, and .* zero or equal to the row before"):
        open_shards(tmp_path)
    kept = open_shards(tmp_path, repeated_rows="keep")
    assert torch.equal(torch.cat(list(HeldOut(kept, batch_size=4000))), rows)
    dropped = open_shards(tmp_path, repeated_rows="drop")
    expected = torch.cat([rows[:1000], rows[1500:2000], rows[2100:]])
    assert torch.equal(torch.cat(list(HeldOut(dropped, batch_size=4000))), expected)


def test_storage_that_was_set_aside_and_not_written_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        space = h5py.h5s.create_simple((4000, 8))
        h5py.h5d.create(file.id, b"activations", h5py.h5t.IEEE_F32LE, space, properties)
        file["activations"][:2000] = random_rows(2000)
    with pytest.raises(ShardError, match=r"row 2000, and .* rows or more after it"):
        open_shards(tmp_path)


def test_a_few_repeated_rows_are_told_and_trained_on(tmp_path, caplog):
    rows = random_rows()
    rows[: repeated_limit(4000)] = 0
    write_shard(tmp_path / "a.h5", rows)
    with caplog.at_level(logging.WARNING, "sae_fast"):
        assert open_shards(tmp_path).rows == 4000
    assert "40 of 4000 rows are zero or equal to the row before them, 40 of these" in caplog.text


def test_a_few_rows_that_decide_the_variance_are_told(tmp_path, caplog):
    rows = random_rows()
    write_shard(tmp_path / "a.h5", rows)
    rows[::200] *= 300
    write_shard(tmp_path / "b.h5", rows)
    with caplog.at_level(logging.WARNING, "sae_fast"):
        open_shards([tmp_path / "a.h5"])
        assert not caplog.text
        open_shards(tmp_path)
    assert "0.25 % of the rows have norms above 10 times the median" in caplog.text
    assert "The largest is in b.h5" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_dropped_have_no_part_in_the_norms(tmp_path, caplog, dtype, bad):
    rows = random_rows()
    rows[7, 3] = bad
    rows[100:200] = 1000
    write_plain(tmp_path / "a.h5", rows, dtype)
    options = {"skip_nonfinite": True, "repeated_rows": "drop"}
    with caplog.at_level(logging.WARNING, "sae_fast"):
        record = ScanRecord()
        assert open_shards(tmp_path, record=record, **options).rows == 4000 - 100
        settle(record)
        open_shards(tmp_path, record=record, **options)
    assert "dropping 100 rows" in caplog.text
    # Of the equal rows the first is served, and has most of the sum of squares.
    assert caplog.text.count("0.026 % of the rows have norms above 10 times the median") == 2
    open_shards(tmp_path, record=record, skip_nonfinite=True, repeated_rows="keep")
    assert "2.5 % of the rows have norms above 10 times the median" in caplog.text


def test_repeated_rows_leave_the_norms_whatever_the_order_of_pieces(tmp_path):
    rows = random_rows(100)
    rows[30:40] = rows[60:63] = 50
    write_shard(tmp_path / "a.h5", rows)
    shard = inspect_shard(tmp_path / "a.h5")
    for pieces in ([(0, 100)], [(36, 100), (0, 36)], [(i, i + 1) for i in range(99, -1, -1)]):
        found = scanned(shard, pieces)
        assert sum(found.repeated_norms.values()) == 11
        assert found.served_norms("keep")[28] == 13  # of a norm of 50 sqrt(8), 2^(28.6 / 4)
        assert found.served_norms("drop")[28] == 2


def test_a_nonfinite_row_alone_gives_no_warning_of_large_norms(tmp_path, caplog):
    rows = random_rows()
    rows[7] = torch.nan
    write_plain(tmp_path / "a.h5", rows)
    with caplog.at_level(logging.WARNING, "sae_fast"):
        assert open_shards(tmp_path, skip_nonfinite=True).rows == 3999
    assert "dropping 1 rows" in caplog.text
    assert "norms" not in caplog.text


def test_norms_whose_squares_float32_cannot_hold_are_told_in_few_digits(tmp_path, caplog):
    rows = random_rows()
    rows[7] = 1e30
    write_shard(tmp_path / "a.h5", rows)
    with caplog.at_level(logging.WARNING, "sae_fast"):
        assert open_shards(tmp_path).rows == 4000
    assert re.search(r"up to \d\.\de\+(29|30) times, and hold 100 %", caplog.text)


@pytest.mark.parametrize("d_in", [1, 3, 8])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_digest_is_of_all_rows_in_their_order(tmp_path, dtype, d_in):
    rows = random_rows(100, d_in)
    signs = torch.ones(100, d_in)
    signs[50, d_in // 2] = -1
    contents = {"a": rows, "b": rows.clone(), "c": rows.flip(0), "d": rows * signs}
    digests = {}
    for name, changed in contents.items():
        write_shard(tmp_path / f"{name}.h5", changed, dtype=dtype, chunk_rows=8)
        shard = inspect_shard(tmp_path / f"{name}.h5")
        digests[name] = scanned(shard, [(0, 40), (40, 100)]).digest
        assert digests[name] == scanned(shard, [(i, i + 1) for i in range(100)]).digest
        assert digests[name] == scanned(shard, [(40, 100), (0, 40)]).digest
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 3


@pytest.mark.parametrize("listed", [False, True])
def test_what_is_remembered_is_not_read_again(tmp_path, monkeypatch, caplog, listed):
    caplog.set_level("INFO")
    write_shard(tmp_path / "a.h5", random_rows())
    if listed:
        write_manifest(tmp_path)
    record = ScanRecord()
    open_shards(tmp_path, record=record)
    settle(record)
    record.save(tmp_path / "shards.json")
    again = ScanRecord.load(tmp_path / "shards.json")
    monkeypatch.setattr(RowScanner, "add", lambda *_: pytest.fail("read again"))
    assert open_shards(tmp_path, record=again).rows == 4000
    told = [line for line in caplog.messages if "verif" in line]
    assert told == [
        "verifying 1 shard, 0.00 GB",
        "1 shard is unchanged since verification",
    ]


def test_a_file_that_changed_in_any_way_is_read_again(tmp_path):
    path = tmp_path / "a.h5"
    write_shard(path, random_rows())
    record = ScanRecord()
    open_shards(tmp_path, record=record)
    settle(record)
    status = path.stat()
    shard = inspect_shard(path)
    assert record.find(shard, shard.checksum) is not None
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ShardError, match="damaged: its rows do not match its checksum"):
        open_shards(tmp_path, record=record)


def test_what_an_earlier_run_allowed_is_not_allowed_by_its_record(tmp_path):
    rows = random_rows()
    rows[:1000] = 0
    rows[2000] = torch.nan
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = rows.numpy()
    record = ScanRecord()
    open_shards(tmp_path, record=record, repeated_rows="keep", skip_nonfinite=True)
    settle(record)
    with pytest.raises(ShardError, match="row 2000 holds NaN"):
        open_shards(tmp_path, record=record, repeated_rows="keep")
    with pytest.raises(ShardError, match="row 0, and"):
        open_shards(tmp_path, record=record, skip_nonfinite=True)


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 1}', '{"format_version": 9}'])
def test_a_damaged_record_is_an_empty_one(tmp_path, content):
    (tmp_path / "shards.json").write_text(content)
    assert not ScanRecord.load(tmp_path / "shards.json")._known
