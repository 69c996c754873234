"""NumPy arrays and memory maps train as tensors of the same numbers do, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

D_IN = 12
ROWS = torch.randn(320, D_IN, generator=torch.Generator().manual_seed(0)) + 3
SAE = SAEConfig(d_sae=40, k=4)
RUN = TrainConfig(batch_size=32, max_steps=6, lr=1e-2, log_every=1)


def _weights(data: Any, sae: SAEConfig = SAE, **beside: Any) -> dict[str, torch.Tensor]:
    return Trainer(sae, RUN, data, show_progress=False, **beside).train().state_dict()


def _check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_arrays_give_the_bits_of_tensors() -> None:
    expected = _weights(ROWS)
    array = ROWS.numpy()
    swapped = array.astype(array.dtype.newbyteorder())
    backwards = array[::-1].copy()[::-1]
    for given in (array, np.asfortranarray(array), swapped, backwards, array.astype(np.float64)):
        _check_equal(_weights(given), expected)


def test_a_memory_map_is_read_in_place_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, ROWS.half().numpy())
    mapped = np.load(path, mmap_mode="r")
    before = path.read_bytes()
    held = np.load(path, mmap_mode="r")[:50]
    trainer = Trainer(SAE, RUN, mapped, heldout=held, show_progress=False)
    _check_equal(trainer.train().state_dict(), _weights(ROWS.half(), heldout=ROWS[:50].half()))
    assert trainer.source.memory_bytes < 8 * len(ROWS) + 4 * 64 * D_IN  # no copy of the rows
    assert path.read_bytes() == before


def test_columns_are_arrays_too() -> None:
    sae = SAEConfig(d_sae=40, k=4, transcoder=True)
    targets = torch.randn(len(ROWS), 5, generator=torch.Generator().manual_seed(1))
    expected = _weights(ROWS, sae, columns={"targets": targets})
    _check_equal(_weights(ROWS.numpy(), sae, columns={"targets": targets.numpy()}), expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones((4, D_IN), np.int64), "must be float16, bfloat16, float32 or float64"),
        (np.ones((4, D_IN), np.complex256), "data: no tensor holds elements of type complex256"),
        (np.array(["a"]), "data: no tensor holds elements of type <U1"),
        (np.ones(4, np.float32), r"must be \[n, D\].* got shape \(4,\)"),
        (np.full((4, D_IN), np.nan), "row 0 holds NaN"),
    ],
)
def test_an_array_that_cannot_be_trained_on_is_refused_in_a_line(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _weights(rows)
    assert "\n" not in str(caught.value)
