"""Columns go with their rows through every stream, and sequences stay whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_fast.activations import (
    STARTS,
    ActivationStream,
    Rows,
    ShardError,
    TensorStream,
    open_shards,
    write_shard,
)

ANY_FIXTURE = [HealthCheck.function_scoped_fixture]
LABELS = "labels/rule"
SCORES = "labels/score"

Corpus = list[list[int]]  # a list of documents for every shard, each by its number of tokens


def numbered(first: int, count: int) -> Tensor:
    """Return rows [count, 2] that hold their own number."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].repeat(1, 2)


def write_corpus(directory: Path, corpus: Corpus, **options: Any) -> Path:
    """Write shards of documents; a row's label is its number modulo 5, its score the half."""
    directory.mkdir(exist_ok=True, parents=True)
    first = 0
    for number, lengths in enumerate(corpus):
        count = sum(lengths)
        rows = np.arange(first, first + count)
        write_shard(
            directory / f"train_{number:02d}.h5",
            numbered(first, count),
            labels={"rule": rows % 5 - 1, "score": rows / 2},
            doc_id=np.repeat(np.arange(len(lengths)), lengths),
            position=np.concatenate([np.arange(length) for length in lengths]),
            **options,
        )
        first += count
    return directory


def begins(corpus: Corpus) -> set[int]:
    """Return the numbers of the rows that begin a document."""
    lengths = [length for shard in corpus for length in shard]
    return {int(end) - length for end, length in zip(np.cumsum(lengths), lengths, strict=True)}


def take(stream: Any, batches: int) -> list[Rows]:
    return [stream.next_rows() for _ in range(batches)]


def joined(batches: list[Rows], column: str | None = None) -> Tensor:
    if column is None:
        return torch.cat([rows.x[:, 0] for rows in batches]).long()
    return torch.cat([rows.columns[column] for rows in batches])


def assert_sequences_are_whole(batches: list[Rows], starts: set[int], total: int) -> None:
    """Assert that in a batch every row without `starts` continues the previous row's sequence."""
    for rows in batches:
        numbers = rows.x[:, 0].long().tolist()
        flags = rows.columns[STARTS].tolist()
        assert flags[0] is True
        for (before, row), flag in zip(pairwise(numbers), flags[1:], strict=True):
            assert flag == (row in starts)
            if not flag:
                assert row == before + 1
    # Across batches too: a sequence that is cut at the end of a batch continues in the next one.
    for before, row in pairwise(joined(batches).tolist()):
        assert row in starts or row == before + 1
    assert joined(batches)[:total].unique().numel() == total


