"""ActivationStream: every row once an epoch, exact resume, errors, no dependence on timing."""

from __future__ import annotations

import gc
import json
import threading
import time

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_fast.activations import (
    ActivationStream,
    ShardError,
    TargetFiles,
    Transform,
    open_shards,
    pool,
    write_manifest,
    write_shard,
)
from sae_fast.activations.shard import ShardFile
from sae_fast.activations.source import empty_rows

ANY_FIXTURE = [HealthCheck.function_scoped_fixture]


def take(stream: ActivationStream, batches: int) -> torch.Tensor:
    return torch.cat([stream.next_batch() for _ in range(batches)])


@settings(max_examples=30, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    batch_size=st.integers(1, 70),
    pool_rows=st.integers(1, 200),
    chunk_rows=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_every_row_is_served_once_an_epoch(
    make_shards, sizes, batch_size, pool_rows, chunk_rows, seed
):
    name = f"{sizes}{chunk_rows}"
    directory = make_shards(*sizes, chunk_rows=chunk_rows, name=name)
    total, epochs = sum(sizes), 3
    batches = -(-total * epochs // batch_size)
    with ActivationStream(
        directory, batch_size=batch_size, pool_rows=pool_rows, seed=seed
    ) as stream:
        served = take(stream, batches)[:, 0]
    for epoch in range(epochs):
        rows = served[epoch * total : (epoch + 1) * total]
        assert torch.equal(rows.sort().values, torch.arange(total, dtype=torch.float32))


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    batch_size=st.integers(1, 40),
    pool_rows=st.integers(1, 150),
    before=st.integers(0, 12),
    batch_size_after=st.integers(1, 40),
)
def test_a_resumed_stream_goes_on_exactly(
    make_shards, sizes, batch_size, pool_rows, before, batch_size_after
):
    directory = make_shards(*sizes, name=f"{sizes}")
    options = {"pool_rows": pool_rows, "seed": 7}
    with ActivationStream(directory, batch_size=batch_size, **options) as stream:
        take(stream, before) if before else None
        state = json.loads(json.dumps(stream.state_dict()))
        expected = take(stream, 30).flatten()
    with ActivationStream(directory, batch_size=batch_size_after, **options) as resumed:
        resumed.load_state_dict(state)
        assert resumed.tokens_served == before * batch_size
        actual = take(resumed, 30).flatten()
    length = min(len(expected), len(actual))
    assert torch.equal(actual[:length], expected[:length])


@pytest.mark.parametrize("rank", [0, 2])
def test_a_share_is_one_batch_of_several_and_no_other_is_gathered(make_shards, monkeypatch, rank):
    gathered = []

    def gather(stored, order, *more):
        gathered.append(len(order))
        take_rows(stored, order, *more)

    take_rows = pool.take
    monkeypatch.setattr(pool, "take", gather)
    options = {"batch_size": 16, "pool_rows": 40, "seed": 1, "background": False}
    directory = make_shards(90, 50)
    with ActivationStream(directory, **options) as whole:
        batches = [whole.next_batch() for _ in range(12)]
        state, following = whole.state_dict(), whole.next_batch()
    gathered.clear()
    with ActivationStream(directory, **options) as stream:
        stream.start(rank, 3)
        found = [stream.next_share(rank, 3).x for _ in range(4)]
        assert sum(gathered) == 4 * 16
        assert stream.state_dict() == state
        assert all(map(torch.equal, found, batches[rank::3]))
        assert torch.equal(stream.next_batch(), following)


def test_loading_rewinds_a_stream_in_use(make_shards):
    with ActivationStream(make_shards(90, 50), batch_size=16, pool_rows=40) as stream:
        take(stream, 3)
        state = stream.state_dict()
        expected = take(stream, 20)
        stream.load_state_dict(state)
        assert torch.equal(take(stream, 20), expected)


def test_what_is_prefetched_is_not_counted_as_served(make_shards):
    with ActivationStream(make_shards(100), batch_size=8) as stream:
        stream.start()
        while not stream._reader.ready:
            pass
        assert stream.tokens_served == 0
        assert stream.state_dict()["cursor"]["tokens"] == 0


def test_the_order_does_not_depend_on_timing(make_shards, monkeypatch):
    directory = make_shards(90, 50)

    def served(delay: float) -> torch.Tensor:
        read = ShardFile.read

        def slow(self, *args, **kwargs):
            threading.Event().wait(delay)
            return read(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(ShardFile, "read", slow)
            with ActivationStream(directory, batch_size=16, pool_rows=40) as stream:
                return take(stream, 25)

    assert torch.equal(served(0), served(0.002))


def test_state_is_small_and_does_not_hold_the_pool(sample_dir):
    with ActivationStream(sample_dir, batch_size=512) as stream:
        take(stream, 3)
        assert len(json.dumps(stream.state_dict())) < 500


def test_rows_are_shuffled_across_shards(make_shards):
    with ActivationStream(make_shards(200, 200, 200), batch_size=60) as stream:
        shards = torch.bincount((stream.next_batch()[:, 0] / 200).long(), minlength=3)
    assert shards.min() >= 8  # expected 20 of each


def test_counters_run_over_epochs(make_shards):
    with ActivationStream(make_shards(30, 20), batch_size=40) as stream:
        assert (stream.rows_per_epoch, stream.d_in, stream.epoch) == (50, 4, 0)
        take(stream, 2)
        assert (stream.tokens_served, stream.epoch) == (80, 1)
        assert stream.stall_seconds >= 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_batches_are_float32_and_transformed_as_the_formula_says(make_shards, dtype):
    directory = make_shards(64, dtype=dtype)
    mean, scale = torch.tensor([3.0, 1.0, 0.5, 0.1]), 0.3
    with ActivationStream(directory, batch_size=64) as stream:
        raw = stream.next_batch()
    with ActivationStream(directory, batch_size=64, transform=Transform(mean, scale)) as stream:
        batch = stream.next_batch()
    assert raw.dtype == batch.dtype == torch.float32
    assert torch.equal(batch, (raw - mean) * torch.tensor(scale))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("options", [{}, {"keep_on": torch.device("cpu")}])
def test_batches_as_stored_are_widened_to_the_ones_of_the_stream(make_shards, dtype, options):
    directory = make_shards(64, 30, dtype=dtype)
    settings = {"batch_size": 40, "transform": Transform(torch.tensor([3.0, 1.0, 0.5, 0.1]), 0.3)}
    with (
        ActivationStream(directory, **settings) as plain,
        ActivationStream(directory, as_stored=True, **options, **settings) as stream,
    ):
        for _ in range(6):
            batch, expected = stream.next_stored(0, 1), plain.next_batch()
            assert batch.rows.x.dtype == getattr(torch, dtype)
            assert torch.equal(batch.widened().x, expected)
            assert stream.state_dict() == plain.state_dict()
        assert torch.equal(stream.next_batch(), plain.next_batch())
        assert torch.equal(stream.next_stored(1, 2).widened().x, plain.next_share(1, 2).x)
        stream.set_transform(None)
        plain.set_transform(None)
        assert torch.equal(stream.next_stored(0, 1).widened().x, plain.next_share(0, 1).x)
        assert plain.next_stored(0, 1).rows.x.dtype == torch.float32
        assert stream.memory_bytes < plain.memory_bytes or dtype == "float32" or options


def test_batches_belong_to_the_caller(make_shards):
    with ActivationStream(make_shards(64), batch_size=16) as stream:
        first = stream.next_batch()
        copy = first.clone()
        take(stream, 20)
        assert torch.equal(first, copy)


def bad_rows_shard(directory, rows=(3, 17, 18)):
    directory.mkdir(exist_ok=True)
    values = np.zeros((40, 4), np.float16)
    values[:, 0] = np.arange(40)
    values[list(rows), 1] = np.nan
    with h5py.File(directory / "a.h5", "w") as file:
        file.create_dataset("activations", data=values, chunks=(8, 4))
    return directory


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("pool_rows", [5, 1000])
def test_rows_that_are_not_finite_are_dropped_and_counted_when_asked(tmp_path, verify, pool_rows):
    directory = bad_rows_shard(tmp_path / "s", rows=(*range(8, 16), 17, 39))
    with ActivationStream(
        directory, batch_size=10, pool_rows=pool_rows, skip_nonfinite=True, verify=verify
    ) as stream:
        assert (stream.nonfinite_rows, stream.rows_per_epoch) == (10, 30)
        for _ in range(2):
            served = take(stream, 3)[:, 0].sort().values.tolist()
            assert served == [row for row in range(40) if not (8 <= row < 16 or row in (17, 39))]


def test_without_verification_the_reader_still_names_shard_and_row(tmp_path):
    directory = bad_rows_shard(tmp_path / "s")
    with ActivationStream(directory, batch_size=10, verify=False) as stream:
        for _ in range(2):
            with pytest.raises(ShardError, match=r"a.h5: row 3 holds NaN or Inf"):
                stream.next_batch()


def test_shards_without_a_finite_row_are_refused(tmp_path):
    directory = bad_rows_shard(tmp_path / "s", rows=range(40))
    with pytest.raises(ShardError, match="no finite row"):
        ActivationStream(directory, batch_size=10, skip_nonfinite=True)


def test_a_shard_that_becomes_unreadable_is_named(make_shards):
    shards = open_shards(make_shards(30, 30))
    path = shards.shards[1].path
    path.write_bytes(path.read_bytes()[:-100])
    with (
        ActivationStream(shards, batch_size=10) as stream,
        pytest.raises(ShardError, match=r"train_01.h5: cannot be opened: truncated"),
    ):
        stream.next_batch()
    path.unlink()
    with (
        ActivationStream(shards, batch_size=10) as stream,
        pytest.raises(ShardError, match=r"train_01.h5: no such file"),
    ):
        stream.next_batch()


def test_a_damaged_compressed_chunk_is_named(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        rows = np.random.default_rng(0).random((64, 8), np.float32)
        file.create_dataset("activations", data=rows, chunks=(16, 8), compression="gzip")
        where = file["activations"].id.get_chunk_info(2).byte_offset
    content = bytearray(path.read_bytes())
    content[where : where + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"a.h5: rows .* cannot be read"):
        ActivationStream(path, batch_size=10)


def test_changed_shards_are_noticed_on_resume(make_shards):
    directory = make_shards(30, 30)
    options = {"batch_size": 8, "seed": 0}
    with ActivationStream(directory, **options) as stream:
        state = stream.state_dict()

    def message() -> str:
        with (
            ActivationStream(directory, **options) as stream,
            pytest.raises(
                ValueError, match="differ from the ones that the checkpoint was made with"
            ) as caught,
        ):
            stream.load_state_dict(state)
        return str(caught.value)

    write_shard(directory / "train_01.h5", torch.ones(30, 4), chunk_rows=8)
    assert "train_01.h5 has other content" in message()
    (directory / "train_01.h5").rename(directory / "train_02.h5")
    assert "train_01.h5 is gone and train_02.h5 is new" in message()


@pytest.mark.parametrize("has_targets", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_a_changed_row_without_a_checksum_is_noticed_on_resume(tmp_path, listed, has_targets):
    path = tmp_path / "a.h5"
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).numpy()
    names = ("activations", "outputs") if has_targets else ("activations",)

    def write(row: int | None = None) -> None:
        with h5py.File(path, "w") as file:
            for name in names:
                file[name] = rows
            if row is not None:
                file[names[-1]][row] = 1
        if listed:
            write_manifest(tmp_path)

    def opened() -> ActivationStream:
        targets = TargetFiles((path,), "outputs") if has_targets else None
        return ActivationStream(open_shards(tmp_path, targets=targets), batch_size=8)

    write()
    with opened() as stream:
        state = json.loads(json.dumps(stream.state_dict()))
    write()  # with other times
    with opened() as stream:
        stream.load_state_dict(state)
    write(row=100)
    with opened() as stream:
        with pytest.raises(ValueError, match=r"checkpoint was made with: a\.h5 has other content$"):
            stream.load_state_dict(state)
        del state["contents"]  # like positions of earlier releases
        stream.load_state_dict(state)


@pytest.mark.parametrize("contents", [None, "", ["x", "y"], [1], {}])
def test_digests_of_contents_that_are_none_are_refused(make_shards, contents):
    with (
        ActivationStream(make_shards(30), batch_size=8) as stream,
        pytest.raises(ValueError, match="data position: contents must be"),
    ):
        stream.load_state_dict({**stream.state_dict(), "contents": contents})


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("pool_rows", 11)])
def test_another_order_is_refused_on_resume(make_shards, name, value):
    directory = make_shards(30)
    settings = {"seed": 0, "pool_rows": 10}
    with ActivationStream(directory, batch_size=8, **settings) as stream:
        state = stream.state_dict()
    with (
        ActivationStream(directory, batch_size=8, **{**settings, name: value}) as stream,
        pytest.raises(ValueError, match=f"{name} is {value}, but the checkpoint"),
    ):
        stream.load_state_dict(state)


def reader_threads() -> int:
    return sum(thread.name.startswith("sae_fast-") for thread in threading.enumerate())


def test_no_thread_outlives_its_stream(make_shards):
    directory = make_shards(30)
    with ActivationStream(directory, batch_size=8) as stream:
        stream.next_batch()
        assert reader_threads() == 2  # one thread makes batches, one reads the disk
    assert reader_threads() == 0
    with pytest.raises(ValueError, match="closed"):
        stream.next_batch()
    dropped = ActivationStream(directory, batch_size=8)
    dropped.next_batch()
    del dropped
    gc.collect()
    assert reader_threads() == 0


def test_a_stream_collected_by_a_thread_of_its_own_ends_all_of_them(make_shards, monkeypatch):
    read, dropped = ShardFile.read, threading.Event()

    def collecting(self, *args, **kwargs):
        dropped.wait()
        gc.collect()
        return read(self, *args, **kwargs)

    stream = ActivationStream(make_shards(30), batch_size=8)
    monkeypatch.setattr(ShardFile, "read", collecting)
    gc.disable()  # in this thread it would wait for the others, which wait for the next lines
    try:
        stream.start()
        threads = [t for t in threading.enumerate() if t.name.startswith("sae_fast-")]
        assert len(threads) == 2
        cycle = [stream]
        cycle.append(cycle)
        del stream, cycle
        dropped.set()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        gc.enable()


def test_the_callers_number_of_threads_is_untouched(make_shards):
    before = torch.get_num_threads()
    with ActivationStream(make_shards(30), batch_size=8) as stream:
        stream.next_batch()
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *seen] == [before, before]


