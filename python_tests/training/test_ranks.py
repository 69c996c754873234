"""Several processes train what one process trains, to the bit; they stop and fail together."""

from __future__ import annotations

import signal
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ranks_worker
import several_ranks
import torch
from torch.distributed import HashStore

from sae_fast import TrainConfig
from sae_fast.distributed.meeting import common_name
from sae_fast.distributed.ranks import RankError, Ranks, connect
from sae_fast.distributed.replicas import digests
from sae_fast.distributed.wire import HEADER_BYTES, pack, pack_header, unpack, unpack_header

CASES = [case for case in ranks_worker.CASES if case != "slots"]
OF_TIME = ("tokens_per_second", "time_per_step_ms", "reader_stall_fraction")
OF_RANKS = ("exchanged_bytes", "communication_fraction")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(place: Path) -> list[dict[str, Any]]:
    """Return what two processes have done together."""
    ends = several_ranks.run("ranks_worker", place)
    codes = [end.returncode for end in ends]
    assert codes == [0, -signal.SIGKILL], ends[0].stderr + ends[1].stderr  # as the last one ends
    return [torch.load(place / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def differences(first: Any, other: Any, name: str = "") -> list[str]:
    """Return the names of what differs between two results, to the bit."""
    if isinstance(first, dict):
        names = (first.keys() | other.keys()) - {*OF_TIME, *OF_RANKS}
        return [
            found
            for key in sorted(names)
            for found in differences(first.get(key), other.get(key), f"{name}.{key}")
        ]
    if isinstance(first, list):
        if len(first) != len(other):
            return [name]
        return [
            found
            for number, pair in enumerate(zip(first, other, strict=True))
            for found in differences(*pair, f"{name}.{number}")
        ]
    if isinstance(first, torch.Tensor):
        both = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, other)]
        return [] if torch.equal(*both) else [name]
    return [] if first == other or (first != first and other != other) else [name]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Return what one process trains, by the name of the case."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        trainer = ranks_worker.trainer_of(case)
        trainer.train()
        found[case] = ranks_worker.result(trainer)
    torch.set_num_threads(threads)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_train_what_one_process_trains_to_the_bit(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], case: str
) -> None:
    for found in ranks:
        assert differences(alone[case], found[case]) == []


@pytest.mark.slow
def test_the_cases_train_dead_latents_and_both_forms_of_codes(
    alone: dict[str, dict[str, Any]],
) -> None:
    for case in ("topk", "multi_topk", "batch_topk", "matryoshka"):
        assert any(row["aux_loss"] > 0 for row in alone[case]["history"]), case
    assert all(row["temporal_loss"] > 0 for row in alone["smooth"]["history"])
    listed = alone["jumprelu"]["model"]["listed_per_token"]
    assert alone["jumprelu"]["history"][0]["l0"] > 0.2 * 64 > listed > 0


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_one_step(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], place: Path
) -> None:
    for found in ranks:
        assert found["scenarios"]["stopped"] == found["scenarios"]["continues"] == 4
        for part in ("model", "state"):
            assert differences(alone["topk"][part], found["scenarios"]["result"][part]) == []
    assert differences(alone["topk"], ranks[0]["scenarios"]["result"]) == []
    # The other way round: one process continues what ranks have begun.
    run = str(place / "stopped-0")
    one = ranks_worker.trainer_of("topk", checkpoint_dir=run, resume_from="latest")
    assert one.step == 4
    one.train()
    assert differences(alone["topk"], ranks_worker.result(one)) == []