CORPORA = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=3
).filter(lambda corpus: any(length > 1 for shard in corpus for length in shard))


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(
    corpus=CORPORA,
    batch_size=st.integers(1, 30),
    pool_rows=st.integers(1, 60),
    chunk_rows=st.integers(1, 20),
    whole=st.booleans(),
)
def test_columns_go_with_their_rows(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: Corpus,
    batch_size: int,
    pool_rows: int,
    chunk_rows: int,
    whole: bool,
) -> None:
    directory = write_corpus(tmp_path_factory.mktemp("c"), corpus, chunk_rows=chunk_rows)
    total = sum(map(sum, corpus))
    with ActivationStream(
        directory,
        batch_size=batch_size,
        pool_rows=pool_rows,
        columns=(LABELS, SCORES),
        whole_sequences=whole,
    ) as stream:
        batches = take(stream, -(-2 * total // batch_size))
    numbers = joined(batches)
    for epoch in range(2):
        served = numbers[epoch * total : (epoch + 1) * total]
        assert torch.equal(served.sort().values, torch.arange(total))
    assert torch.equal(joined(batches, LABELS), numbers % 5 - 1)
    assert torch.equal(joined(batches, SCORES), numbers.float() / 2)
    if whole:
        assert_sequences_are_whole(batches, begins(corpus), total)
    else:
        assert STARTS not in batches[0].columns


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(
    corpus=CORPORA,
    batch_size=st.integers(1, 20),
    pool_rows=st.integers(1, 60),
    before=st.integers(0, 8),
)
def test_a_resumed_stream_of_sequences_goes_on_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: Corpus,
    batch_size: int,
    pool_rows: int,
    before: int,
) -> None:
    directory = write_corpus(tmp_path_factory.mktemp("c"), corpus)

    def opened() -> ActivationStream:
        options: dict[str, Any] = {"columns": (LABELS,), "whole_sequences": True}
        return ActivationStream(directory, batch_size=batch_size, pool_rows=pool_rows, **options)

    with opened() as stream, opened() as resumed:
        take(stream, before)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        for ours, theirs in zip(take(resumed, 8), take(stream, 8), strict=True):
            assert torch.equal(ours.x, theirs.x)
            assert all(torch.equal(ours.columns[name], theirs.columns[name]) for name in (LABELS,))
            assert torch.equal(ours.columns[STARTS], theirs.columns[STARTS])


CORPUS = [[5, 1, 7, 3], [4, 6, 2, 2]]


def test_sequences_are_shuffled_over_all_shards(tmp_path: Path) -> None:
    directory = write_corpus(tmp_path, [[3] * 40, [3] * 40])
    with ActivationStream(directory, batch_size=60, whole_sequences=True) as stream:
        first, second = take(stream, 2)
    numbers = first.x[:, 0]
    assert 15 < int((numbers < 120).sum()) < 45  # expected 30
    documents = numbers[first.columns[STARTS]]
    assert len(documents) >= 20
    assert not torch.equal(documents, documents.sort().values)
    assert not torch.equal(numbers, second.x[:, 0])


def test_without_columns_rows_come_alone_and_in_the_same_order(tmp_path: Path) -> None:
    directory = write_corpus(tmp_path, CORPUS)
    with (
        ActivationStream(directory, batch_size=8) as plain,
        ActivationStream(directory, batch_size=8, columns=(LABELS,)) as labelled,
    ):
        assert plain.columns == {}
        assert plain.next_rows().columns == {}
        labelled.next_rows()
        assert torch.equal(plain.next_batch(), labelled.next_batch())


def test_an_entry_of_a_3d_dataset_is_a_sequence(tmp_path: Path) -> None:
    rows = numbered(0, 60)
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["activations"] = rows.view(12, 5, 2).numpy()
        file["rule"] = np.arange(60).reshape(12, 5) % 7
        file["score"] = np.arange(60) / 4
    with ActivationStream(
        tmp_path, batch_size=7, pool_rows=13, columns=("rule", "score"), whole_sequences=True
    ) as stream:
        batches = take(stream, 9)
    assert_sequences_are_whole(batches, set(range(0, 60, 5)), 60)
    assert torch.equal(joined(batches, "rule"), joined(batches) % 7)
    assert torch.equal(joined(batches, "score"), joined(batches) / 4)


@pytest.mark.parametrize("kind", ["shards", "tensor"])
def test_no_sequence_goes_on_over_a_dropped_row(tmp_path: Path, kind: str) -> None:
    rows = numbered(0, 40)
    rows[[0, 13, 14, 39], 1] = torch.nan
    columns = {"position": torch.arange(40), LABELS: torch.arange(40)}
    options: dict[str, Any] = {"batch_size": 6, "skip_nonfinite": True, "whole_sequences": True}
    if kind == "tensor":
        stream: Any = TensorStream(rows, columns=columns, **options)
    else:
        with h5py.File(tmp_path / "train.h5", "w") as file:
            file["activations"] = rows.numpy()
            for name, column in columns.items():
                file[name] = column.numpy()
        stream = ActivationStream(tmp_path, pool_rows=10, columns=(LABELS,), **options)
    batches = take(stream, 6)
    stream.close()
    assert set(joined(batches).tolist()) == set(range(40)) - {0, 13, 14, 39}
    assert torch.equal(joined(batches, LABELS), joined(batches))
    assert_sequences_are_whole(batches, {1, 15}, 36)


@pytest.mark.parametrize("kept", ["doc_id", "position"])
def test_either_dataset_tells_sequences(tmp_path: Path, kept: str) -> None:
    directory = write_corpus(tmp_path, CORPUS)
    for path in directory.glob("*.h5"):
        with h5py.File(path, "a") as file:
            del file["position" if kept == "doc_id" else "doc_id"]
    with ActivationStream(directory, batch_size=30, whole_sequences=True) as stream:
        assert_sequences_are_whole(take(stream, 1), begins(CORPUS), 30)


def test_a_tensor_serves_columns_and_sequences() -> None:
    count = sum(map(sum, CORPUS))
    begun = begins(CORPUS)
    documents = torch.tensor([row in begun for row in range(count)]).cumsum(0)
    columns = {"doc_id": documents, LABELS: torch.arange(count) % 5 - 1}
    stream = TensorStream(
        numbered(0, count), batch_size=7, columns=columns, whole_sequences=True, seed=3
    )
    batches = take(stream, 9)
    assert_sequences_are_whole(batches, begun, count)
    assert torch.equal(joined(batches, LABELS), joined(batches) % 5 - 1)
    first, second = joined(batches)[:count], joined(batches)[count : 2 * count]
    assert not torch.equal(first, second)
    assert (stream.columns[LABELS].minimum, stream.columns[LABELS].maximum) == (-1, 3)


def test_a_3d_tensor_has_a_sequence_in_every_entry() -> None:
    stream = TensorStream(numbered(0, 24).view(6, 4, 2), batch_size=12, whole_sequences=True)
    assert_sequences_are_whole(take(stream, 2), set(range(0, 24, 4)), 24)


@pytest.mark.parametrize("kind", ["shards", "tensor"])
def test_other_columns_are_not_those_of_the_position(tmp_path: Path, kind: str) -> None:
    directory = write_corpus(tmp_path, CORPUS)

    def opened(**columns: Tensor) -> Any:
        if kind == "tensor":
            return TensorStream(numbered(0, 30), batch_size=4, columns=columns)
        return ActivationStream(directory, batch_size=4, columns=(LABELS,))

    state = opened(rule=torch.zeros(30, dtype=torch.int64)).state_dict()
    with h5py.File(directory / "train_01.h5", "a") as file:
        file[LABELS][3] = 4
    other = opened(rule=torch.ones(30, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"differ from the ones that the checkpoint was made with"):
        other.load_state_dict(state)


@pytest.mark.parametrize("kind", ["shards", "tensor"])
def test_another_unit_of_the_shuffle_is_refused(tmp_path: Path, kind: str) -> None:
    directory = write_corpus(tmp_path, CORPUS)

    def opened(whole: bool) -> Any:
        if kind == "tensor":
            rows = numbered(0, 24).view(6, 4, 2)
            return TensorStream(rows, batch_size=4, whole_sequences=whole)
        return ActivationStream(directory, batch_size=4, whole_sequences=whole)

    state = opened(False).state_dict()
    older = {name: value for name, value in state.items() if name != "whole_sequences"}
    opened(False).load_state_dict(older)
    with pytest.raises(ValueError, match=r"whole_sequences is True, but .* with False"):
        opened(True).load_state_dict(older)


Spoil = Callable[[h5py.File], None]


def _replace(name: str, numbers: Any) -> Spoil:
    def spoil(file: h5py.File) -> None:
        del file[name]
        file[name] = numbers

    return spoil


def _remove(*names: str) -> Spoil:
    def spoil(file: h5py.File) -> None:
        for name in names:
            del file[name]

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove(LABELS), r"no dataset 'labels/rule'; it holds activations \(14, 2\), doc_id \(14"),
        (_replace(LABELS, np.zeros(13, int)), r"must have one number a row, shape \(14,\), got sh"),
        (_replace(LABELS, np.zeros((14, 2))), r"must have one number a row, .*got shape \(14, 2\)"),
        (_replace(LABELS, np.arange(14) - 2), "labels/rule: row 0 holds -2; a label is at least 0"),
        (
            _replace(LABELS, np.arange(14, dtype=np.uint64) + np.uint64(2**63 - 13)),
            "labels/rule: row 13 holds 9223372036854775808; a label is at most 9223372036854775807",
        ),
        (_replace(LABELS, np.full(14, np.inf)), "labels/rule: row 0 holds inf, labels must be fin"),
        (_replace(LABELS, np.full(14, 1e39)), "labels/rule: row 0 holds 1e.39, labels must be fin"),
        (_replace(LABELS, [b"a"] * 14), r"labels/rule holds \|S1|labels/rule holds object"),
        (_replace(LABELS, np.zeros(14)), "labels/rule is read as torch.float32, in .*_00.h5 as"),
        (_remove("doc_id", "position"), "no doc_id, no position, and .* not 3-D; it holds activ"),
        (_replace("position", np.zeros(5)), "dataset 'position' must have one number a row"),
    ],
)
def test_a_column_at_fault_is_one_line_with_shard_and_column(
    tmp_path: Path, spoil: Spoil, message: str
) -> None:
    directory = write_corpus(tmp_path, CORPUS)
    with h5py.File(directory / "train_01.h5", "a") as file:
        spoil(file)
    with pytest.raises(ShardError, match=message) as error:
        open_shards(directory, columns=(LABELS,), whole_sequences=True)
    assert str(error.value).startswith(f"{directory / 'train_01.h5'}: ")
    assert "\n" not in str(error.value)