@pytest.mark.parametrize(("device", "wanted"), [("cpu", 1), ("cuda", 3)])
def test_only_batches_for_a_gpu_are_built_by_several_threads(
    make_shards, monkeypatch, device, wanted
):
    """A training step on the CPU needs the cores itself."""
    seen = []

    def pageable_rows(*arguments, **types):
        seen.append(torch.get_num_threads())
        return empty_rows(*arguments[:-1], **types)  # page-locked memory needs a GPU

    monkeypatch.setattr("sae_fast.activations.stream.empty_rows", pageable_rows)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ActivationStream(
            make_shards(300), batch_size=100, device=torch.device(device)
        ) as stream:
            served = take(stream, 2)
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {wanted}
    with ActivationStream(make_shards(300), batch_size=100) as stream:
        assert torch.equal(served, take(stream, 2))


def test_stalls_are_measured(make_shards, monkeypatch):
    read = ShardFile.read

    def slow(self, *args, **kwargs):
        threading.Event().wait(0.05)
        return read(self, *args, **kwargs)

    stream = ActivationStream(make_shards(30), batch_size=8)
    monkeypatch.setattr(ShardFile, "read", slow)
    begin = time.perf_counter()
    stream.next_batch()
    assert 0.04 <= stream.stall_seconds <= time.perf_counter() - begin
    stream.close()


