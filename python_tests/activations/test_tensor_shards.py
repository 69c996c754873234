"""Training on files of tensors equals training on the shards that they are converted to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_fast import convert_shards
from sae_fast.activations import (
    ActivationStream,
    HeldOut,
    ShardError,
    find_shards,
    find_targets,
    open_heldout,
    open_shards,
    write_shard,
)


def save(path: Path, tensors: dict[str, Tensor] | Tensor) -> None:
    if path.suffix == ".npy":
        np.save(path, tensors.numpy())
    elif path.suffix == ".safetensors":
        save_file({"activations": tensors} if isinstance(tensors, Tensor) else tensors, path)
    else:
        torch.save(tensors, path)


def rows_of(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".npy", ".safetensors"])
@pytest.mark.parametrize("shape", [(300, 6), (20, 15, 6)])
def test_a_folder_is_served_as_its_conversion_is(tmp_path, suffix, shape):
    source = tmp_path / "acts"
    source.mkdir()
    for number in (10, 2, 1):
        save(source / f"acts_{number}{suffix}", rows_of(number, *shape))
    out = tmp_path / "shards"
    assert convert_shards.main([str(source), str(out), "--shard-rows", "300"]) == 0
    options: dict[str, Any] = {"batch_size": 50, "pool_rows": 400, "seed": 3}
    with ActivationStream(source, **options) as ours, ActivationStream(out, **options) as theirs:
        for _ in range(40):
            assert torch.equal(ours.next_batch(), theirs.next_batch())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_every_type_are_read(tmp_path, dtype):
    rows = rows_of(0, 64, 5, dtype=dtype)
    save(tmp_path / "a.pt", {"residual": {"acts": rows}})
    read = torch.cat(list(HeldOut(open_shards(tmp_path), batch_size=10)))
    assert torch.equal(read, rows.float())


def test_labels_targets_and_sequences_lie_beside_the_rows(tmp_path):
    tensors = {
        "x": rows_of(0, 12, 4),
        "y": rows_of(1, 12, 3),
        "label": torch.arange(12),
        "doc_id": torch.arange(12) // 4,
    }
    save(tmp_path / "a.pt", tensors)
    targets = find_targets([tmp_path / "a.pt"], None, "y")
    shards = open_shards(
        tmp_path, key="x", columns=["label"], whole_sequences=True, targets=targets
    )
    with ActivationStream(shards, batch_size=12) as stream:
        x, columns = stream.next_rows()
    order = columns["label"]
    assert torch.equal(x, tensors["x"][order])
    assert torch.equal(columns["targets"], tensors["y"][order])
    assert columns["starts"].tolist() == [True, False, False, False] * 3
    with pytest.raises(ShardError, match=r"a.pt: no array 'z'; it holds .*x \(\[12, 4\] float32\)"):
        open_shards(tmp_path, key="x", columns=["z"])


def test_files_named_heldout_are_for_evaluation(tmp_path):
    for name in ("train_1", "train_2", "heldout_1"):
        save(tmp_path / f"{name}.pt", rows_of(0, 40, 4))
    assert [path.name for path in find_shards(tmp_path)[0]] == ["train_1.pt", "train_2.pt"]
    heldout = open_heldout(tmp_path)
    assert heldout is not None
    assert heldout.rows == 40


def test_what_conversion_would_leave_out_or_join_is_left_to_it(tmp_path):
    mask = torch.ones(10, 5, dtype=torch.bool)
    save(tmp_path / "a.pt", {"acts": rows_of(0, 10, 5, 4), "attention_mask": mask})
    with pytest.raises(ShardError, match=r"a mask, 'attention_mask'; this makes shards of it"):
        open_shards(tmp_path)
    torch.save([rows_of(0, 10, 4), rows_of(1, 10, 4)], tmp_path / "a.pt")
    with pytest.raises(ShardError, match=r"a list of tensors; this makes shards of it"):
        open_shards(tmp_path)
    torch.save(rows_of(0, 10, 4), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ShardError, match=r"is of torch before 1.6"):
        open_shards(tmp_path)


def test_a_file_that_cannot_be_trained_on_is_one_line(tmp_path):
    save(tmp_path / "a.pt", {"x": rows_of(0, 10, 4), "y": rows_of(0, 10, 4)})
    with pytest.raises(ShardError, match=r"a.pt: holds x .* \(name one with --activations-key\)"):
        open_shards(tmp_path)
    with pytest.raises(ShardError, match=r"a.pt: no array 'z'; it holds x"):
        open_shards(tmp_path, key="z")
    bad = rows_of(0, 10, 4)
    bad[7, 1] = torch.inf
    save(tmp_path / "a.pt", bad)
    with pytest.raises(ShardError, match=r"a.pt: row 7 holds NaN or Inf"):
        open_shards(tmp_path)
    assert open_shards(tmp_path, skip_nonfinite=True).rows == 9
    save(tmp_path / "b.npy", rows_of(0, 10, 4))
    with pytest.raises(ShardError, match=r"holds .npy and .pt files, not one kind"):
        open_shards(tmp_path)
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "b.npy").unlink()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ShardError, match=r"a.pt: "):
        open_shards(tmp_path)


def test_an_archive_that_claims_to_span_disks_is_one_line(tmp_path):
    save(tmp_path / "a.pt", rows_of(0, 10, 4))
    content = bytearray((tmp_path / "a.pt").read_bytes())
    disks = (
        content.rindex(b"PK\x06\x07") + 16
    )  # number of disks in the locator of the directory's end
    content[disks] = 9
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ShardError, match=r"a.pt: cannot be read, damaged or cut short"):
        open_shards(tmp_path)


def test_the_position_of_a_stream_names_the_files(tmp_path):
    save(tmp_path / "a.pt", rows_of(0, 40, 4))
    with ActivationStream(tmp_path, batch_size=8) as stream:
        stream.next_batch()
        state = json.loads(json.dumps(stream.state_dict()))
        expected = stream.next_batch()
    with ActivationStream(tmp_path, batch_size=8) as again:
        again.load_state_dict(state)
        assert torch.equal(again.next_batch(), expected)
    save(tmp_path / "a.pt", rows_of(1, 40, 4))
    with (
        ActivationStream(tmp_path, batch_size=8) as changed,
        pytest.raises(ValueError, match=r"a.pt has other content"),
    ):
        changed.load_state_dict(state)


def test_files_of_tensors_beside_shards_are_told(tmp_path, caplog):
    write_shard(tmp_path / "a.h5", torch.randn(8, 4))
    (tmp_path / "a.h5").rename(tmp_path / "A.H5")
    torch.save(torch.randn(8, 4), tmp_path / "b.pt")
    with caplog.at_level("WARNING", logger="sae_fast"):
        train, _ = find_shards(tmp_path)
    assert [path.name for path in train] == ["A.H5"]
    assert f"{tmp_path}: b.pt not read, because it holds HDF5 shards" in caplog.text
