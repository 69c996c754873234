"""Targets go with their rows through every stream, from one shard or from two directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from sae_fast.activations import (
    TARGETS,
    ActivationStream,
    HeldOut,
    Rows,
    ShardError,
    ShardSet,
    TensorStream,
    Transform,
    estimate_normalization,
    find_shards,
    find_targets,
    open_shards,
    write_manifest,
    write_shard,
)

SIZES = (70, 31, 50)
ROWS, D_IN, D_OUT = sum(SIZES), 4, 3
OPTIONS: dict[str, Any] = {"batch_size": 16, "seed": 3, "pool_rows": 40}


def inputs(first: int, count: int) -> Tensor:
    """Return rows [count, 4] with their own number in column 0."""
    rows = torch.ones(count, D_IN)
    rows[:, 0] = torch.arange(first, first + count)
    return rows


def targets_of(x: Tensor) -> Tensor:
    """Return the targets [N, 3] of rows, with the rows' number in column 1."""
    number = x[:, :1]
    return torch.cat([-torch.ones_like(number), number, 2 * number], dim=1)


def write_pairs(parent: Path, **options: Any) -> tuple[Path, Path]:
    """Write shards to one directory and their targets to another."""
    directories = parent / "inputs", parent / "outputs"
    first = 0
    for number, size in enumerate(SIZES):
        name, x = f"train_{number:02d}.h5", inputs(first, size)
        documents = torch.arange(first, first + size) // 9
        for directory, rows in zip(directories, (x, targets_of(x)), strict=True):
            directory.mkdir(exist_ok=True)
            write_shard(directory / name, rows, doc_id=documents, chunk_rows=8, **options)
        first += size
    return directories


def write_together(parent: Path, dtype: type = np.float32) -> Path:
    """Write rows and targets as two datasets of each shard."""
    inner, outer = write_pairs(parent)
    for path in inner.iterdir():
        with h5py.File(path, "a") as file, h5py.File(outer / path.name) as other:
            file["outputs"] = other["activations"][:].astype(dtype)
    return inner


def opened(shards: Path, place: Path | None, key: str = "activations", **options: Any) -> ShardSet:
    paths = find_shards(shards)[0]
    return open_shards(paths, targets=find_targets(paths, place, key), **options)


def together(parent: Path, **options: Any) -> ShardSet:
    return opened(write_together(parent), None, "outputs", **options)


def apart(parent: Path, **options: Any) -> ShardSet:
    return opened(*write_pairs(parent), **options)


Opener = Callable[..., ShardSet]
BOTH = pytest.mark.parametrize("arrange", [together, apart])


def an_epoch(stream: Any) -> list[Rows]:
    return [stream.next_rows() for _ in range(ROWS // OPTIONS["batch_size"])]


@BOTH
@pytest.mark.parametrize("pool_rows", [40, 1000])
def test_every_row_comes_with_its_target(arrange: Opener, pool_rows: int, tmp_path: Path) -> None:
    shards = arrange(tmp_path)
    with ActivationStream(shards, **{**OPTIONS, "pool_rows": pool_rows}) as stream:
        batches = an_epoch(stream)
    x = torch.cat([rows.x for rows in batches])
    assert len(x[:, 0].unique()) == len(x)
    assert not torch.equal(x[:, 0], x[:, 0].sort().values)
    assert torch.equal(torch.cat([rows.columns[TARGETS] for rows in batches]), targets_of(x))
    assert shards.columns[TARGETS].width == D_OUT


@BOTH
@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "float32")])
def test_targets_as_stored_are_widened_too(
    arrange: Opener, dtypes: tuple[str, str], tmp_path: Path
) -> None:
    if arrange is together:
        shards = opened(write_together(tmp_path, np.dtype(dtypes[1]).type), None, "outputs")
        stored = torch.float32, getattr(torch, dtypes[1])
    else:
        shards = opened(*write_pairs(tmp_path, dtype=dtypes[0]))
        stored = (getattr(torch, dtypes[0]),) * 2
    of_x, of_targets = Transform(torch.ones(D_IN), 0.5), Transform(torch.full((D_OUT,), 2.0), 0.1)
    settings = {**OPTIONS, "transform": of_x, "target_transform": of_targets}
    with (
        ActivationStream(shards, **settings) as plain,
        ActivationStream(shards, as_stored=True, **settings) as stream,
    ):
        for expected in an_epoch(plain):
            batch = stream.next_stored(0, 1)
            assert (batch.rows.x.dtype, batch.rows.columns[TARGETS].dtype) == stored
            wide = batch.widened()
            assert torch.equal(wide.x, expected.x)
            assert torch.equal(wide.columns[TARGETS], expected.columns[TARGETS])


@BOTH
def test_targets_do_not_change_the_order_of_the_rows(arrange: Opener, tmp_path: Path) -> None:
    shards = arrange(tmp_path)
    plain = open_shards([shard.path for shard in shards.shards])
    with ActivationStream(shards, **OPTIONS) as one, ActivationStream(plain, **OPTIONS) as other:
        for _ in range(20):
            assert torch.equal(one.next_batch(), other.next_batch())


