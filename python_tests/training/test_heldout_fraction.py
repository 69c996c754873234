"""Held-out rows are the last ones of the data, and never trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.activations import write_shard
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

D_IN = 12
ROWS = torch.randn(320, D_IN, generator=torch.Generator().manual_seed(0)) + 3
SAE = SAEConfig(d_sae=40, k=4)
RUN = TrainConfig(batch_size=32, max_steps=6, lr=1e-2, log_every=1, eval_every=3)


def _trainer(run: TrainConfig, data: Any = None, sae: SAEConfig = SAE, **beside: Any) -> Trainer:
    return Trainer(sae, run, data, show_progress=False, **beside)


def _held(trainer: Trainer) -> torch.Tensor:
    assert trainer.data.heldout is not None
    return torch.cat([batch.clone() for batch in trainer.data.heldout])


def _served(trainer: Trainer, rows: int) -> torch.Tensor:
    """Return the rows of an epoch as they are stored, in the order of their first number."""
    source = trainer.source
    source.set_transform(None)
    assert source.rows_per_epoch == rows
    served = torch.cat([source.next_batch() for _ in range(-(-rows // 32))])[:rows]
    return served[served[:, 0].argsort()]


def _sorted(rows: torch.Tensor) -> torch.Tensor:
    return rows[rows[:, 0].argsort()]


def _write(directory: Path, *lengths: int, rows: torch.Tensor = ROWS, **columns: Any) -> Path:
    directory.mkdir()
    for number, part in enumerate(rows.split(lengths)):
        first = sum(lengths[:number])
        beside = {name: column[first : first + len(part)] for name, column in columns.items()}
        write_shard(directory / f"{number}.h5", part, **beside)
    return directory


@pytest.mark.parametrize("shape", [(320, D_IN), (40, 8, D_IN)])
def test_a_tensor_is_cut_as_if_both_parts_were_given(shape: tuple[int, ...]) -> None:
    cut = _trainer(replace(RUN, heldout_fraction=0.25), ROWS.reshape(shape).numpy())
    given = _trainer(RUN, ROWS[:240].reshape(-1, *shape[1:]), heldout=ROWS[240:])
    weights, expected = cut.train().state_dict(), given.train().state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert cut.history[-1]["heldout_fvu"] == given.history[-1]["heldout_fvu"]


def test_targets_are_cut_with_their_rows() -> None:
    sae = SAEConfig(d_sae=40, k=4, transcoder=True)
    targets = torch.randn(320, 5, generator=torch.Generator().manual_seed(1))
    columns = {"targets": targets}
    cut = _trainer(replace(RUN, heldout_fraction=0.25), ROWS, sae, columns=columns)
    beside = {"heldout_columns": {"targets": targets[240:]}, "heldout": ROWS[240:]}
    given = _trainer(RUN, ROWS[:240], sae, columns={"targets": targets[:240]}, **beside)
    cut.train(), given.train()
    assert cut.history[-1]["heldout_fvu"] == given.history[-1]["heldout_fvu"]


def test_rows_that_are_not_finite_are_dropped_from_both_parts() -> None:
    rows = ROWS.clone()
    rows[[3, 300]] = torch.nan
    run = replace(RUN, heldout_fraction=0.25)
    with pytest.raises(ValueError, match="held-out rows: row 60 holds NaN or Inf"):
        _trainer(run, torch.cat([ROWS[:240], rows[240:]]))
    trainer = _trainer(replace(run, skip_nonfinite=True), rows)
    assert torch.equal(_held(trainer), torch.cat([ROWS[240:300], ROWS[301:]]))
    assert trainer.source.nonfinite_rows == 1


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(320,), (100, 140, 80), (200, 60, 60)])
@pytest.mark.parametrize("verify", ["full", "lazy", "off"])
def test_shards_are_cut_within_a_shard_and_between_two(
    tmp_path: Path, lengths: tuple[int, ...], verify: Any
) -> None:
    directory = str(_write(tmp_path / "shards", *lengths))
    run = replace(RUN, shard_dir=directory, heldout_fraction=0.25, verify=verify)
    trainer = _trainer(run)
    assert torch.equal(_held(trainer), ROWS[240:])
    assert torch.equal(_served(trainer, 240), _sorted(ROWS[:240]))
    assert trainer.source.nonfinite_rows == 0
    trainer.close()
    trainer = _trainer(run)
    trainer.train()
    assert "heldout_fvu" in trainer.history[-1]


def test_a_folder_of_pt_files_is_cut(tmp_path: Path) -> None:
    for number, part in enumerate(ROWS.split(100)):
        torch.save(part.clone(), tmp_path / f"{number}.pt")
    trainer = _trainer(replace(RUN, shard_dir=str(tmp_path), heldout_fraction=0.5))
    assert torch.equal(_held(trainer), ROWS[160:])
    assert torch.equal(_served(trainer, 160), _sorted(ROWS[:160]))
    trainer.close()


def test_each_directory_of_a_mix_is_cut(tmp_path: Path) -> None:
    one = _write(tmp_path / "one", 100, 60, rows=ROWS[:160])
    two = _write(tmp_path / "two", 160, rows=ROWS[160:])
    trainer = _trainer(replace(RUN, mix=(f"{one}:1", f"{two}:1"), heldout_fraction=0.25))
    assert torch.equal(_held(trainer), torch.cat([ROWS[120:160], ROWS[280:]]))
    expected = _sorted(torch.cat([ROWS[:120], ROWS[160:280]]))
    assert torch.equal(_served(trainer, 240), expected)
    trainer.close()


def test_sequences_are_cut_at_the_same_row(tmp_path: Path) -> None:
    place = torch.arange(320)
    directory = _write(tmp_path / "shards", 320, doc_id=place // 16, position=place % 16)
    sae = SAEConfig(d_sae=40, k=4, temporal_smoothness_coeff=0.1)
    trainer = _trainer(replace(RUN, shard_dir=str(directory), heldout_fraction=0.26), None, sae)
    assert torch.equal(_held(trainer), ROWS[237:])
    assert torch.equal(_served(trainer, 237), _sorted(ROWS[:237]))
    trainer.close()


def test_a_run_is_resumed_with_the_same_part_only(tmp_path: Path) -> None:
    directory = str(_write(tmp_path / "shards", 200, 120))
    run = replace(RUN, shard_dir=directory, heldout_fraction=0.25)
    run = replace(run, checkpoint_dir=str(tmp_path / "run"), checkpoint_every=3)
    _trainer(replace(run, max_steps=3, decay_fraction=0.0)).train()
    again = replace(run, resume_from="latest")
    with pytest.raises(ValueError, match="differ from the ones that the checkpoint was made with"):
        _trainer(replace(again, heldout_fraction=0.5))
    assert _trainer(again).train().d_sae == 40


@pytest.mark.parametrize("fraction", [0.25, 0.999])
def test_a_part_that_cannot_be_cut_is_refused_in_a_line(tmp_path: Path, fraction: float) -> None:
    run = replace(RUN, heldout_fraction=fraction)
    if fraction > 0.9:
        with pytest.raises(ValueError, match="of 320 rows leaves none to train on"):
            _trainer(run, ROWS)
        return
    with pytest.raises(ValueError, match=r"heldout_fraction = 0\.25, and a tensor: give one"):
        _trainer(run, ROWS, heldout=ROWS)
    with pytest.raises(ValueError, match=r"heldout = 'x', and heldout_fraction = 0\.25: give"):
        replace(run, heldout="x")
    directory = _write(tmp_path / "shards", 320)
    (directory / "0.h5").rename(directory / "heldout_0.h5")
    write_shard(directory / "1.h5", ROWS)
    with pytest.raises(ValueError, match=r"without held-out shards, and there is .*heldout_0\.h5"):
        _trainer(replace(run, shard_dir=str(directory)))
