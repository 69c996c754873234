"""Rows kept in memory equal streamed rows to the bit, and are read only once."""

import json
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sae_fast.activations import (
    STARTS,
    TARGETS,
    ActivationStream,
    ShardSet,
    TargetFiles,
    Transform,
    mix_shards,
    open_shards,
)
from sae_fast.activations import pool as pool_module
from sae_fast.activations.pool import check_lockable
from sae_fast.activations.shard import ShardFile

CPU = torch.device("cpu")
# Ways to keep rows: with a thread, in locked memory, or in the caller's thread as on a GPU.
WAYS = ({}, {"lock": True}, {"background": False})


def corpus(directory: Path, *, whole_sequences: bool = False, rows: int = 240) -> ShardSet:
    """Write two shards of sequences with labels and targets, and some rows that are not finite."""
    directory.mkdir()
    rng = np.random.default_rng(rows)
    for number in range(2):
        with h5py.File(directory / f"{number}.h5", "w") as file:
            x = rng.standard_normal((rows, 6)).astype(np.float16)
            x[5 + number :: 40] = np.nan
            file.create_dataset("activations", data=x, chunks=(8, 6))
            file["out"] = rng.standard_normal((rows, 3)).astype(np.float32)
            file["label"] = np.arange(rows) + 1000 * number
            file["doc_id"] = np.arange(rows) // 12
    paths = tuple(sorted(directory.glob("*.h5")))
    return open_shards(
        paths,
        skip_nonfinite=True,
        columns=["label"],
        whole_sequences=whole_sequences,
        targets=TargetFiles(paths, "out"),
    )


OPTIONS = {
    "batch_size": 50,
    "seed": 4,
    "transform": Transform(torch.full((6,), 0.3), 1.7),
    "target_transform": Transform(torch.full((3,), -0.1), 0.4),
}


def drain(stream: ActivationStream, batches: int) -> list[torch.Tensor]:
    served = []
    for _ in range(batches):
        x, columns = stream.next_rows()
        served += [x, columns["label"], columns[TARGETS]]
        served += [columns[STARTS]] if STARTS in columns else []
    return served


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=["thread", "locked", "direct"])
@pytest.mark.parametrize("pool_rows", [90, 5000])
@pytest.mark.parametrize("whole_sequences", [False, True])
def test_kept_rows_are_served_as_they_are_from_disk(tmp_path, way, pool_rows, whole_sequences):
    shards = corpus(tmp_path / "a", whole_sequences=whole_sequences)
    options = {**OPTIONS, "pool_rows": pool_rows}
    with (
        ActivationStream(shards, **options) as plain,
        ActivationStream(shards, keep_on=CPU, **way, **options) as kept,
    ):
        pairs = zip(drain(plain, 30), drain(kept, 30), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        assert kept.state_dict() == plain.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=["thread", "locked", "direct"])
def test_a_mix_is_kept_and_resumed_from_disk_and_back(tmp_path, way):
    sets = [corpus(tmp_path / "a"), corpus(tmp_path / "b", rows=60)]
    options = {**OPTIONS, "pool_rows": 100}
    mix = mix_shards(sets, [3, 1])
    with ActivationStream(mix, **options) as stream:
        drain(stream, 7)
        state = json.loads(json.dumps(stream.state_dict()))
        expected = drain(stream, 25)
    with ActivationStream(mix, keep_on=CPU, **way, **options) as kept:
        drain(kept, 3)
        kept.load_state_dict(state)
        assert all(torch.equal(*pair) for pair in zip(expected, drain(kept, 25), strict=True))
        position = kept.state_dict()
        more = drain(kept, 5)
    with ActivationStream(mix, **options) as stream:
        stream.load_state_dict(position)
        assert all(torch.equal(*pair) for pair in zip(more, drain(stream, 5), strict=True))


@pytest.mark.parametrize("background", [True, False])
def test_each_row_is_read_once(tmp_path, monkeypatch, background):
    shards = corpus(tmp_path / "a")
    read, counts = ShardFile.read, []

    def counting(self, start, stop, out):
        if self.shard.key == "activations" and stop - start > 1:  # one row identifies a shard
            counts.append(stop - start)
        return read(self, start, stop, out)

    options = {**OPTIONS, "pool_rows": 90, "keep_on": CPU, "background": background}
    with ActivationStream(shards, **options) as stream:
        monkeypatch.setattr(ShardFile, "read", counting)
        drain(stream, 4)
        stream.load_state_dict(
            stream.state_dict()
        )  # as in a training that has fetched batches ahead
        drain(stream, 40)
        assert stream.epoch >= 3
    assert sum(counts) == 480


def test_the_memory_is_that_of_the_rows(tmp_path):
    shards = corpus(tmp_path / "a")
    kept = ActivationStream(shards, keep_on=CPU, pool_rows=50, batch_size=1)
    a_row = 6 * 2 + 3 * 4 + 8
    order = 8 * 2 * min(shards.rows, kept._plans[0].capacity)
    batches = 6 * (6 * 4 + 3 * 4 + 8)
    assert kept.memory_bytes == shards.rows * a_row + order + batches
    assert kept.device_bytes == 0
    on_gpu = ActivationStream(
        shards, keep_on=torch.device("cuda", 0), pool_rows=50, batch_size=1, background=False
    )
    assert on_gpu.device_bytes == kept.memory_bytes - batches
    assert on_gpu.memory_bytes == batches


def test_locked_rows_are_locked(tmp_path):
    def locked_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmLck:")[1].split()[0])

    directory = tmp_path / "wide"
    directory.mkdir()
    with h5py.File(directory / "a.h5", "w") as file:
        file["activations"] = np.arange(3000 * 100, dtype=np.float32).reshape(3000, 100)
    before = locked_kib()
    with ActivationStream(directory, batch_size=10, keep_on=CPU, lock=True) as stream:
        stream.next_batch()
        assert locked_kib() - before >= 3000 * 100 * 4 // 1024


def test_what_cannot_be_locked_is_told_beforehand(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    monkeypatch.setattr(pool_module, "_is_privileged", lambda: False)
    check_lockable(1 << 20)
    with pytest.raises(ValueError, match=r"pin: 3.0 MiB cannot be locked .* limit is 1.0 MiB"):
        check_lockable(3 << 20)
    monkeypatch.setattr(pool_module, "_is_privileged", lambda: True)
    check_lockable(3 << 20)


def test_closing_gives_the_memory_back(tmp_path):
    stream = ActivationStream(corpus(tmp_path / "a"), keep_on=CPU, **OPTIONS)
    stream.next_rows()
    assert stream._kept
    stream.close()
    assert not stream._kept


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch finds none")
@pytest.mark.parametrize("whole_sequences", [False, True])
def test_rows_kept_on_a_gpu_are_served_there_equal(tmp_path, whole_sequences):
    gpu = torch.device("cuda", 0)
    sets = [
        corpus(tmp_path / name, whole_sequences=whole_sequences, rows=rows)
        for name, rows in (("a", 240), ("b", 60))
    ]
    options = {**OPTIONS, "pool_rows": 100}
    for shards in (sets[0], mix_shards(sets, [3, 1])):
        with (
            ActivationStream(shards, **options) as plain,
            ActivationStream(shards, keep_on=gpu, background=False, device=gpu, **options) as kept,
        ):
            for one, other in zip(drain(plain, 20), drain(kept, 20), strict=True):
                assert other.device == gpu
                assert torch.equal(one, other.cpu())
