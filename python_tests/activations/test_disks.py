"""Several disks at once give an equal order of rows; rows read without HDF5 equal HDF5's."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_fast.activations import (
    ActivationStream,
    HeldOut,
    ShardError,
    mix_shards,
    open_shards,
    write_shard,
)
from sae_fast.activations import disks as disks_module
from sae_fast.activations.chunks import CodedRows, PlainRows
from sae_fast.activations.shard import ShardFile, inspect_shard

ANY_FIXTURE = [HealthCheck.function_scoped_fixture]
SECONDS = 20  # a thread waits this long for another before the test fails


@pytest.fixture
def two_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return two directories that are treated as if they were on different disks."""
    monkeypatch.setattr(disks_module, "disk_of", lambda path: path.parent.name)
    directories = [tmp_path / "one", tmp_path / "other"]
    for number, directory in enumerate(directories):
        directory.mkdir()
        for shard in range(2):
            first = 1000 * number + 100 * shard
            rows = torch.arange(first, first + 100.0).view(-1, 1).expand(-1, 3)
            write_shard(directory / f"{shard}.h5", rows, dtype="float32", chunk_rows=8)
    return directories


def take(stream: ActivationStream, batches: int) -> torch.Tensor:
    return torch.cat([stream.next_batch() for _ in range(batches)])


def disk_threads() -> int:
    return sum(thread.name.startswith("sae_fast-disk") for thread in threading.enumerate())


def test_two_disks_are_read_at_once_and_the_order_stays(two_disks, monkeypatch):
    paths = [path for directory in two_disks for path in sorted(directory.iterdir())]
    shards = open_shards(paths, verify=False)
    options = {"batch_size": 40, "pool_rows": 80}
    with monkeypatch.context() as patch:
        patch.setattr(disks_module, "disk_of", lambda path: 0)
        with ActivationStream(shards, **options) as stream:
            expected = take(stream, 30)
            assert disk_threads() == 1
    read, met = ShardFile.read, threading.Barrier(2)
    left = dict.fromkeys(two_disks, 3)

    def meeting(self, start, stop, out):
        directory = self.shard.path.parent
        if left[directory]:  # the first blocks of a disk are read while the other disk reads one
            left[directory] -= 1
            met.wait(SECONDS)
        return read(self, start, stop, out)

    monkeypatch.setattr(ShardFile, "read", meeting)
    with ActivationStream(shards, **options) as stream:
        assert torch.equal(take(stream, 30), expected)
        assert disk_threads() == 2
    assert left == dict.fromkeys(two_disks, 0)
    assert disk_threads() == 0


def test_a_slow_disk_changes_nothing_of_a_mix(two_disks, monkeypatch):
    mix = mix_shards([open_shards(directory) for directory in two_disks], [2, 1])
    options = {"batch_size": 33, "pool_rows": 50}
    with ActivationStream(mix, **options) as stream:
        expected = take(stream, 25)
    read = ShardFile.read
    for slow in two_disks:

        def delayed(self, start, stop, out, slow=slow):
            if self.shard.path.parent == slow:
                threading.Event().wait(0.003)
            return read(self, start, stop, out)

        monkeypatch.setattr(ShardFile, "read", delayed)
        with ActivationStream(mix, **options) as stream:
            assert torch.equal(take(stream, 25), expected)


def test_the_first_block_at_fault_is_told_whichever_disk_was_faster(two_disks, monkeypatch):
    shards = open_shards([two_disks[0] / "0.h5", two_disks[1] / "0.h5"])
    read = ShardFile.read

    def failing(self, start, stop, out):
        if self.shard.path.parent == two_disks[0]:
            threading.Event().wait(0.05)
        raise ShardError(f"{self.shard.path}: rows {start} to {stop - 1} cannot be read")

    monkeypatch.setattr(ShardFile, "read", failing)
    with (
        ActivationStream(shards, batch_size=10) as stream,
        pytest.raises(ShardError, match=r"one/0.h5: rows 0 to"),
    ):
        stream.next_batch()
    monkeypatch.setattr(ShardFile, "read", read)
    assert disk_threads() == 0


