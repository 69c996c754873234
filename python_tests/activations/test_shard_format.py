"""Rows are read as they were written, by sae_fast or by other tools."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import warm_python
from full_disk import files_up_to

from sae_fast.activations import HeldOut, ShardMetadata, ShardWriter, open_shards, write_shard
from sae_fast.activations.shard import ShardFile, inspect_shard
from sae_fast.activations.writer import padded_rows


def read_all(path: Path, key: str = "activations") -> torch.Tensor:
    return torch.cat(list(HeldOut(open_shards([path], key=key), batch_size=7)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_rows_come_back_exactly_in_each_stored_type(tmp_path, dtype, compression):
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    write_shard(tmp_path / "a.h5", rows, chunk_rows=16, compression=compression)
    assert torch.equal(read_all(tmp_path / "a.h5"), rows.float())


def test_bfloat16_is_stored_as_uint16_and_says_so(tmp_path):
    write_shard(tmp_path / "a.h5", torch.ones(3, 2, dtype=torch.bfloat16))
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["activations"].dtype == np.uint16
        assert file["activations"].attrs["dtype"] == file.attrs["dtype"] == "bfloat16"
        assert file["activations"][0, 0] == 0x3F80


def test_attributes_and_columns_are_written(tmp_path):
    metadata = ShardMetadata(model="m", hook="resid", layer=3, extra={"window": 128})
    write_shard(
        tmp_path / "a.h5",
        torch.ones(5, 2),
        metadata=metadata,
        token_ids=torch.arange(5),
        doc_id=[0, 0, 1, 1, 1],
        labels={"tense": np.arange(5, dtype=np.int8)},
    )
    shard = inspect_shard(tmp_path / "a.h5")
    expected = {"model": "m", "layer": 3, "window": 128, "rows": 5, "d_in": 2, "dtype": "float32"}
    assert expected.items() <= shard.metadata.items()
    assert "revision" not in shard.metadata
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["token_ids"].dtype == np.int32
        assert file["doc_id"][:].tolist() == [0, 0, 1, 1, 1]
        assert file["labels/tense"].dtype == np.int8


@pytest.mark.parametrize("pieces", [[1] * 20, [20], [3, 9, 8], [16, 4], [0, 20]])
def test_rows_appended_in_pieces_make_the_same_shard(tmp_path, pieces):
    rows = torch.arange(40.0).reshape(20, 2)
    with ShardWriter(tmp_path / "a.h5", dtype="float32", chunk_rows=8) as writer:
        for piece in rows.split(pieces):
            writer.append(piece, position=piece[:, 0])
    write_shard(tmp_path / "b.h5", rows, chunk_rows=8, position=rows[:, 0])
    assert torch.equal(read_all(tmp_path / "a.h5"), rows)
    checksums = {inspect_shard(tmp_path / name).checksum for name in ("a.h5", "b.h5")}
    assert len(checksums) == 1


def test_a_short_shard_is_not_padded_to_a_whole_chunk(tmp_path):
    write_shard(tmp_path / "a.h5", torch.zeros(10, 64))
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["activations"].chunks == (10, 64)


@pytest.mark.parametrize("rows", [1, 4095, 4096, 4097, 10_000])
def test_room_for_the_rows_of_a_shard_is_known_before(tmp_path, rows):
    write_shard(tmp_path / "a.h5", torch.ones(rows, 2).half(), token_ids=np.arange(rows))
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["activations"].id.get_storage_size() == 4 * padded_rows(rows, 4)
        assert file["token_ids"].id.get_storage_size() == 4 * padded_rows(rows, 4)


def test_a_failed_write_leaves_the_old_shard_and_nothing_else(tmp_path):
    path = tmp_path / "a.h5"
    write_shard(path, torch.zeros(4, 2))

    def interrupted() -> None:
        with ShardWriter(path) as writer:
            writer.append(torch.ones(9, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5"]
    assert torch.equal(read_all(path), torch.zeros(4, 2))


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_no_crash_at_exit(tmp_path):
    # A limit on file sizes replaces a full disk: the call that reserves space fails with both.
    # HDF5 2.0 kills the process at its end if its own write has failed.
    code = (
        "import resource, sys, torch\n"
        "from sae_fast.activations import write_shard\n"
        "for limit in (1_000, 1_000_000, 9_000_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    for compression in (None, 'gzip'):\n"
        "        try: write_shard(sys.argv[1], torch.randn(8000, 64), compression=compression)\n"
        "        except OSError as error: print(error)"
    )
    done = warm_python.run(["-c", code, tmp_path / "a.h5"], cwd=Path(__file__).parents[2])
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert "File too large" in line
        assert str(tmp_path) in line
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_cannot_be_begun_leaves_no_file_while_its_error_is_kept(tmp_path):
    with (
        files_up_to(1_000),
        pytest.raises(OSError, match="File too large") as kept,
        ShardWriter(tmp_path / "a.h5"),
    ):
        pass
    assert kept.value.__traceback__
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_space_that_was_set_aside_and_not_used_is_given_back(tmp_path, compression):
    write_shard(tmp_path / "a.h5", torch.zeros(20_000, 64), compression=compression)
    status = (tmp_path / "a.h5").stat()
    stored = 5_120_000 if compression is None else 50_000
    assert status.st_size < stored * 1.7  # the last chunk is padded
    assert status.st_blocks * 512 < status.st_size + 100_000


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (torch.tensor([[1.0], [7e4]]), {"dtype": "float16"}, "row 1 is not finite in float16"),
        (torch.tensor([[float("nan")]]), {}, "row 0 is not finite"),
        (torch.ones(3), {}, r"must be \[n, D\]"),
        (torch.ones(3, 2, dtype=torch.int64), {}, "torch.int64"),
        (torch.ones(0, 2), {}, "at least one row"),
        (torch.ones(3, 2), {"token_ids": [1, 2]}, "token_ids has 2 rows, activations 3"),
        (torch.ones(3, 2), {"tokens": [1, 2, 3]}, "tokens is no per-row dataset"),
        (torch.ones(3, 2), {"dtype": "int8"}, "dtype must be one of"),
        (torch.ones(3, 2), {"chunk_rows": 0}, "chunk_rows must be at least 1"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.h5", rows, **options)
    assert list(tmp_path.iterdir()) == []


def test_pieces_of_another_width_or_with_other_columns_are_refused(tmp_path):
    with ShardWriter(tmp_path / "a.h5") as writer:
        writer.append(torch.ones(1, 2), doc_id=[0])
        with pytest.raises(ValueError, match="width 3, before 2"):
            writer.append(torch.ones(1, 3), doc_id=[0])
        with pytest.raises(ValueError, match="differ from"):
            writer.append(torch.ones(1, 2))
    assert read_all(tmp_path / "a.h5").shape == (1, 2)


@pytest.mark.parametrize("chunks", [None, True, (1, 5, 3), (2, 2, 2), (2, 5, 3)])
def test_three_dimensions_are_flattened_in_reading_order(tmp_path, chunks):
    values = np.arange(4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("layer3/acts", data=values, chunks=chunks)
    rows = read_all(tmp_path / "a.h5", key="layer3/acts")
    assert torch.equal(rows, torch.from_numpy(values.reshape(20, 3)))


def test_any_range_of_rows_of_a_3d_dataset_can_be_read(tmp_path):
    values = np.arange(4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = values
    with ShardFile(inspect_shard(tmp_path / "a.h5")) as file:
        for start in range(20):
            for stop in range(start + 1, 21):
                out = np.empty((stop - start, 3), np.float32)
                file.read(start, stop, out)
                assert np.array_equal(out, values.reshape(20, 3)[start:stop])


@pytest.mark.parametrize("dtype", [">f2", "<f4", ">f4", "<f8"])
def test_files_of_other_tools_are_read_in_any_float_type(tmp_path, dtype):
    values = np.arange(30).reshape(10, 3).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = values
        file.attrs["checksum"] = "something of their own"
    assert torch.equal(read_all(tmp_path / "a.h5", "x"), torch.from_numpy(values.astype("f4")))


def test_shards_of_different_types_train_together(tmp_path):
    for number, dtype in enumerate([torch.float16, torch.bfloat16, torch.float32]):
        write_shard(tmp_path / f"{number}.h5", torch.full((3, 2), 1.5 + number, dtype=dtype))
    rows = torch.cat(list(HeldOut(open_shards(tmp_path), batch_size=100)))
    assert rows[:, 0].tolist() == [1.5] * 3 + [2.5] * 3 + [3.5] * 3
