"""metrics.jsonl: one row a step, also after kills and resumes."""

import json
from pathlib import Path

import pytest
import torch

from sae_fast.training.metrics import MetricsLog, fetch


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_fetch_keeps_every_bit_of_float32() -> None:
    values = {"a": torch.tensor(0.1), "b": torch.tensor(3, dtype=torch.int64)}
    assert fetch(values) == {"a": float(torch.tensor(0.1)), "b": 3.0}
    assert fetch({}) == {}


def test_rewind_drops_later_rows_and_half_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": step / 7})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    again = MetricsLog(path)
    again.rewind(20)
    again.write({"step": 30, "loss": 1.0})
    assert [row["step"] for row in _lines(path)] == [10, 20, 30]
    assert _lines(path) == again.rows
    assert again.rows[1]["loss"] == 20 / 7


def test_rewind_without_a_file_starts_empty(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "none.jsonl")
    log.rewind(5)
    log.flush()
    assert log.rows == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_become_null(tmp_path: Path, value: float) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "grad_norm": value})
    assert _lines(tmp_path / "metrics.jsonl") == [{"step": 1, "grad_norm": None}]