def test_errors_stay_where_no_thread_makes_the_batches(two_disks, monkeypatch):
    def failing(self, start, stop, out):
        raise ShardError("no disk")

    with ActivationStream(two_disks[0], batch_size=10, background=False) as stream:
        monkeypatch.setattr(ShardFile, "read", failing)
        for _ in range(2):
            with pytest.raises(ShardError, match="no disk"):
                stream.next_batch()
        assert disk_threads() == 0


@settings(max_examples=40, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(
    rows=st.integers(1, 40),
    tokens=st.sampled_from([0, 1, 3]),  # 0: two dimensions
    chunk=st.integers(0, 50),  # 0: contiguous
    dtype=st.sampled_from(["float16", "float32"]),
    in_order=st.booleans(),
    data=st.data(),
)
def test_rows_are_what_hdf5_reads(tmp_path, rows, tokens, chunk, dtype, in_order, data):
    path = tmp_path / "a.h5"
    shape = (rows, tokens, 5) if tokens else (rows, 5)
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    with h5py.File(path, "w") as file:
        chunks = (min(chunk, rows), *shape[1:]) if chunk else None
        dataset = file.create_dataset("activations", shape, dtype, chunks=chunks)
        middle = rows // 2  # written in this order, the chunks do not follow each other in the file
        parts = [slice(0, middle), slice(middle, rows)]
        for part in parts if in_order else parts[::-1]:
            if part.start < part.stop:
                dataset[part] = values[part]
    flat = values.reshape(-1, 5)
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    with ShardFile(inspect_shard(path)) as file:
        assert isinstance(file._direct, PlainRows)
        out = np.zeros((stop - start, 5), dtype)
        file.read(start, stop, out)
    assert np.array_equal(out, flat[start:stop])


@settings(max_examples=40, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(
    rows=st.integers(1, 40),
    tokens=st.sampled_from([0, 3]),
    chunk=st.integers(1, 50),
    dtype=st.sampled_from(["float16", "float32"]),
    compression=st.sampled_from(["gzip", "zstd"]),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_compressed_rows_are_what_hdf5_decodes(
    tmp_path, rows, tokens, chunk, dtype, compression, shuffle, data
):
    filters = {"gzip": "gzip", "zstd": pytest.importorskip("hdf5plugin").Zstd(clevel=1)}
    path = tmp_path / "a.h5"
    shape = (rows, tokens, 5) if tokens else (rows, 5)
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    with h5py.File(path, "w") as file:
        how = {"chunks": (min(chunk, rows), *shape[1:]), "shuffle": shuffle}
        file.create_dataset("activations", data=values, compression=filters[compression], **how)
    flat = values.reshape(-1, 5)
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    with ShardFile(inspect_shard(path)) as file:
        assert isinstance(file._direct, CodedRows)
        out = np.zeros((stop - start, 5), dtype)
        file.expect(start, stop)
        file.read(start, stop, out)
    assert np.array_equal(out, flat[start:stop])


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["zeros", "cut"])
def test_a_damaged_chunk_is_named(tmp_path, compression, damage):
    pytest.importorskip("hdf5plugin")
    path = tmp_path / "a.h5"
    write_shard(path, torch.randn(64, 8), chunk_rows=16, compression=compression)
    with h5py.File(path) as file:
        info = file["activations"].id.get_chunk_info(2)
    shard = inspect_shard(path)
    content = bytearray(path.read_bytes())
    middle = info.byte_offset + info.size // 2
    if damage == "zeros":
        content[info.byte_offset : middle] = bytes(middle - info.byte_offset)
        path.write_bytes(content)
    with ShardFile(shard) as file:
        if damage == "cut":
            file._direct._sizes[2] //= 2
        with pytest.raises(ShardError, match=r"a.h5: rows 32 to 47 cannot be read: a chunk is dam"):
            file.read(32, 48, np.zeros((16, 8), np.float16))


def test_several_threads_decode_and_the_rows_stay(tmp_path, monkeypatch):
    for number in range(2):
        rows = torch.arange(1000.0 * number, 1000.0 * number + 400).view(-1, 1).expand(-1, 3)
        kind = ("gzip", "none")[number]
        path = tmp_path / f"{number}.h5"
        write_shard(path, rows, dtype="float32", chunk_rows=16, compression=kind)
    options = {"batch_size": 50, "pool_rows": 200}
    served = []
    for count in (1, 3):
        monkeypatch.setattr(disks_module, "DECODING_THREADS", count)
        before = torch.get_num_threads()
        with ActivationStream(tmp_path, **options) as stream:
            served.append(take(stream, 40))
            assert disk_threads() == count
            assert torch.get_num_threads() == before
        assert disk_threads() == 0
    assert torch.equal(*served)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are told by /proc")
def test_many_sets_and_threads_share_the_files_that_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(disks_module, "DECODING_THREADS", 2)
    monkeypatch.setattr(disks_module, "MOST_OPEN_FILES", 6)
    for number in range(3):
        for shard in range(8):
            rows = torch.full((32, 3), float(number))
            path = tmp_path / f"{number}" / f"{shard}.h5"
            path.parent.mkdir(exist_ok=True)
            write_shard(path, rows, dtype="float32", chunk_rows=8, compression="gzip")
    mix = mix_shards([open_shards(tmp_path / f"{number}") for number in range(3)], [1, 1, 1])
    most = 0
    with ActivationStream(mix, batch_size=16, pool_rows=96) as stream:
        for _ in range(100):
            stream.next_batch()
            most = max(most, sum(path.startswith(f"{tmp_path}/") for path in open_paths()))
    assert 0 < most <= 6


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are told by /proc")
def test_more_shards_than_files_may_be_open_are_read(tmp_path):
    for shard in range(40):
        write_shard(tmp_path / f"{shard:02d}.h5", torch.randn(16, 3), dtype="float32")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 24, limits[1]))
    try:
        shards = open_shards(tmp_path)
        with ActivationStream(shards, batch_size=64, pool_rows=320) as stream:
            for _ in range(30):
                stream.next_batch()
        assert len(HeldOut(shards, batch_size=64)) == len(list(HeldOut(shards, batch_size=64)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def open_paths() -> Iterator[str]:
    """Yield the path of each open file; other threads may close a file before its path is read."""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(f"/proc/self/fd/{descriptor}")


def write(path: Path, **how: object) -> np.ndarray:
    values = np.arange(96, dtype=how.pop("dtype", "float32")).reshape(12, 8)
    block = how.pop("userblock_size", None)
    with h5py.File(path, "w", userblock_size=block) as file:
        dataset = file.create_dataset("activations", (12, 8), values.dtype, **how)
        dataset[:9] = values[:9]
        if how.pop("whole", True):
            dataset[9:] = values[9:]
    return values


@pytest.mark.parametrize(
    "how",
    [
        {"chunks": (4, 8), "compression": "lzf"},
        {"chunks": (4, 4)},
        {"chunks": (4, 8), "fletcher32": True},
        {"dtype": ">f4"},
        {"dtype": "float64"},
        {"userblock_size": 512},
    ],
    ids=["lzf", "parts-of-rows", "checksums", "big-endian", "float64", "user-block"],
)
def test_what_hdf5_must_decode_or_convert_is_left_to_it(tmp_path, how):
    values = write(tmp_path / "a.h5", **how)
    with ShardFile(inspect_shard(tmp_path / "a.h5")) as file:
        assert file._direct is None
        out = np.zeros((12, 8), np.float32)
        file.read(0, 12, out)
    assert np.array_equal(out, values)


def test_a_file_that_was_cut_while_open_is_named(tmp_path):
    write(tmp_path / "a.h5", chunks=(4, 8))
    with ShardFile(inspect_shard(tmp_path / "a.h5")) as file:
        size = (tmp_path / "a.h5").stat().st_size
        with (tmp_path / "a.h5").open("r+b") as cut:
            cut.truncate(size - 100)
        out = np.zeros((12, 8), np.float32)
        message = r"a.h5: rows 0 to 11 cannot be read: the file ends before these rows do"
        with pytest.raises(ShardError, match=message):
            file.read(0, 12, out)
