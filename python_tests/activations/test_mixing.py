"""Mixed sets: their shares, every row of a set before one repeats, exact resume, errors."""

import json
import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_fast.activations import (
    STARTS,
    TARGETS,
    ActivationStream,
    ShardError,
    ShardMetadata,
    ShardMix,
    TargetFiles,
    Transform,
    estimate_normalization,
    mix_shards,
    open_shards,
    write_shard,
)
from sae_fast.activations.mixing import MAX_PERIOD, turns_of

ANY_FIXTURE = [HealthCheck.function_scoped_fixture]
WEIGHTS = st.lists(st.integers(1, 12), min_size=2, max_size=5)


def numbered_rows(first: int, count: int, d_in: int = 4) -> torch.Tensor:
    """Return rows with their own number in column 0."""
    rows = torch.zeros(count, d_in)
    rows[:, 0] = torch.arange(first, first + count)
    rows[:, 1] = 1
    return rows


def mixed(tmp_path: Path, *sizes: int, weights: list[float]) -> ShardMix:
    """Return sets of the given sizes, with the number of the set in column 2."""
    sets = []
    for number, size in enumerate(sizes):
        path = tmp_path / f"mix_{number}_{size}" / "train_00.h5"
        if not path.exists():
            path.parent.mkdir()
            rows = numbered_rows(0, size)
            rows[:, 2] = number
            write_shard(path, rows, dtype="float32", chunk_rows=4)
        sets.append(open_shards(path, verify=False))
    return mix_shards(sets, weights)


def served(stream: ActivationStream, batches: int) -> torch.Tensor:
    """Return the set and the number of each row, [rows, 2]."""
    rows = torch.cat([stream.next_batch() for _ in range(batches)])
    return rows[:, [2, 0]].long()


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "bfloat16")])
def test_a_batch_is_as_stored_where_all_sets_have_one_type(tmp_path, dtypes):
    sets = []
    for number, dtype in enumerate(dtypes):
        path = tmp_path / str(number) / "train_00.h5"
        path.parent.mkdir()
        write_shard(path, numbered_rows(100 * number, 60), dtype=dtype, chunk_rows=4)
        sets.append(open_shards(path, verify=False))
    mix = mix_shards(sets, [2.0, 1.0])
    settings = {"batch_size": 25, "transform": Transform(torch.ones(4), 0.5)}
    with (
        ActivationStream(mix, **settings) as plain,
        ActivationStream(mix, as_stored=True, **settings) as stream,
    ):
        for _ in range(8):
            batch = stream.next_stored(0, 1)
            is_one = dtypes[0] == dtypes[1]
            assert batch.rows.x.dtype == (torch.float16 if is_one else torch.float32)
            assert torch.equal(batch.widened().x, plain.next_batch())


@given(weights=WEIGHTS)
def test_after_any_number_of_rows_every_set_has_its_share_to_within_a_row(weights):
    turns = turns_of(weights)
    shares = np.array(weights) / sum(weights)
    counts = np.stack([np.cumsum(turns == number) for number in range(len(weights))], axis=1)
    error = np.abs(counts - np.arange(1, len(turns) + 1)[:, None] * shares)
    assert error.max() <= 1 - 1 / (2 * len(weights) - 2) + 1e-9
    assert sum(weights) % len(turns) == 0  # so the pattern can begin again


