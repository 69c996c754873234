"""`ServedRows`: the shard and row of each row of a batch, against the batches themselves."""

import numpy as np
import pytest
import torch

from sae_fast.activations import (
    ActivationStream,
    ShardMetadata,
    mix_shards,
    open_shards,
    write_shard,
)

D_IN = 3


def write_set(directory, lengths, first):
    """Write shards whose rows hold their own number, and one row twice."""
    directory.mkdir()
    for number, rows in enumerate(lengths):
        x = torch.arange(first, first + rows, dtype=torch.float32)[:, None].expand(-1, D_IN).clone()
        if number == 0:
            x[5] = x[4]
        place = torch.arange(rows)
        columns = {"doc_id": place // 7, "position": place % 7}
        metadata = ShardMetadata(model="some/model", hook="residual.3", layer=3)
        write_shard(directory / f"train_{number}.h5", x, metadata=metadata, **columns)
        first += rows
    return first


@pytest.mark.parametrize("whole_sequences", [False, True])
@pytest.mark.parametrize("weights", [[1], [2, 1]])
def test_rows_are_those_of_the_batches_over_windows_epochs_and_sets(
    tmp_path, weights, whole_sequences
):
    first = write_set(tmp_path / "a", (50, 33), 1)
    write_set(tmp_path / "b", (41,), first)
    sets = [
        open_shards(tmp_path / name, repeated_rows="drop", whole_sequences=whole_sequences)
        for name in "ab"[: len(weights)]
    ]
    mix = mix_shards(sets, weights)
    with ActivationStream(mix, batch_size=16, seed=3, pool_rows=32) as stream:
        shards = stream.shards.shards
        offsets = np.cumsum([1, *(shard.rows for shard in shards)])
        for number in range(14):  # more than an epoch
            before = stream.tokens_served
            assert before == 16 * number
            x = stream.next_batch()
            found, rows = stream.batch_rows(before)
            assert (offsets[found] + rows).tolist() == x[:, 0].tolist()