def test_both_are_normalised_each_by_its_own(tmp_path: Path) -> None:
    shards = apart(tmp_path)
    assert shards.targets is not None
    x_mean, y_mean = torch.arange(4.0), torch.arange(3.0)
    transforms = {
        "transform": Transform(x_mean, 0.5),
        "target_transform": Transform(y_mean, 0.25),
    }
    x, y = inputs(0, ROWS), targets_of(inputs(0, ROWS))
    sources: list[Any] = [
        ActivationStream(shards, **OPTIONS, **transforms),
        TensorStream(x, targets=y, batch_size=16, **transforms),
    ]
    for source in sources:
        batch = source.next_rows()
        raw = batch.x / 0.5 + x_mean
        assert torch.equal(batch.columns[TARGETS], (targets_of(raw) - y_mean) * 0.25)
        source.close()
    mean, scale = estimate_normalization(shards.targets, None)
    torch.testing.assert_close(mean, y.mean(0))
    lengths = ((y - mean) * scale).norm(dim=1)
    torch.testing.assert_close(lengths.mean(), torch.tensor(D_OUT).sqrt())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_targets_are_read_in_every_stored_type(dtype: str, tmp_path: Path) -> None:
    shards = opened(*write_pairs(tmp_path, dtype=dtype))
    with ActivationStream(shards, **OPTIONS) as stream:
        batch = stream.next_rows()
    assert batch.columns[TARGETS].dtype == torch.float32
    expected = targets_of(batch.x)
    assert torch.equal(batch.columns[TARGETS], expected.to(getattr(torch, dtype)).float())


def test_targets_may_have_another_type_than_the_rows(tmp_path: Path) -> None:
    shards = opened(write_together(tmp_path, np.float16), None, "outputs")
    assert shards.storage is not shards.targets.storage  # type: ignore[union-attr]
    with ActivationStream(shards, **OPTIONS) as stream:
        batch = stream.next_rows()
    assert torch.equal(batch.columns[TARGETS], targets_of(batch.x))


@BOTH
def test_a_resumed_stream_goes_on_with_the_same_pairs(arrange: Opener, tmp_path: Path) -> None:
    shards = arrange(tmp_path)
    with ActivationStream(shards, **OPTIONS) as stream:
        an_epoch(stream)
        state = stream.state_dict()
        expected = stream.next_rows()
    with ActivationStream(shards, **OPTIONS) as again:
        again.load_state_dict(state)
        rows = again.next_rows()
    assert torch.equal(rows.x, expected.x)
    assert torch.equal(rows.columns[TARGETS], expected.columns[TARGETS])


@BOTH
def test_other_targets_are_not_those_of_the_position(arrange: Opener, tmp_path: Path) -> None:
    shards = arrange(tmp_path)
    with ActivationStream(shards, **OPTIONS) as stream:
        stream.next_rows()
        state = stream.state_dict()
    assert shards.targets is not None
    target = shards.targets.shards[1]
    with h5py.File(target.path, "a") as file:
        file[target.key][0] += 1
        file.attrs.pop("checksum", None)
    again = open_shards(
        [shard.path for shard in shards.shards],
        targets=find_targets(
            [shard.path for shard in shards.shards], target.path.parent, target.key
        ),
    )
    with (
        ActivationStream(again, **OPTIONS) as stream,
        pytest.raises(ValueError, match=r"train_01\.h5 has other content"),
    ):
        stream.load_state_dict(state)


def test_other_targets_of_a_tensor_are_noticed_too() -> None:
    x = inputs(0, ROWS)
    state = TensorStream(x, targets=targets_of(x), batch_size=8).state_dict()
    other = TensorStream(x, targets=targets_of(x) + 1, batch_size=8)
    with pytest.raises(
        ValueError, match="the activations differ from the ones that the checkpoint was made with"
    ):
        other.load_state_dict(state)


@BOTH
@pytest.mark.parametrize("side", ["rows", "targets"])
def test_a_row_that_is_not_finite_is_dropped_with_its_partner(
    arrange: Opener, side: str, tmp_path: Path
) -> None:
    shards = arrange(tmp_path)
    assert shards.targets is not None
    shard = (shards if side == "rows" else shards.targets).shards[1]
    with h5py.File(shard.path, "a") as file:
        file[shard.key][5, 1] = np.nan
        file.attrs.pop("checksum", None)
    paths = [shard.path for shard in shards.shards]
    target = shards.targets.shards[0]
    files = find_targets(paths, target.path.parent, target.key)
    with pytest.raises(ShardError, match=r"train_01\.h5: row 5.* holds NaN") as caught:
        open_shards(paths, targets=files)
    assert str(shard.path) in str(caught.value)
    again = open_shards(paths, targets=files, skip_nonfinite=True)
    assert (again.rows, again.nonfinite_rows) == (ROWS - 1, 1)
    with ActivationStream(again, batch_size=ROWS - 1, pool_rows=40) as stream:
        x, columns = stream.next_rows()
    assert not (x[:, 0] == SIZES[0] + 5).any()
    assert torch.equal(columns[TARGETS], targets_of(x))


