"""Several processes refuse what they cannot train: one line of process 0, exit code 2 of all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import several_ranks
import torch
from refusals_worker import FLAGS, GONE

REASONS = {
    "version": "rank 1 differs from rank 0 in the version of sae_fast: '0.0.1' and not '",
    "torch": "rank 1 differs from rank 0 in the version of torch: '1.13.0' and not '",
    "NCCL": "is without NCCL",
    **{name: reason for name, (_, reason) in FLAGS.items()},
    "device": "rank 1 differs from rank 0 in its device: 'meta' and not 'cpu'",
    "one shard gone": "rank 1 differs from rank 0 in its shards",
    **{name: reason for name, (_, reason) in GONE.items()},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what two processes have said."""
    directory = tmp_path_factory.mktemp("refusals")
    (directory / "sweep.json").write_text(json.dumps({"k": [1, 2]}))
    (directory / "one.json").write_text(json.dumps({"k": [1]}))
    ends = several_ranks.run("refusals_worker", directory)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr + ends[1].stderr
    return [torch.load(directory / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", REASONS)
def test_several_processes_refuse_in_one_line(ranks: list[dict[str, Any]], name: str) -> None:
    (code, printed), other = (found[name] for found in ranks)
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (2, 1), printed
    assert REASONS[name] in lines[0]
    assert other == (2, "")


@pytest.mark.slow
def test_more_processes_than_rows_are_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "more processes than there are rows, 1" in found["few rows"]
