"""The order of rows: complete, from one seed, well mixed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_fast.activations import open_shards
from sae_fast.activations.order import EpochPlan, default_pool_rows, random_order


@given(count=st.integers(0, 2000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_random_order_is_a_permutation(count, seed, epoch):
    assert np.array_equal(np.sort(random_order(count, seed, epoch, 0)), np.arange(count))


def test_random_order_is_what_it_always_was():
    # A change here breaks the exact resume of every checkpoint written before it.
    assert random_order(10, 0, 0, 1).tolist() == [0, 2, 1, 8, 4, 3, 7, 6, 9, 5]
    assert random_order(5, 3, 2, 1).tolist() == [2, 4, 0, 3, 1]


def test_random_order_depends_on_each_number_of_its_seed():
    orders = [
        random_order(100, *key).tolist() for key in [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_random_order_is_uniform():
    # First element of 6 over many seeds: chi-squared with 5 degrees of freedom, 1e-6 quantile 35.9.
    firsts = np.bincount([random_order(6, seed)[0] for seed in range(6000)], minlength=6)
    assert ((firsts - 1000) ** 2 / 1000).sum() < 35.9


@pytest.mark.parametrize("pool_rows", [1, 7, 16, 50, 199, 200, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_windows_hold_every_row_once(make_shards, pool_rows, epoch):
    shards = open_shards(make_shards(100, 3, 70, 27))
    plan = EpochPlan(shards, pool_rows, seed=3)
    windows = plan.windows(epoch)
    rows = [(b.shard, row) for window in windows for b in window for row in range(b.start, b.stop)]
    assert len(rows) == 200
    assert len(set(rows)) == 200
    sizes = [sum(block.kept for block in window) for window in windows]
    longest = max(block.stop - block.start for block in plan.blocks)
    assert max(sizes) < min(pool_rows, 200) + longest
    assert max(sizes) + longest <= plan.capacity


def test_windows_of_an_epoch_are_of_nearly_equal_size(make_shards):
    plan = EpochPlan(open_shards(make_shards(400, 400)), pool_rows=250, seed=0)
    sizes = [sum(block.kept for block in window) for window in plan.windows(0)]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 16


def test_a_window_mixes_all_shards(make_shards):
    plan = EpochPlan(open_shards(make_shards(400, 400, 400, 400)), pool_rows=400, seed=0)
    for window in plan.windows(0):
        assert {block.shard for block in window} == {0, 1, 2, 3}


def test_epochs_differ_and_seeds_differ(make_shards):
    shards = open_shards(make_shards(400))
    plan, other = EpochPlan(shards, 100, seed=0), EpochPlan(shards, 100, seed=1)
    assert plan.windows(0) == EpochPlan(shards, 100, seed=0).windows(0)
    assert plan.windows(0) != plan.windows(1)
    assert plan.windows(0) != other.windows(0)


def test_the_default_pool_is_bounded_in_rows_and_bytes(make_shards):
    assert default_pool_rows(open_shards(make_shards(30))) == 2**18


@pytest.mark.parametrize(("name", "value"), [("pool_rows", 0), ("pool_rows", -1), ("seed", -1)])
def test_bad_settings_are_named(make_shards, name, value):
    settings = {"pool_rows": 10, "seed": 0, name: value}
    with pytest.raises(ValueError, match=f"{name} must .* got {value}"):
        EpochPlan(open_shards(make_shards(30)), **settings)
