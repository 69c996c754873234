"""`--mesh data=2,latents=2`, and runs that continue with another mesh."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import mesh_worker
import pytest
import several_ranks
import torch
from mesh_worker import CASES
from several_ranks import assert_near, tensors_of

from sae_fast.training import run_directory


def _ended(place: Path, size: int) -> list[dict[str, Any]]:
    ends = several_ranks.run("mesh_worker", place, size)
    codes = [0] * size if size == 2 else [0, 0, 0, -signal.SIGKILL]  # which the last one ends with
    assert [end.returncode for end in ends] == codes, "".join(end.stderr for end in ends)
    names = [f"{size}-rank-{rank}.pt" for rank in range(size)]
    if size == 4:
        names[3] = "rank-3.pt"
    return [torch.load(place / name, weights_only=False) for name in names]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mesh")


@pytest.fixture(scope="module")
def ranks(place: Path) -> dict[int, list[dict[str, Any]]]:
    """Return what two, one and four processes have done, in this order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {2: _ended(place, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
        found[1] = [{"began": mesh_worker.continued(place / "chain"), "history": {}}]
        for case in CASES:
            trainer = mesh_worker.trainer_of(case, place / "one" / case, None)
            trainer.train()
            found[1][0]["history"][case] = trainer.history
    torch.set_num_threads(threads)
    return found | {4: _ended(place, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_batches_and_latents_are_divided_at_once(
    ranks: dict[int, list[dict[str, Any]]], place: Path, case: str
) -> None:
    assert_near(tensors_of(place / "one" / case), tensors_of(place / "four" / case))
    assert [found["shape"] for found in ranks[4]] == [(33, 16), (34, 16)] * 2
    rows = [found["history"][case] for found in (*ranks[1], *ranks[4])]
    for expected, *found in zip(*rows, strict=True):
        for name in ("loss", "fvu", "l0", "grad_norm", "heldout_fvu", "gram_mean"):
            if name in expected:
                for row in found:
                    assert row[name] == pytest.approx(expected[name], 1e-4)
    assert "heldout_fvu" in rows[0][3]


@pytest.mark.slow
def test_a_run_is_continued_with_equal_bits_by_the_same_mesh(
    ranks: dict[int, list[dict[str, Any]]], place: Path
) -> None:
    assert [found["continues"] for found in ranks[4]] == [4] * 4
    whole, stopped = tensors_of(place / "four/topk"), tensors_of(place / "stopped")
    for name, tensor in whole.items():
        assert torch.equal(tensor, stopped[name]), name


@pytest.mark.slow
def test_a_run_is_continued_by_every_other_mesh(
    ranks: dict[int, list[dict[str, Any]]], place: Path
) -> None:
    assert [found["began"] for found in ranks[2]] == [[0, 2, 3]] * 2
    assert ranks[1][0]["began"] == [4]
    assert [found["began"] for found in ranks[4]] == [[6]] * 4
    assert_near(tensors_of(place / "one/topk"), tensors_of(place / "chain"))


@pytest.mark.slow
def test_a_block_that_is_no_longer_equal_is_named(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in ranks[4]:
        assert found["disturbed"] == "rank 3 differs from rank 1 in the latents 33 to 66 (W_enc)"


@pytest.mark.slow
def test_the_processes_of_a_machine_exchange_bytes(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for rank, found in enumerate(ranks[4]):
        numbers, parts = found["swapped"]
        assert numbers == ([0, 1] if rank < 2 else [2, 3])
        assert [part.tolist() for part in parts] == [[n] * (rank % 2 + 1) for n in numbers]


@pytest.mark.slow
def test_a_number_that_is_not_finite_in_one_process_ends_all(
    ranks: dict[int, list[dict[str, Any]]],
) -> None:
    for found in ranks[4]:
        assert found["spoilt"].startswith("step 4: the loss is nan")


@pytest.mark.slow
def test_a_shard_that_one_process_cannot_read_is_named_by_all(
    ranks: dict[int, list[dict[str, Any]]],
) -> None:
    lost = "shard_00003.h5: No such file or directory"
    assert [found["lost shard"] for found in ranks[2]] == [f"rank 1: {lost}", lost]
    alone = "the training before has failed here and not in rank 0: start all processes again"
    assert [found["afterwards"] for found in ranks[2]] == [f"rank 1: {lost}", alone]


@pytest.mark.slow
def test_a_disk_that_is_full_ends_all(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in ranks[4]:
        assert found["full disk"].startswith("rank 1: ")
        assert "File too large" in found["full disk"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_by_all(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for found in ranks[4][:3]:
        assert found["killed"] == "rank 3 has ended, or did not answer in time"


@pytest.mark.slow
def test_sixteen_processes_train_what_one_trains(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
    ends = several_ranks.run("mesh_worker", place, 16)
    assert [end.returncode for end in ends] == [0] * 16, "".join(end.stderr for end in ends)
    one = {"grad_acc_steps": 4, "max_steps": 2}
    mesh_worker.trainer_of("topk", place / "one of sixteen", None, **one).train()
    assert_near(tensors_of(place / "one of sixteen"), tensors_of(place / "sixteen"))
