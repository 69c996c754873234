"""Iterators, DataLoaders and lists of tensors: order, length, epochs, resuming, held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

D_IN = 12
ROWS = torch.randn(320, D_IN, generator=torch.Generator().manual_seed(0)) + 3
PARTS = list(ROWS.split([1, 100, 7, 60, 152]))
SAE = SAEConfig(d_sae=40, k=4)
RUN = TrainConfig(batch_size=32, max_steps=10, lr=1e-2, log_every=1, eval_every=0)


class Shuffled(IterableDataset[torch.Tensor]):
    """Gives the rows in another order each time."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from ROWS[torch.randperm(len(ROWS))].split(64)


def _trainer(data: Any, run: TrainConfig = RUN, **beside: Any) -> Trainer:
    return Trainer(SAE, run, data, show_progress=False, **beside)


def _loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(ROWS), batch_size=50, **settings)


def _check_equal(one: Trainer, other: Trainer) -> None:
    weights, expected = one.sae.state_dict(), other.sae.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def _served(data: Any, batches: int, **settings: Any) -> torch.Tensor:
    """Return rows as a trainer gets them that has been made already."""
    source = _trainer(data, replace(RUN, **settings)).source
    source.set_transform(None)
    return torch.cat([source.next_batch() for _ in range(batches)])


def test_rows_come_in_their_order_whatever_the_parts_are() -> None:
    empty = torch.empty(0, D_IN)
    kinds = (
        PARTS,
        iter(PARTS),
        (part.numpy() for part in [empty, *PARTS]),
        _loader(),
        iter(_loader()),
        DataLoader(ROWS.double(), batch_size=64),  # type: ignore[arg-type]
    )
    for data in kinds:  # those that estimated mean and scale are served again
        assert torch.equal(_served(data, 10), ROWS)
    assert torch.equal(_served(PARTS, 25, max_steps=25), torch.cat([ROWS, ROWS, ROWS])[:800])
    given = [part.clone() for part in PARTS]
    _trainer(given).train()
    assert all(torch.equal(*pair) for pair in zip(given, PARTS, strict=True))


def test_how_long_a_run_is() -> None:
    open_end = replace(RUN, max_steps=None)
    assert _trainer(_loader(), open_end).total_steps == 10
    assert _trainer(_loader(drop_last=True), open_end).total_steps == 300 // 32
    assert _trainer(PARTS, replace(open_end, max_epochs=3)).total_steps == 30
    assert _trainer(iter(PARTS), replace(open_end, max_tokens=200)).total_steps == 6
    for data in (iter(PARTS), DataLoader(Shuffled(), batch_size=None)):
        with pytest.raises(ValueError, match=r"max_tokens or max_steps is missing: .* does not"):
            _trainer(data, open_end)
    with pytest.raises(ValueError, match="max_epochs = 2 is for other data: an iterator is read"):
        _trainer(iter(PARTS), replace(RUN, max_epochs=2))


def test_an_iterator_that_ends_before_the_run_is_told_of() -> None:
    trainer = _trainer(iter(PARTS[:3]), replace(RUN, max_steps=4))
    with pytest.raises(ValueError, match=r"the iterator ended after 108 rows .* needs more"):
        trainer.train()
    assert trainer.step == 3
    with pytest.raises(ValueError, match="list_iterator gives no rows"):
        _trainer(iter([]))


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["iterator", "loader", "seeded"])
def test_a_resumed_run_has_the_bits_of_a_straight_one(
    tmp_path: Path, kind: str, shuffle: bool
) -> None:
    def data() -> Any:
        generator = torch.Generator().manual_seed(7) if kind == "seeded" else None
        loader = _loader(shuffle=shuffle, generator=generator)
        if kind == "iterator":
            order = torch.randperm(640, generator=torch.Generator().manual_seed(int(shuffle)))
            return iter(torch.cat([ROWS, ROWS])[order].split(33))
        return loader

    run = replace(RUN, max_steps=16, checkpoint_dir=str(tmp_path / "run"), checkpoint_every=12)
    straight = _trainer(data(), run)
    straight.train()
    again = replace(run, resume_from=str(tmp_path / "run" / "checkpoints" / "step-00000012"))
    again = replace(again, checkpoint_dir=str(tmp_path / "again"))
    torch.manual_seed(5)  # what the caller has drawn before does not matter
    resumed = _trainer(data(), again)
    assert resumed.step == 12
    resumed.train()
    _check_equal(resumed, straight)
    other: Any = ROWS.flip(0).repeat(2, 1).split(32)
    other = iter(other) if kind == "iterator" else other
    with pytest.raises(
        ValueError,
        match="differ from the ones that the checkpoint was made with, or come in another",
    ):
        _trainer(other, replace(again, checkpoint_dir=None))


def test_the_first_rows_are_held_out_in_each_epoch() -> None:
    run = replace(RUN, max_steps=None, max_epochs=2, heldout_fraction=0.25)
    trainer = _trainer(PARTS, run)
    assert trainer.total_steps == 15
    assert torch.equal(torch.cat(list(trainer.data.heldout or [])), ROWS[:80])
    trainer.train()
    given = _trainer(torch.cat([ROWS[80:]]).split(9), replace(run, heldout_fraction=0.0))
    given.train()
    _check_equal(trainer, given)
    assert "heldout_fvu" in trainer.history[-1]
    trainer = _trainer(iter(PARTS), replace(RUN, max_steps=6, heldout_fraction=0.25))
    assert torch.equal(torch.cat(list(trainer.data.heldout or [])), ROWS[:64])


def test_held_out_rows_that_would_be_trained_on_are_refused() -> None:
    run = replace(RUN, max_steps=20, heldout_fraction=0.25)
    with pytest.raises(ValueError, match="the DataLoader shuffles, so the next epoch"):
        _trainer(_loader(shuffle=True), run)
    with pytest.raises(ValueError, match="the data come in another order than in the epoch"):
        _trainer(DataLoader(Shuffled(), batch_size=None), replace(run, max_steps=8)).train()
    _trainer(_loader(shuffle=True), replace(run, max_steps=7)).train()  # one epoch


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([ROWS[:4], ROWS[:4, :3]], r"each part must have shape \[n, 12\], got \[4, 3\]"),
        ([ROWS.reshape(2, 160, D_IN)], r"each part must have shape \[n, D\], got \[2, 160, 12\]"),
        (DataLoader(TensorDataset(ROWS, ROWS)), r"one tensor or array \[n, D\], got 2 of them"),
        ([[1.0]], r"one tensor or array \[n, D\], got float"),
        ([ROWS.long()], "must be float16, bfloat16, float32 or float64"),
        (TensorDataset(ROWS), "data must be a tensor or a NumPy array .*, got TensorDataset"),
        ("rows.npy", "data must be a tensor or a NumPy array .*, got str"),
    ],
)
def test_parts_that_are_no_rows_are_refused_in_a_line(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _trainer(data).train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"skip_nonfinite": True}, {"shuffle_seed": 3}])
def test_settings_without_an_effect_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs shards"):
        _trainer(PARTS, replace(RUN, **setting))
