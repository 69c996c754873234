"""Compressed shards: equal rows, fewer bytes, and one line of error if a filter is missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import warm_python

from sae_fast.activations import ActivationStream, HeldOut, open_shards, read_labels, write_shard
from sae_fast.activations.compression import COMPRESSIONS
from sae_fast.activations.shard import ShardFile, inspect_shard

ROOT = Path(__file__).parents[2]
PLUGINS = ("zstd", "blosc2")


def real_rows(sample_dir: Path) -> torch.Tensor:
    """Return activations of MiniLM, [2000, 384] float16."""
    with h5py.File(sample_dir / "train_00.h5") as file:
        return torch.from_numpy(file["activations"][:2000])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_rows_come_back_exactly_from_every_compression(tmp_path, sample_dir, dtype, compression):
    rows = real_rows(sample_dir).to(dtype)
    path = tmp_path / "a.h5"
    write_shard(path, rows, chunk_rows=600, compression=compression, token_ids=torch.arange(2000))
    shard = inspect_shard(path)
    assert shard.compressed == (compression != "none")
    assert shard.storage.torch_dtype == dtype
    batches = list(HeldOut(open_shards([path]), batch_size=999))
    assert torch.equal(torch.cat(batches), rows.float())
    with ShardFile(shard) as file:
        assert np.array_equal(file.read_column("token_ids", 590, 1210), np.arange(590, 1210))
    if compression != "none":
        assert shard.file_bytes < 0.95 * rows.nbytes


@pytest.mark.parametrize("compression", PLUGINS)
def test_zstandard_stores_real_activations_in_less_than_gzip_or_nearly(
    tmp_path, sample_dir, compression
):
    rows = real_rows(sample_dir)
    for name in (compression, "gzip"):
        write_shard(tmp_path / f"{name}.h5", rows, compression=name)
    sizes = {name: (tmp_path / f"{name}.h5").stat().st_size for name in (compression, "gzip")}
    assert sizes[compression] < 1.01 * sizes["gzip"]
    assert sizes[compression] < 0.9 * rows.nbytes


@pytest.mark.parametrize("compression", PLUGINS)
def test_the_stream_serves_every_row_of_compressed_shards(tmp_path, compression):
    for number in range(3):
        rows = torch.zeros(100, 4)
        rows[:, 0] = torch.arange(100 * number, 100 * (number + 1))
        labels = {"kind": torch.arange(100)}
        path = tmp_path / f"{number}.h5"
        write_shard(path, rows, chunk_rows=16, compression=compression, labels=labels)
    with ActivationStream(tmp_path, batch_size=30, seed=0) as stream:
        served = torch.cat([stream.next_batch()[:, 0].clone() for _ in range(10)])
    assert served.sort().values.tolist() == list(range(300))
    labels = read_labels(open_shards(tmp_path, columns=["labels/kind"]))
    assert labels["labels/kind"].tolist() == list(range(100)) * 3


def test_damage_inside_a_compressed_chunk_is_one_line_that_names_the_rows(tmp_path):
    path = tmp_path / "a.h5"
    write_shard(path, torch.randn(64, 32), chunk_rows=64, compression="zstd")
    with h5py.File(path) as file:
        place = file["activations"].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"a\.h5: rows 0 to 63 cannot be read"):
        open_shards([path])


def test_an_unknown_compression_is_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(ValueError, match="must be one of none, gzip, zstd, blosc2, got 'lz4'"):
        write_shard(tmp_path / "a.h5", torch.ones(1, 1), compression="lz4")
    assert list(tmp_path.iterdir()) == []


def without_hdf5plugin(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process without hdf5plugin; in this process its filters stay registered."""
    hidden = "import sys; sys.modules['hdf5plugin'] = None\n"
    variables = {**os.environ, "HDF5_PLUGIN_PATH": ""}
    return warm_python.run(["-c", hidden + code, *arguments], cwd=ROOT, env=variables)


@pytest.mark.slow
@pytest.mark.parametrize("compression", PLUGINS)
def test_without_hdf5plugin_reading_and_writing_name_the_extra(tmp_path, compression):
    path = tmp_path / "a.h5"
    write_shard(path, torch.ones(8, 2), compression=compression)
    code = (
        "import torch\n"
        "from sae_fast.activations import open_shards, write_shard\n"
        "rows = torch.ones(2, 1)\n"
        "for call in (lambda: open_shards(sys.argv[1]),\n"
        "             lambda: write_shard(sys.argv[2], rows, compression=sys.argv[3])):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error)\n"
        "write_shard(sys.argv[2], rows, compression='gzip')\n"
        "print(open_shards(sys.argv[2]).rows)\n"
    )
    done = without_hdf5plugin(code, str(path), str(tmp_path / "b.h5"), compression)
    assert done.returncode == 0, done.stderr
    reading, writing, gzip = done.stdout.splitlines()
    install = "needs hdf5plugin: pip install 'sae_fast[compression]'"
    assert reading.startswith(f"{path}: activations is compressed with ")
    assert reading.endswith(install)
    assert writing == f"compression '{compression}' {install}"
    assert gzip == "2"


@pytest.mark.slow
def test_a_shard_is_read_by_a_process_that_never_wrote_one(tmp_path):
    path = tmp_path / "a.h5"
    write_shard(path, torch.full((8, 2), 3.0), compression="zstd")
    code = (
        "import sys\n"
        "from sae_fast.activations import HeldOut, open_shards\n"
        "print(next(iter(HeldOut(open_shards(sys.argv[1]), batch_size=8))).sum().item())"
    )
    done = warm_python.run(["-c", code, str(path)], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "48.0\n"