def test_decimal_weights_are_exact_and_others_as_near_as_the_longest_pattern():
    assert len(turns_of([0.7, 0.3])) == len(turns_of([Fraction("0.7"), Fraction("0.3")])) == 10
    shares = np.bincount(turns_of([2**0.5, 1.0, 3**0.5])) / MAX_PERIOD
    wanted = np.array([2**0.5, 1.0, 3**0.5]) / (2**0.5 + 1 + 3**0.5)
    assert 0 < np.abs(shares - wanted).max() < 1 / MAX_PERIOD


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    batch_size=st.integers(1, 50),
    pool_rows=st.integers(1, 150),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_each_set_is_served_whole_before_any_of_it_repeats(
    tmp_path, sizes, batch_size, pool_rows, seed, data
):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    mix = mixed(tmp_path, *sizes, weights=weights)
    with ActivationStream(mix, batch_size=batch_size, pool_rows=pool_rows, seed=seed) as stream:
        rows = served(stream, -(-2 * stream.rows_per_epoch // batch_size))
        assert stream.tokens_served == len(rows)
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        own = rows[rows[:, 0] == number, 1]
        assert abs(len(own) - len(rows) * weight / sum(weights)) < 1
        passes = own[: len(own) // size * size].reshape(-1, size)
        assert torch.equal(passes.sort(1).values, torch.arange(size).expand_as(passes))
    # An epoch ends when the last of the sets has been served whole, not a row later.
    for length, is_whole in ((mix.rows, True), (mix.rows - 1, False)):
        counts = torch.bincount(rows[:length, 0], minlength=len(sizes)).tolist()
        assert all(count >= size for count, size in zip(counts, sizes, strict=True)) is is_whole


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(
    batch_size=st.integers(1, 40),
    pool_rows=st.integers(2, 150),
    before=st.integers(0, 9),
    batch_size_after=st.integers(1, 40),
)
def test_a_resumed_mix_goes_on_exactly(tmp_path, batch_size, pool_rows, before, batch_size_after):
    mix = mixed(tmp_path, 70, 11, 30, weights=[0.7, 0.1, 0.2])
    options = {"pool_rows": pool_rows, "seed": 3}
    with ActivationStream(mix, batch_size=batch_size, **options) as stream:
        for _ in range(before):
            stream.next_batch()
        state = json.loads(json.dumps(stream.state_dict()))
        expected = served(stream, 20)
    with ActivationStream(mix, batch_size=batch_size_after, **options) as resumed:
        resumed.load_state_dict(state)
        actual = served(resumed, 20)
    length = min(len(expected), len(actual))
    assert torch.equal(actual[:length], expected[:length])


def test_the_seed_decides_and_sets_of_one_size_have_orders_of_their_own(tmp_path):
    mix = mixed(tmp_path, 64, 64, weights=[1, 1])
    options = {"batch_size": 128, "pool_rows": 40}
    with ActivationStream(mix, seed=1, **options) as stream:
        first = served(stream, 1)
        own = [first[first[:, 0] == number, 1] for number in (0, 1)]
        assert not torch.equal(*own)
    for seed, equal in ((1, True), (2, False)):
        with ActivationStream(mix, seed=seed, **options) as stream:
            assert torch.equal(served(stream, 1), first) is equal


def test_a_mix_of_one_set_is_that_set(make_shards):
    shards = open_shards(make_shards(90, 50))
    options = {"batch_size": 16, "pool_rows": 40, "seed": 2}
    with (
        ActivationStream(shards, **options) as one,
        ActivationStream(mix_shards([shards], [0.3]), **options) as other,
    ):
        assert all(torch.equal(one.next_batch(), other.next_batch()) for _ in range(20))
        assert one.state_dict() == other.state_dict()
        assert other.rows_per_epoch == 140


def test_other_weights_are_refused_on_resume(tmp_path):
    mix = mixed(tmp_path, 40, 40, weights=[0.5, 0.5])
    with ActivationStream(mix, batch_size=8, pool_rows=20) as stream:
        state = stream.state_dict()
    for other in (mix_shards(mix.sets, [0.6, 0.4]), mix.sets[0]):
        with (
            ActivationStream(other, batch_size=8, pool_rows=20) as stream,
            pytest.raises(ValueError, match="other weights"),
        ):
            stream.load_state_dict(state)
    with (
        ActivationStream(mix_shards(mix.sets[::-1], [1, 1]), batch_size=8, pool_rows=20) as stream,
        pytest.raises(
            ValueError,
            match=r"differ from the ones that the checkpoint was made with: train_00.h5 has other",
        ),
    ):
        stream.load_state_dict(state)


def test_pools_share_the_rows_by_weight(tmp_path):
    mix = mixed(tmp_path, 4000, 4000, weights=[0.9, 0.1])
    stream = ActivationStream(mix, batch_size=10, pool_rows=500)
    assert [plan.n_windows for plan in stream._plans] == [9, 80]
    single = ActivationStream(mix.sets[0], batch_size=10, pool_rows=500)
    assert stream.memory_bytes < 1.2 * single.memory_bytes


def test_the_normalisation_counts_the_sets_as_they_are_served(tmp_path):
    mix = mixed(tmp_path, 300, 20, weights=[0.25, 0.75])
    found = estimate_normalization(mix)
    rows = [numbered_rows(0, 300).double(), numbered_rows(0, 20).double()]
    rows[1][:, 2] = 1
    mean = 0.25 * rows[0].mean(0) + 0.75 * rows[1].mean(0)
    norm = sum(
        share * (part - mean).norm(dim=1).mean()
        for share, part in zip((0.25, 0.75), rows, strict=True)
    )
    assert torch.allclose(found.mean.double(), mean, rtol=1e-6)
    assert found.scale == pytest.approx(float(2 / norm), rel=1e-6)


def write_columns(directory: Path, first: int, dtype: type) -> Path:
    """Write 24 rows in sequences of 6, with the row's number as label, and targets."""
    import h5py

    directory.mkdir()
    with h5py.File(directory / "a.h5", "w") as file:
        rows = numbered_rows(first, 24).numpy()
        file["activations"] = rows
        file["targets_of"] = np.repeat(rows[:, :1] + 0.5, 3, axis=1)
        file["label"] = np.arange(first, first + 24).astype(dtype)
        file["doc_id"] = np.arange(24) // 6
        file["position"] = np.arange(24) % 6
    return directory


@pytest.mark.parametrize("whole_sequences", [False, True])
def test_columns_and_targets_stay_with_their_rows(tmp_path, whole_sequences):
    sets = []
    for number in range(2):
        path = write_columns(tmp_path / str(number), 100 * number, int) / "a.h5"
        sets.append(
            open_shards(
                path,
                columns=["label"],
                whole_sequences=whole_sequences,
                targets=TargetFiles((path,), "targets_of"),
            )
        )
    with ActivationStream(mix_shards(sets, [2, 1]), batch_size=9, pool_rows=12) as stream:
        assert stream.columns["label"].maximum == 123
        for _ in range(20):
            x, columns = stream.next_rows()
            assert torch.equal(x[:, 0].long(), columns["label"])
            assert torch.equal(columns[TARGETS], (x[:, :1] + 0.5).expand(-1, 3))
            assert (x[:, 0] >= 100).sum() == 3
            if whole_sequences:
                ends = torch.diff(x[:, 0]) != 1
                assert columns[STARTS][0]
                assert bool(columns[STARTS][6])  # the first row of the other set
                assert torch.all(columns[STARTS][1:] | ~ends)


def test_columns_of_two_kinds_are_refused(tmp_path):
    sets = [
        open_shards(write_columns(tmp_path / kind.__name__, 0, kind), columns=["label"])
        for kind in (int, float)
    ]
    with pytest.raises(ShardError, match=r"float/a.h5: label is read as torch.float32, in .*int/"):
        mix_shards(sets, [1, 1])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0], "weights must be greater than 0, got 0"),
        ([-0.5, 1], "weights must be greater than 0, got -0.5"),
        ([float("nan"), 1], "got nan"),
        ([float("inf"), 1], "got inf"),
        ([1, 1e-6], "a weight of 1e-06 is less than 1/65,536"),
    ],
)
def test_weights_that_give_no_share_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        turns_of(weights)


