"""Plans of conversions: every entry once, in order, in shards that end at the end of a sequence."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_fast.activations.imports.plan import plan_shards
from sae_fast.activations.imports.saved_activations import ArrayLayout, SavedActivations, SourceFile

ARRAYS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 7)), min_size=1, max_size=4)


def make_source(files):
    return SavedActivations(
        tuple(
            SourceFile(
                Path(f"{number}.pt"),
                0,
                tuple(ArrayLayout(entries, tokens, torch.float32) for entries, tokens in arrays),
                (),
                None,
            )
            for number, arrays in enumerate(files)
        ),
        "",
        4,
    )


def entries_of(shards):
    return [
        (span.file, span.array, entry, span.first + entry - span.start)
        for shard in shards
        for span in shard.spans
        for entry in range(span.start, span.stop)
    ]


@given(st.lists(ARRAYS, min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 60))
def test_every_entry_is_in_one_shard_in_order_and_the_last_rows_are_held_out(
    files, shard_rows, heldout_rows
):
    source = make_source(files)
    in_order = [
        (file, array, entry)
        for file, arrays in enumerate(files)
        for array, (entries, _) in enumerate(arrays)
        for entry in range(entries)
    ]
    tokens = [files[file][array][1] for file, array, _ in in_order]
    # The smallest number of last entries with enough rows is held out.
    held = next(
        n
        for n in range(len(tokens) + 1)
        if sum(tokens[len(tokens) - n :]) >= heldout_rows or n == len(tokens)
    )
    if held == len(tokens):
        if tokens:
            with pytest.raises(ValueError, match="leaves nothing to train on"):
                plan_shards(source, shard_rows, heldout_rows)
        return
    shards = plan_shards(source, shard_rows, heldout_rows)
    # Numbers refer to entries of the whole source.
    numbered = [(*where, number) for number, where in enumerate(in_order)]
    train = [shard for shard in shards if shard.name.startswith("train")]
    assert entries_of(train) == numbered[: len(numbered) - held]
    assert entries_of(shards[len(train) :]) == numbered[len(numbered) - held :]
    for shard in shards:
        assert shard.rows <= shard_rows or len(entries_of([shard])) == 1
    # The first entry of the next shard did not fit into this one.
    for part in (train, shards[len(train) :]):
        for one, following in itertools.pairwise(part):
            assert one.rows + following.spans[0].entry_rows > shard_rows
    names = [shard.name for shard in shards]
    assert names[: len(train)] == [f"train_{n:05d}.h5" for n in range(len(train))]
