"""Every fault of a shard is found before training and reported in one line with the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_fast.activations import (
    ActivationStream,
    ShardError,
    check_same_width,
    find_shards,
    open_heldout,
    open_shards,
    write_manifest,
    write_shard,
)


def message_of(directory: Path, **options: object) -> str:
    with pytest.raises(ShardError) as caught:
        open_shards(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_or_missing_directory_is_named(tmp_path):
    assert f"{tmp_path}: no shards to train on" in message_of(tmp_path)
    assert f"{tmp_path}/none: no such directory" in message_of(tmp_path / "none")
    write_shard(tmp_path / "heldout_00.h5", torch.ones(3, 2))
    assert "besides 1 held-out" in message_of(tmp_path)


def test_a_file_that_is_not_hdf5_is_named(tmp_path):
    (tmp_path / "a.h5").write_text("not a shard\n" * 1000)
    assert message_of(tmp_path).startswith(f"{tmp_path}/a.h5: cannot be opened: not an HDF5 file")
    (tmp_path / "a.h5").write_bytes(b"")
    assert message_of(tmp_path).startswith(f"{tmp_path}/a.h5: cannot be opened")


def test_a_directory_with_the_name_of_a_shard_is_named(tmp_path):
    (tmp_path / "a.h5").mkdir()
    assert message_of(tmp_path).startswith(f"{tmp_path}/a.h5: cannot be opened")


@pytest.mark.parametrize("compression", [None, "gzip"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_shard_truncated_at_any_byte_is_refused_without_a_manifest(tmp_path, compression, cut):
    whole = tmp_path / "whole"
    if not whole.exists():
        write_shard(whole, torch.randn(64, 8), chunk_rows=16, compression=compression)
    content = whole.read_bytes()
    (tmp_path / "a.h5").write_bytes(content[: int(cut * len(content))])
    for verify in (False, True):
        assert message_of(tmp_path, verify=verify).startswith(f"{tmp_path}/a.h5: ")


def test_the_last_byte_missing_is_enough(tmp_path):
    write_shard(tmp_path / "a.h5", torch.randn(64, 8))
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(content[:-1])
    assert "truncated" in message_of(tmp_path, verify=False)


@pytest.mark.slow
@pytest.mark.parametrize("with_manifest", [False, True])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_what_is_trained_on(tmp_path, with_manifest, where, bit):
    pristine = tmp_path / "pristine"
    if not pristine.exists():
        pristine.mkdir()
        write_shard(pristine / "a.h5", torch.randn(64, 8), chunk_rows=16)
        if with_manifest:
            write_manifest(pristine)
    damaged = tmp_path / "damaged"
    shutil.copytree(pristine, damaged, dirs_exist_ok=True)
    content = bytearray((damaged / "a.h5").read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (damaged / "a.h5").write_bytes(content)
    try:
        shards = open_shards(damaged)
    except ShardError as error:
        message = str(error)
    else:
        # A manifest detects every changed bit. Without it only the intact rows are checked.
        assert not with_manifest
        with ActivationStream(shards, batch_size=64) as stream:
            read = stream.next_batch()
        with ActivationStream(pristine / "a.h5", batch_size=64) as stream:
            assert torch.equal(read, stream.next_batch())
        return
    assert message.startswith(f"{damaged}/a.h5: ")
    assert "\n" not in message


# In the index: its signature, the number of its entries, the first row of the first entry.
@pytest.mark.parametrize("place", [0, 7, 33])
def test_a_damaged_index_of_chunks_is_a_damaged_shard(tmp_path, place):
    write_shard(tmp_path / "a.h5", torch.randn(64, 8), chunk_rows=16)
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[content.rindex(b"TREE") + place] ^= 32
    (tmp_path / "a.h5").write_bytes(content)
    message_of(tmp_path)


def test_a_wrong_key_lists_what_is_there(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["layer3/acts"] = np.zeros((5, 2), np.float32)
        file["ids"] = np.zeros(5, np.int32)
    message = message_of(tmp_path)
    assert f"{tmp_path}/a.h5: no dataset 'activations'" in message
    assert "ids (5,)" in message
    assert "layer3/acts (5, 2)" in message
    assert "no dataset 'layer3'" in message_of(tmp_path, key="layer3")


def test_a_file_without_datasets_says_so(tmp_path):
    h5py.File(tmp_path / "a.h5", "w").close()
    assert "it holds no dataset at all" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 2), np.int32), "holds int32"),
        (np.zeros((3, 2), np.uint16), 'needs the attribute dtype="bfloat16"'),
        (np.zeros((3, 2), "S3"), "holds |S3"),
        (np.zeros(3, np.float32), "must have 2 or 3 dimensions"),
        (np.zeros((1, 2, 3, 4), np.float32), "must have 2 or 3 dimensions"),
        (np.zeros((0, 2), np.float32), "is empty"),
        (np.zeros((3, 0), np.float32), "is empty"),
        (np.float32(1), "must have 2 or 3 dimensions"),
    ],
)
def test_a_dataset_that_cannot_hold_activations_is_refused(tmp_path, values, message):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = values
    assert message in message_of(tmp_path)


def test_different_widths_name_both_files(tmp_path):
    write_shard(tmp_path / "a.h5", torch.ones(3, 2))
    write_shard(tmp_path / "b.h5", torch.ones(3, 5))
    message = message_of(tmp_path)
    assert f"{tmp_path}/b.h5: rows are 5 wide, but 2 wide in {tmp_path}/a.h5" in message


def test_held_out_rows_of_another_width_name_both_files(tmp_path):
    write_shard(tmp_path / "a.h5", torch.ones(3, 2))
    write_shard(tmp_path / "heldout_00.h5", torch.ones(3, 5))
    train = open_shards(tmp_path)
    with pytest.raises(ShardError, match=r"heldout_00.h5: rows are 5 wide, but 2 wide in .*a.h5"):
        open_heldout(tmp_path, train=train)
    check_same_width(train, train)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_a_row_that_is_not_finite_is_named(tmp_path, value, dtype):
    values = np.ones((40, 3), dtype)
    values[17, 2] = value
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("activations", data=values, chunks=(8, 3))
    write_shard(tmp_path / "a.h5", torch.ones(3, 3))
    message = message_of(tmp_path)
    assert message.startswith(f"{tmp_path}/b.h5: row 17 holds NaN or Inf")


def test_the_largest_finite_values_are_finite(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = np.array([[65504, -65504, 6e-8, -0.0]], np.float16)
    assert open_shards(tmp_path).rows == 1


def test_attributes_that_contradict_the_rows_are_refused(tmp_path):
    for name, value in (("rows", 7), ("d_in", 3), ("format_version", 2)):
        write_shard(tmp_path / "a.h5", torch.ones(3, 2))
        with h5py.File(tmp_path / "a.h5", "a") as file:
            file.attrs[name] = value
        message_of(tmp_path, verify=False)


def test_rows_that_do_not_match_their_checksum_are_refused(tmp_path):
    write_shard(tmp_path / "a.h5", torch.ones(3, 2))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["activations"][1, 1] = 2
    assert "rows do not match its checksum" in message_of(tmp_path)


def test_the_manifest_is_held_to(make_shards):
    directory = make_shards(20, 30)
    write_manifest(directory)
    assert open_shards(directory).rows == 50
    write_shard(directory / "train_01.h5", torch.ones(30, 4))
    assert f"{directory}/train_01.h5: damaged" in message_of(directory)
    write_shard(directory / "train_01.h5", torch.ones(300, 4))
    assert "manifest.json says" in message_of(directory, verify=False)
    (directory / "train_01.h5").unlink()
    assert f"{directory}/train_01.h5: in manifest.json, but missing" in message_of(directory)


def test_a_foreign_shard_beside_a_manifest_is_named(make_shards):
    directory = make_shards(20)
    write_manifest(directory)
    write_shard(directory / "extra.h5", torch.ones(3, 4))
    assert f"{directory}/extra.h5: not in manifest.json" in message_of(directory, verify=False)


def test_the_manifest_has_rows_bytes_and_sha256_of_every_shard(make_shards):
    directory = make_shards(20, 30)
    write_shard(directory / "heldout_00.h5", torch.ones(3, 4))
    write_manifest(directory)
    entries = json.loads((directory / "manifest.json").read_text())["shards"]
    assert [entry["file"] for entry in entries] == ["heldout_00.h5", "train_00.h5", "train_01.h5"]
    assert [entry["rows"] for entry in entries] == [3, 20, 30]
    for entry in entries:
        assert entry["bytes"] == (directory / entry["file"]).stat().st_size
        assert len(entry["sha256"]) == 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"format_version": 1}',
        '{"format_version": 1, "shards": [{"file": "a"}]}',
    ],
)
def test_a_damaged_manifest_is_named(make_shards, text):
    directory = make_shards(20)
    (directory / "manifest.json").write_text(text)
    assert f"{directory}/manifest.json: not a manifest" in message_of(directory)


def test_held_out_shards_are_found_and_never_trained_on(tmp_path):
    for name in ("b.h5", "a.hdf5", "heldout_01.h5", "heldout_00.h5"):
        write_shard(tmp_path / name, torch.ones(3, 2))
    (tmp_path / ".c.h5.12.tmp").touch()
    (tmp_path / "notes.txt").touch()
    train, held = find_shards(tmp_path)
    assert [path.name for path in train] == ["a.hdf5", "b.h5"]
    assert [path.name for path in held] == ["heldout_00.h5", "heldout_01.h5"]
    train, held = find_shards(tmp_path, heldout=tmp_path / "b*.h5")
    assert [path.name for path in train] == ["a.hdf5"]
    assert [path.name for path in held] == ["b.h5"]


def test_held_out_shards_may_lie_in_another_directory(tmp_path):
    for name in ("train/a.h5", "other/x.h5", "other/y.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / name, torch.ones(3, 2))
    train, held = find_shards(tmp_path / "train", heldout=tmp_path / "other")
    assert [path.name for path in train] == ["a.h5"]
    assert [path.name for path in held] == ["x.h5", "y.h5"]
    with pytest.raises(ShardError, match="no held-out shards there"):
        find_shards(tmp_path / "train", heldout=tmp_path / "none*")
    assert open_heldout(tmp_path / "train") is None