@pytest.mark.slow
def test_ranks_that_differ_are_named_before_the_first_step(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        told = found["scenarios"]
        assert told["settings"] == (
            "rank 1 differs from rank 0 in its settings (learning_rate): 0.011 and not 0.01"
        )
        assert told["rows"].startswith("rank 1 differs from rank 0 in its shards (content)")
        assert "device = 'tpu'" in told["one fails"]
        assert "mesh must be left out with arch slots" in told["slots"]
    assert ranks[0]["scenarios"]["one fails"].startswith("rank 1: ")


@pytest.mark.slow
def test_a_copy_that_is_no_longer_equal_is_named(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        text = found["scenarios"]["disturbed"]
        assert text == "rank 1 differs from rank 0 in the model (W_enc)"
        assert found["scenarios"]["disturbed at"] == 3


@pytest.mark.slow
def test_the_bytes_of_a_step_do_not_depend_on_d_sae(ranks: list[dict[str, Any]]) -> None:
    n_tokens, k, width = 16, 2, ranks_worker.WIDTH
    factors = n_tokens * (16 * k + 8 * width)
    for found in ranks:
        sent = found["scenarios"]["bytes"]
        assert sent[64] == sent[512]
        # Three messages; and small tensors: variances, metrics, the gradient of b_dec.
        assert 0 < sent[64] - factors - 3 * HEADER_BYTES < 10 * 64


@pytest.mark.slow
def test_tensors_are_gathered_while_gradients_are_made(ranks: list[dict[str, Any]]) -> None:
    expected = [torch.arange(6).view(2, 3).t().bfloat16() + 10 * rank for rank in range(2)]
    # From the second step on, where the factors are known: the rows, and the decoder's dense side,
    # which is on its way while the encoder's gradient is measured.
    first, ahead = ["measure"] * 2, ["begin", "begin", "wait", "measure", "wait", "measure"]
    for found in ranks:
        told = found["scenarios"]
        assert told["order"]["without dead latents"] == first + ahead
        assert told["order"]["dense"] == []
        assert told["order"]["batch_topk"] == first * 2
        assert told["meanwhile"] == [0, 1]
        assert all(map(torch.equal, told["gathered"], expected))


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["hung"] == "rank 1 has ended, or did not answer in time"


def test_a_mesh_needs_its_processes() -> None:
    for mesh in ("data", "data=0", "data=2,data=2", "rows=2", "data=2,layers=2", ""):
        with pytest.raises(ValueError, match="mesh"):
            TrainConfig(mesh=mesh)
    assert TrainConfig(mesh="data=3", grad_acc_steps=2).batches_per_step == 6
    with pytest.raises(ValueError, match="needs 2 processes, and this is one"):
        ranks_worker.trainer_of("topk", mesh="data=2")


def test_a_rank_that_has_failed_is_named_with_its_reason() -> None:
    store = HashStore()
    first, second = (Ranks(rank, 2, store) for rank in range(2))
    second.note_failure(ValueError("the disk is full"))
    error = first._lost(RuntimeError("Connection closed by peer"))
    assert isinstance(error, RankError)
    assert str(error) == "rank 1: the disk is full"
    assert not error.is_told


def test_a_process_that_meets_no_first_one_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RankError, match="the ranks cannot be connected") as found:
        connect(timedelta(seconds=1))
    assert not found.value.is_told


def test_processes_of_an_earlier_start_are_not_met_again() -> None:
    store, names = HashStore(), []
    for _ in range(2):
        found: dict[int, str] = {}

        def meet(rank: int, found: dict[int, str] = found) -> None:
            found[rank] = common_name(store, rank, 3, timedelta(seconds=30))

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 2, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found.values())) == 1
        names.append(found[0])
    assert names[0] != names[1]
    with pytest.raises(RuntimeError, match="not all of 2 processes"):
        common_name(HashStore(), 1, 2, timedelta(seconds=0.1))


def test_bytes_are_the_tensors_again() -> None:
    tensors = [
        torch.arange(5, dtype=torch.int32),
        torch.tensor(True),
        torch.randn(3, 4).t(),
        torch.empty(0, 7),
        torch.randn(3).bfloat16(),
    ]
    from sae_fast.distributed.wire import DTYPES

    specs = [(DTYPES.index(tensor.dtype), list(tensor.shape)) for tensor in tensors]
    for before, after in zip(tensors, unpack(pack(tensors), specs), strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(before, after)
    value = {"long": "x" * 2 * HEADER_BYTES}
    packed = pack_header(value)
    assert unpack_header(packed) == value
    assert unpack_header(packed[:HEADER_BYTES]) == len(packed)


def test_a_digest_tells_other_numbers_and_another_order() -> None:
    x = torch.randn(7, 5)
    assert digests({"x": x}) == digests({"x": x.clone()})
    changed, turned = x.clone(), x.flip(0)
    changed[3, 2] += 1e-6
    assert digests({"x": changed}) != digests({"x": x})
    assert digests({"x": turned}) != digests({"x": x})
