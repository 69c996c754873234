"""Batches fetched ahead equal the source's, and the position belongs to the current step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.activations import ActivationStream, Rows, Source, TensorStream, Transform
from sae_fast.training.batches import StepBatches

BATCH = 64


def _open(kind: str, shard_dir: Path, activations: torch.Tensor, device: torch.device) -> Any:
    transform = Transform(activations.mean(0), 2.0)
    settings: dict[str, Any] = {"batch_size": BATCH, "transform": transform, "device": device}
    if kind == "shards as stored":
        settings["as_stored"] = True
    if kind.startswith("shards"):
        return ActivationStream(shard_dir, pool_rows=700, **settings)
    if kind == "tensor there":
        return TensorStream(activations.to(device), **settings)
    return TensorStream(activations, **settings)


KINDS = pytest.mark.parametrize("kind", ["shards", "shards as stored", "tensor", "tensor there"])


@pytest.fixture
def open_source(
    shard_dir: Path, activations: torch.Tensor, device: torch.device
) -> Callable[..., Any]:
    return lambda kind, place=device: _open(kind, shard_dir, activations, place)


def _device(device: torch.device) -> torch.device:
    return torch.device("cuda", 0) if device.type == "cuda" else device


@KINDS
@pytest.mark.parametrize("per_step", [1, 3])
def test_batches_ahead_are_those_of_the_source(
    open_source: Any, device: torch.device, kind: str, per_step: int
) -> None:
    device = _device(device)
    plain = open_source("tensor" if kind == "tensor there" else kind, torch.device("cpu"))
    source = open_source(kind, device)
    batches = StepBatches(source, device, per_step, ahead=True)
    for _ in range(30):
        taken = [rows.x for rows in batches.take()]
        total = torch.stack(taken).sum(dim=(0, 1))  # what a step would launch
        batches.prefetch()
        expected = [plain.next_batch() for _ in range(per_step)]
        assert all(x.device == device for x in taken)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(taken, expected, strict=True))
        assert torch.equal(total, torch.stack(expected).to(device).sum(dim=(0, 1)))
    for stream in (plain, source):
        stream.close()


@KINDS
def test_the_position_is_that_of_the_batches_taken(
    open_source: Any, device: torch.device, kind: str
) -> None:
    device = _device(device)
    source = open_source(kind, device)
    batches = StepBatches(source, device, 2, ahead=True)
    plain = open_source(kind, device)
    assert batches.state_dict() == plain.state_dict()
    for _ in range(20):
        batches.take()
        plain.next_batch()
        plain.next_batch()
        assert batches.state_dict() == plain.state_dict()
        batches.prefetch()
        assert batches.state_dict() == plain.state_dict()
        assert source.tokens_served == plain.tokens_served + 2 * BATCH
    position = batches.state_dict()
    expected = [rows.x.clone() for rows in batches.take()]
    batches.prefetch()
    batches.load_state_dict(position)
    assert batches.state_dict() == position
    again = [rows.x for rows in batches.take()]
    assert all(map(torch.equal, again, expected))
    for stream in (plain, source):
        stream.close()


def test_shards_are_those_of_the_batches_taken(open_source: Any, device: torch.device) -> None:
    device = _device(device)
    source, plain = open_source("shards", device), open_source("shards", device)
    batches = StepBatches(source, device, 1, ahead=True)
    seen = set()
    for _ in range(40):
        batches.take()
        plain.next_batch()
        batches.prefetch()
        assert batches.current_shards() == plain.current_shards()
        seen.add(tuple(batches.current_shards()))
    assert len(seen) > 1
    for stream in (plain, source):
        stream.close()


class _Failing(Source):
    """A source that fails after two batches."""

    d_in, rows_per_epoch, tokens_served, stall_seconds = 3, 8, 0, 0.0

    def __init__(self) -> None:
        self.served = 0

    def next_rows(self) -> Rows:
        if self.served == 2:
            raise ValueError("cannot be read")
        self.served += 1
        return Rows(torch.full((4, 3), float(self.served)), {})

    def set_transform(self, *_: Transform | None) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]

    def close(self) -> None:
        pass


def test_an_error_is_raised_at_the_step_that_needs_the_batch(device: torch.device) -> None:
    batches = StepBatches(_Failing(), _device(device), 1, ahead=True)
    for number in (1, 2):
        (rows,) = batches.take()
        assert rows.x.cpu().tolist() == [[float(number)] * 3] * 4
        batches.prefetch()
    for _ in range(2):
        assert batches.state_dict() == {"served": 2}
        with pytest.raises(ValueError, match="cannot be read"):
            batches.take()


def test_an_error_amid_the_next_batches_leaves_the_position(device: torch.device) -> None:
    source: Any = _Failing()
    batches = StepBatches(source, _device(device), 2, ahead=True)
    batches.take()
    source.served = 1  # one of the next two can be read
    batches.prefetch()
    assert batches.state_dict() == {"served": 2}
    with pytest.raises(ValueError, match="cannot be read"):
        batches.take()


def test_waiting_is_counted_once(activations: torch.Tensor, device: torch.device) -> None:
    source = TensorStream(activations, batch_size=BATCH)
    batches = StepBatches(source, _device(device), 1, ahead=True)
    for _ in range(5):
        batches.take()
        batches.prefetch()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert 0 < batches.take_stalled_seconds() <= source.stall_seconds
    assert batches.take_stalled_seconds() == 0
