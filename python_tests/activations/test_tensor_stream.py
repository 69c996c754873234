"""TensorStream behaves like ActivationStream, without files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_fast.activations import Source, TensorStream, Transform


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None].repeat(1, 3)


@settings(deadline=None)
@given(total=st.integers(1, 80), batch_size=st.integers(1, 100), seed=st.integers(0, 9))
def test_every_row_is_served_once_an_epoch(total, batch_size, seed):
    stream = TensorStream(numbered(total), batch_size=batch_size, seed=seed)
    batches = -(-2 * total // batch_size)
    served = torch.cat([stream.next_batch() for _ in range(batches)])[:, 0]
    for epoch in range(2):
        rows = served[epoch * total : (epoch + 1) * total].sort().values
        assert torch.equal(rows, torch.arange(total, dtype=torch.float32))


@settings(deadline=None)
@given(total=st.integers(1, 80), batch_size=st.integers(1, 100))
def test_rows_of_a_batch_are_known_again_also_of_an_epoch_before(total, batch_size):
    stream = TensorStream(numbered(total), batch_size=batch_size)
    for number in range(4):
        batch = stream.next_batch()[:, 0].tolist()
        assert stream.stored.x[stream.batch_rows(number * batch_size)][:, 0].tolist() == batch
        stream.batch_rows(0)  # the order of the first epoch, and then again of this one


@settings(deadline=None)
@given(total=st.integers(1, 80), batch_size=st.integers(1, 100), before=st.integers(0, 6))
def test_a_resumed_stream_goes_on_exactly(total, batch_size, before):
    stream = TensorStream(numbered(total), batch_size=batch_size)
    for _ in range(before):
        stream.next_batch()
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = TensorStream(numbered(total), batch_size=batch_size)
    resumed.load_state_dict(state)
    assert resumed.tokens_served == before * batch_size
    for _ in range(5):
        assert torch.equal(resumed.next_batch(), stream.next_batch())


@pytest.mark.parametrize("next_share", [TensorStream.next_share, Source.next_share])
def test_a_share_is_one_batch_of_several_also_where_all_are_made(next_share):
    whole, stream = (TensorStream(numbered(50), batch_size=16, seed=2) for _ in range(2))
    batches = [whole.next_batch() for _ in range(9)]
    found = [next_share(stream, 1, 3).x for _ in range(3)]
    assert all(map(torch.equal, found, batches[1::3]))
    assert stream.state_dict() == whole.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_batches_are_float32_and_transformed(dtype):
    mean, scale = torch.tensor([1.0, 2.0, 3.0]), 0.3
    rows = torch.randn(20, 3).to(dtype)
    raw = TensorStream(rows, batch_size=20).next_batch()
    batch = TensorStream(rows, batch_size=20, transform=Transform(mean, scale)).next_batch()
    assert batch.dtype == torch.float32
    assert torch.equal(batch, (raw - mean) * torch.tensor(scale))


def test_three_dimensions_are_flattened():
    stream = TensorStream(numbered(24).reshape(4, 6, 3), batch_size=24)
    assert torch.equal(stream.next_batch()[:, 0].sort().values, torch.arange(24.0))


def test_rows_that_are_not_finite_are_named_or_dropped():
    rows = numbered(10)
    rows[4, 1] = float("inf")
    with pytest.raises(ValueError, match="row 4 holds NaN or Inf"):
        TensorStream(rows, batch_size=2)
    stream = TensorStream(rows, batch_size=9, skip_nonfinite=True)
    assert (stream.nonfinite_rows, stream.rows_per_epoch) == (1, 9)
    assert 4 not in stream.next_batch()[:, 0].tolist()
    with pytest.raises(ValueError, match="no row is finite"):
        TensorStream(rows[4:5], batch_size=1, skip_nonfinite=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_on_a_device_are_served_there_as_elsewhere(device, dtype):
    device = torch.device("cuda", 0) if device.type == "cuda" else device
    rows = numbered(50).to(dtype)
    rows[[4, 17], 1] = torch.tensor([torch.nan, -torch.inf], dtype=dtype)
    settings = {"batch_size": 20, "transform": Transform(torch.ones(3), 0.3)}
    with pytest.raises(ValueError, match="row 4 holds NaN or Inf"):
        TensorStream(rows.to(device), device=device, **settings)
    settings["skip_nonfinite"] = True
    there = TensorStream(rows.to(device), device=device, **settings)
    here = TensorStream(rows, **settings)
    assert there.nonfinite_rows == 2
    assert there.state_dict() == here.state_dict()
    for _ in range(6):
        batch = there.next_batch()
        assert batch.device == device
        assert torch.equal(batch.cpu(), here.next_batch())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch finds none")
def test_rows_for_a_gpu_come_in_page_locked_memory():
    stream = TensorStream(numbered(50), batch_size=20, device=torch.device("cuda", 0))
    assert stream.next_batch().is_pinned()


def test_other_data_is_refused_on_resume():
    state = TensorStream(numbered(20), batch_size=4).state_dict()
    for rows in (numbered(21), numbered(20) + 1, numbered(20).half()):
        with pytest.raises(
            ValueError, match="differ from the ones that the checkpoint was made with"
        ):
            TensorStream(rows, batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="seed is 1"):
        TensorStream(numbered(20), batch_size=4, seed=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (torch.zeros(3), {}, "must be"),
        (torch.zeros(0, 3), {}, "not empty"),
        (torch.zeros(3, 3, dtype=torch.int32), {}, "torch.int32"),
        (torch.zeros(3, 3), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (torch.zeros(3, 3), {"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_bad_arguments_are_named(rows, options, message):
    with pytest.raises(ValueError, match=message):
        TensorStream(rows, **{"batch_size": 2, **options})