def test_shards_without_neighbours_are_refused(tmp_path: Path) -> None:
    directory = write_corpus(tmp_path, [[1, 1, 1], [1, 1]])
    with pytest.raises(ShardError, match=r"train_00\.h5: no row continues the sequence of the row"):
        open_shards(directory, whole_sequences=True)


@pytest.mark.parametrize(
    ("columns", "whole", "message"),
    [
        ({"a": torch.zeros(7)}, False, r"a must have 6 numbers, one a row, got shape \(7,\)"),
        ({"a": torch.full((6,), torch.nan)}, False, "a: row 0 holds nan, labels must be finite"),
        ({"a": torch.full((6,), -3)}, False, "a: row 0 holds -3; a label is at least 0, or -1"),
        ({STARTS: torch.zeros(6)}, False, "'starts' is the name of what whole_sequences gives"),
        ({}, True, "no doc_id, no position, and the activations are not 3-D"),
        ({"position": torch.zeros(6)}, True, "no row continues the sequence of the row"),
    ],
)
def test_bad_columns_of_a_tensor_are_named(
    columns: dict[str, Tensor], whole: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TensorStream(numbered(0, 6), batch_size=2, columns=columns, whole_sequences=whole)


def test_columns_that_the_shards_were_not_opened_with_are_refused(tmp_path: Path) -> None:
    shards = open_shards(write_corpus(tmp_path, CORPUS), columns=(SCORES,))
    for options in ({"columns": (LABELS,)}, {"whole_sequences": True}):
        with pytest.raises(ValueError, match="the shards were opened without this column"):
            ActivationStream(shards, batch_size=4, **options)


def test_memory_counts_the_columns(tmp_path: Path) -> None:
    shards = write_corpus(tmp_path, CORPUS)
    plain = ActivationStream(shards, batch_size=5)
    more = ActivationStream(shards, batch_size=5, columns=(LABELS, SCORES))
    # A pool of 30 rows and one more block, six batches; 8 bytes a label, 4 a score.
    pooled = plain._plans[0].capacity
    assert more.memory_bytes - plain.memory_bytes == 12 * (pooled + 6 * 5)