@pytest.mark.parametrize("side", ["activations", "targets"])
def test_a_pair_of_a_tensor_that_is_not_finite_is_dropped(side: str) -> None:
    parts = {"activations": inputs(0, 20), "targets": targets_of(inputs(0, 20))}
    parts[side][7, 0] = torch.inf
    with pytest.raises(ValueError, match=f"{side}: row 7 holds NaN or Inf"):
        TensorStream(**parts, batch_size=4)
    stream = TensorStream(**parts, batch_size=19, skip_nonfinite=True)
    x, columns = stream.next_rows()
    assert not (x[:, 0] == 7).any()
    assert torch.equal(columns[TARGETS][:, 1], x[:, 0])


def test_held_out_rows_and_targets_come_in_step(tmp_path: Path) -> None:
    shards = apart(tmp_path)
    assert shards.targets is not None
    pairs = zip(HeldOut(shards, batch_size=40), HeldOut(shards.targets, batch_size=40), strict=True)
    assert sum(len(x) for x, y in pairs if torch.equal(y, targets_of(x))) == ROWS


def test_whole_sequences_come_with_targets(tmp_path: Path) -> None:
    shards = apart(tmp_path, whole_sequences=True)
    with ActivationStream(shards, **OPTIONS) as stream:
        x, columns = stream.next_rows()
    assert torch.equal(columns[TARGETS], targets_of(x))
    goes_on = ~columns["starts"][1:]
    assert goes_on.any()
    assert (x[1:, 0] - x[:-1, 0])[goes_on].eq(1).all()


def _shorter(inner: Path, outer: Path) -> None:
    write_shard(outer / "train_01.h5", targets_of(inputs(0, 30)))


def _lacking(inner: Path, outer: Path) -> None:
    (outer / "train_02.h5").unlink()


def _more(inner: Path, outer: Path) -> None:
    write_shard(outer / "train_03.h5", targets_of(inputs(0, 30)))


def _wider(inner: Path, outer: Path) -> None:
    write_shard(outer / "train_01.h5", torch.randn(SIZES[1], D_OUT + 1))


def _other_text(inner: Path, outer: Path) -> None:
    documents = torch.zeros(SIZES[1], dtype=torch.int64)
    write_shard(outer / "train_01.h5", torch.randn(SIZES[1], D_OUT), doc_id=documents)


def _cut_off(inner: Path, outer: Path) -> None:
    whole = (outer / "train_01.h5").read_bytes()
    (outer / "train_01.h5").write_bytes(whole[: len(whole) // 2])


def _damaged(inner: Path, outer: Path) -> None:
    write_manifest(outer)
    with h5py.File(outer / "train_01.h5", "a") as file:
        file["activations"][3] += 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_shorter, r"outputs/train_01\.h5: 'activations' has 30 rows of targets, .*has 31 rows"),
        (_lacking, r"outputs: has no train_02\.h5 with the targets of .*inputs/train_02\.h5"),
        (_more, r"outputs/train_03\.h5: holds targets of no shard, none has its name"),
        (_wider, r"outputs/train_01\.h5: rows are 4 wide, but 3 wide in .*train_00\.h5"),
        (
            _other_text,
            r"outputs/train_01\.h5: row \d+ belongs to another token .*: doc_id is 0",
        ),
        (_cut_off, r"outputs/train_01\.h5: cannot be opened: truncated"),
        (_damaged, r"outputs/train_01\.h5: damaged: its SHA-256 is not the one in manifest"),
    ],
)
def test_targets_that_do_not_go_with_the_rows_are_one_line(
    spoil: Callable[[Path, Path], None], message: str, tmp_path: Path
) -> None:
    directories = write_pairs(tmp_path)
    spoil(*directories)
    with pytest.raises(ShardError, match=message) as caught:
        opened(*directories)
    assert "\n" not in str(caught.value)


def test_a_target_key_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    shards = write_together(tmp_path)
    message = (
        r"no dataset 'outs'; it holds activations \(70, 4\), .*outputs \(70, 3\).*--target-key"
    )
    with pytest.raises(ShardError, match=message):
        opened(shards, None, "outs")


def test_a_place_without_targets_is_named(tmp_path: Path) -> None:
    inner, outer = write_pairs(tmp_path)
    with pytest.raises(ShardError, match="nowhere: no such directory or file of targets"):
        opened(inner, tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"train_00\.h5: targets of one shard, but there are 3"):
        opened(inner, outer / "train_00.h5")


def test_one_file_may_hold_the_targets_of_one_shard(tmp_path: Path) -> None:
    inner, outer = write_pairs(tmp_path)
    (outer / "train_01.h5").rename(tmp_path / "other.h5")
    shards = opened(inner / "train_01.h5", tmp_path / "other.h5")
    with ActivationStream(shards, batch_size=8) as stream:
        x, columns = stream.next_rows()
    assert torch.equal(columns[TARGETS], targets_of(x))


@pytest.mark.parametrize("shape", [(19, 3), (20,), (4, 5, 3)])
def test_targets_of_a_tensor_must_be_a_row_each(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"targets must have one row for each of the activations"):
        TensorStream(inputs(0, 20), targets=torch.ones(shape), batch_size=4)
