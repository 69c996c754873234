"""`--mesh latents=R`: processes that hold a block of the latents each."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import latents_worker
import pytest
import several_ranks
import torch
from latents_worker import CASES, MANY, STEPS
from safetensors.torch import load_file
from several_ranks import assert_near, tensors_of
from torch import Tensor

from sae_fast import SAEConfig, SparseAutoencoder
from sae_fast.distributed.ranks import Ranks
from sae_fast.training import run_directory
from sae_fast.training.latent_rows import _merged

RUNS = ("one started", "two started")
_OF_TIME = ("tokens_per_second", "time_per_step_ms", "reader_stall_fraction")
_OF_RANKS = ("exchanged_bytes", "communication_fraction")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of what one process trains; leave also a run that was stopped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
        for case in CASES:
            trainer = latents_worker.trainer_of(case, place / "one" / case)
            trainer.train()
            found[case] = trainer.history
    half = [latents_worker.At(4, latents_worker.stop)]
    latents_worker.trainer_of("topk", place / "half", half).train()
    start = str(place / "half/checkpoints/latest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
        latents_worker.trainer_of("topk", place / "one started", start_from=start).train()
    many = {"d_in": 16, "d_sae": MANY}
    SparseAutoencoder(SAEConfig(**latents_worker.CASES["topk"] | many)).save(place / "many")
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def ranks(place: Path, alone: object) -> list[dict[str, Any]]:
    """Return what two processes have done together."""
    ends = several_ranks.run("latents_worker", place)
    assert [end.returncode for end in ends] == [0, -signal.SIGKILL], ends[0].stderr + ends[1].stderr
    return [torch.load(place / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_latents_are_trained_as_by_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any], place: Path, case: str
) -> None:
    assert_near(tensors_of(place / "one" / case), tensors_of(place / "two" / case))
    assert [found["shapes"][case] for found in ranks] == [(33, 16), (34, 16)]
    best = [(place / run / case / "checkpoints/best").readlink() for run in ("one", "two")]
    assert best[0] == best[1]
    rows = [found["history"][case] for found in ranks]
    assert len(rows[0]) == len(alone[case]) == STEPS
    for expected, row, same in zip(alone[case], *rows, strict=True):
        assert expected.keys() == row.keys() - {*_OF_RANKS}
        for name in expected.keys() - {*_OF_TIME}:
            near = None if expected[name] is None else pytest.approx(expected[name], 1e-4, 1e-6)
            assert row[name] == near, name
            assert row[name] == same[name], name


@pytest.mark.slow
def test_what_evaluations_exchange_is_not_counted(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        rows = found["history"]["relu"]
        assert {row["step"] for row in rows if "heldout_fvu" in row} == {4, 8}
        assert len({row["exchanged_bytes"] for row in rows}) == 1
        assert all(0 < row["communication_fraction"] < 1 for row in rows)


@pytest.mark.slow
def test_the_summary_names_a_checkpoint_that_is_there(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["checkpoint"] is None
    assert Path(ranks[0]["checkpoint"]).name == "step-00000008"
    assert Path(ranks[0]["checkpoint"]).is_dir()


@pytest.mark.slow
def test_the_cases_train_dead_latents_and_both_forms_of_codes(
    alone: dict[str, list[dict[str, Any]]],
) -> None:
    for case in ("topk", "few dead", "multi_topk", "batch_topk", "matryoshka"):
        assert any(row["aux_loss"] > 0 for row in alone[case]), case
    few = [row["dead_fraction"] for row in alone["few dead"] if row["dead_fraction"]]
    assert max(few) * 67 > 3  # so that AuxK chooses


@pytest.mark.slow
def test_a_run_that_is_stopped_continues_with_equal_bits(
    ranks: list[dict[str, Any]], place: Path
) -> None:
    assert [found["continues"] for found in ranks] == [4, 4]
    whole, stopped = tensors_of(place / "two/topk"), tensors_of(place / "stopped")
    for name, tensor in whole.items():
        assert torch.equal(tensor, stopped[name]), name


@pytest.mark.slow
def test_a_run_continues_with_another_number_of_processes(
    ranks: list[dict[str, Any]], place: Path
) -> None:
    whole = tensors_of(place / "one/topk")
    assert_near(whole, tensors_of(place / "from one"))
    run = place / "continued by one"
    shutil.copytree(place / "stopped", run, symlinks=True)
    checkpoint = str(run / "checkpoints" / "step-00000004")
    one = latents_worker.trainer_of("topk", place / "other", resume_from=checkpoint)
    assert one.step == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
        one.train()
    assert_near(whole, tensors_of(place / "other"))


@pytest.mark.slow
def test_a_run_starts_from_the_rows_of_a_whole_model(
    ranks: list[dict[str, Any]], place: Path
) -> None:
    assert_near(tensors_of(place / "one started"), tensors_of(place / "two started"))
    first = [load_file(place / f"{run}/checkpoints/step-00000000/sae.safetensors") for run in RUNS]
    assert all(torch.equal(tensor, first[1][name]) for name, tensor in first[0].items())


@pytest.mark.slow
def test_no_process_makes_a_tensor_of_all_latents(ranks: list[dict[str, Any]]) -> None:
    for number, found in enumerate(ranks):
        own = MANY // 2 + number
        assert found["largest"] == {"new": own * 16, "started": own * 16}


@pytest.mark.slow
def test_a_large_sum_is_added_up_in_the_order_of_the_processes(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        expected, total = found["sums"]
        assert torch.equal(expected, total)


@pytest.mark.slow
def test_what_cannot_be_divided_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for reason, error in found["refused"].items():
            assert reason in error


@pytest.mark.slow
def test_a_number_that_is_not_finite_in_one_process_ends_all(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["spoilt"].startswith("step 4: the loss is nan")


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_leaves_the_checkpoint_before(
    ranks: list[dict[str, Any]], place: Path
) -> None:
    assert ranks[0]["full disk"].startswith("rank 1: ")
    assert "File too large" in ranks[0]["full disk"]
    assert "File too large" in ranks[1]["full disk"]
    left = sorted(path.name for path in (place / "full/checkpoints").iterdir())
    assert left == ["best", "latest", "step-00000000", "step-00000002"] or left == [
        "latest", "step-00000000", "step-00000002"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_process_that_hangs_is_named(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["hung"] == "rank 1 has ended, or did not answer in time"


class _Several(Ranks):
    """Two processes in one, whose messages are given."""

    def __init__(self, rank: int, parts: list[Tensor]) -> None:
        super().__init__(rank, len(parts))
        self._parts = parts

    def gather(self, header: Any, tensors: Any = ()) -> list[tuple[Any, list[Tensor]]]:
        """Return what was given."""
        assert torch.equal(tensors[0], self._parts[self.rank])
        return [(header, [part]) for part in self._parts]


class _Rows:
    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_of_equal_values_the_lower_latent_is_taken(k: int) -> None:
    pre_acts = torch.tensor([[1.0, 3, 2, 3, 3, 1], [0, 0, 5, 5, 4, 5], [2, 2, 2, 2, 2, 2]])
    whole = pre_acts.sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(pre_acts).scatter(1, whole, pre_acts.gather(1, whole))
    parts = [
        part.sort(dim=1, descending=True, stable=True)
        for part in (pre_acts[:, :2], pre_acts[:, 2:])
    ]
    found = []
    for rank, (_, indices) in enumerate(parts):
        most = [values[:, :k].contiguous() for values, _ in parts]
        ranks = _Several(rank, most)
        values, places = _merged(_Rows(ranks), most[rank], indices[:, :k].int(), k)
        width = (2, 4)[rank]
        found.append(torch.zeros(3, width).scatter_add(1, places.long(), values))
    assert torch.equal(torch.cat(found, dim=1), expected)