def test_memory_is_bounded_by_the_pool_not_the_shards(make_shards):
    shards = open_shards(make_shards(2000, 2000))
    small = ActivationStream(shards, batch_size=10, pool_rows=64)
    whole = ActivationStream(shards, batch_size=10)
    assert small.memory_bytes < 2 * (64 + 3 * 8) * 16 + 6 * 10 * 16
    assert whole.memory_bytes >= 4000 * 16


def test_more_files_than_are_kept_open_are_read(tmp_path):
    for number in range(70):
        write_shard(tmp_path / f"{number:02d}.h5", torch.full((2, 1), float(number)))
    with ActivationStream(tmp_path, batch_size=140, pool_rows=20) as stream:
        for _ in range(2):
            served = stream.next_batch().flatten().sort().values
            assert torch.equal(served, torch.arange(70.0).repeat_interleave(2))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_bad_batch_sizes_are_named(make_shards, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        ActivationStream(make_shards(30), batch_size=batch_size)


def test_a_transform_of_another_width_is_refused(make_shards):
    with pytest.raises(ValueError, match=r"mean must have shape \(4,\), got \(3,\)"):
        ActivationStream(make_shards(30), batch_size=8, transform=Transform(torch.zeros(3), 1.0))


def test_real_activations_are_served_as_stored(sample_dir):
    with ActivationStream(sample_dir, batch_size=9111, pool_rows=2000) as stream:
        assert (stream.d_in, stream.rows_per_epoch) == (384, 9111)
        served = stream.next_batch()
    stored = []
    for name in ("train_00.h5", "train_01.h5"):
        with h5py.File(sample_dir / name) as file:
            stored.append(torch.from_numpy(file["activations"][:]).float())
    expected = torch.cat(stored)
    for column in (0, 100):
        assert torch.equal(served[:, column].sort().values, expected[:, column].sort().values)
    assert torch.allclose(served.double().mean(0), expected.double().mean(0), atol=1e-9)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch finds none")
def test_batches_for_a_gpu_come_in_page_locked_memory(tmp_path):
    write_shard(tmp_path / "a.h5", torch.randn(100, 4))
    with ActivationStream(tmp_path, batch_size=20, device=torch.device("cuda", 0)) as stream:
        assert all(stream.next_batch().is_pinned() for _ in range(12))
        assert all(stream.next_stored(0, 1).rows.x.is_pinned() for _ in range(12))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no memory", "no line"])
def test_a_reader_that_could_not_begin_is_told_where_its_rows_are_waited_for(
    make_shards, monkeypatch, kind
):
    run = threading.Thread.run

    def fails(thread):
        if not thread.name.endswith("reader"):
            return run(thread)
        if kind == "no memory":
            raise MemoryError
        return None

    monkeypatch.setattr(threading.Thread, "run", fails)
    with pytest.raises(MemoryError, match="the thread that reads has ended"):
        take(ActivationStream(open_shards(make_shards(20)), batch_size=4), 1)