def captured(directory: Path, d_in: int = 4, **origin: str | int) -> Path:
    directory.mkdir()
    metadata = ShardMetadata(**origin)
    write_shard(directory / "a.h5", numbered_rows(0, 8, d_in), metadata=metadata)
    return directory


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": "gpt2", "hook": "layers.4"}, r"hook 'layers.4', .* of 'layers.3'"),
        ({"model": "bert", "hook": "layers.3"}, r"model 'bert', .* of 'gpt2'"),
        ({"d_in": 5}, r"rows are 5 wide, but 4 wide in .*a.h5"),
    ],
)
def test_sets_of_another_place_are_refused(tmp_path, other, message):
    one = open_shards(captured(tmp_path / "a", model="gpt2", hook="layers.3"))
    two = open_shards(captured(tmp_path / "b", **other))
    with pytest.raises(ShardError, match=rf"b/a.h5: .*{message}"):
        mix_shards([one, two], [1, 1])


def test_sets_that_do_not_say_where_they_are_from_are_mixed(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "sae_fast")
    one = open_shards(captured(tmp_path / "a", model="gpt2", revision="v1"))
    two = open_shards(captured(tmp_path / "b", hook="layers.3"))
    three = open_shards(captured(tmp_path / "c", model="gpt2", revision="v2"))
    mix_shards([one, two], [1, 1])
    assert caplog.text == ""
    mix_shards([one, two, three], [1, 1, 1])
    assert "c/a.h5: is of revision 'v2'" in caplog.text


def test_resuming_with_shards_of_another_place_is_refused(tmp_path):
    with ActivationStream(captured(tmp_path / "a", hook="layers.3"), batch_size=4) as stream:
        state = stream.state_dict()
    with (
        ActivationStream(captured(tmp_path / "b", hook="layers.4"), batch_size=4) as stream,
        pytest.raises(ValueError, match=r"hook 'layers.4', the checkpoint .* on hook 'layers.3'"),
    ):
        stream.load_state_dict(state)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_share_has_the_rows_of_its_batches_from_every_set(tmp_path: Path, rank: int) -> None:
    mix = mixed(tmp_path, 50, 30, weights=[2, 1])
    options = {"batch_size": 7, "pool_rows": 20, "seed": 3}
    with ActivationStream(mix, **options) as whole:
        batches = [whole.next_batch() for _ in range(20)]
        state = whole.state_dict()
    with ActivationStream(mix, **options) as stream:
        assert all(torch.equal(stream.next_share(rank, 2).x, x) for x in batches[rank::2])
        assert stream.state_dict() == state
