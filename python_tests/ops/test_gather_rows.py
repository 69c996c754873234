"""Batches gathered from rows in their stored dtype."""

import pytest
import torch
from device_ops import public
from example_settings import examples
from hypothesis import example, given
from hypothesis import strategies as st
from op_samples import LOW
from tolerances import close

pytestmark = pytest.mark.usefixtures("ops_on_device")

DTYPES = [torch.float32, *LOW.values()]
UNTOUCHED = -7.0


def made(n_source, d_in, n, seed, dtype=torch.float32):
    """Make a table [n_source, d_in], and numbers of its rows [n], with repetitions."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n_source, d_in, generator=generator).to(dtype)
    return source, torch.randint(0, n_source, (n,), generator=generator)


def in_float32(source, rows, mean, scale):
    """Return the result with the two specified roundings."""
    return (source[rows].float() - mean) * torch.tensor(scale, dtype=torch.float32)


@examples(40)
@given(
    st.integers(1, 30),
    st.integers(1, 70),
    st.integers(0, 90),
    st.sampled_from(DTYPES),
    st.integers(0, 10_000),
    st.booleans(),
)
@example(1, 1, 0, torch.float16, 0, True)
@example(1, 1, 1, torch.bfloat16, 0, False)
@example(30, 64, 90, torch.float16, 1, True)
def test_rows_are_those_of_the_formula_and_the_others_stay(n_source, d_in, n, dtype, seed, placed):
    source, rows = made(n_source, d_in, n, seed, dtype)
    mean, scale = torch.randn(d_in, generator=torch.Generator().manual_seed(seed + 1)), 0.37
    out = torch.full((n + (5 if placed else 0), d_in), UNTOUCHED)
    order = torch.randperm(len(out), generator=torch.Generator().manual_seed(seed))
    places = order[:n] if placed else None
    public.gather_rows_(out, source, rows, places=places, mean=mean, scale=scale)
    found = out if places is None else out[places]
    assert torch.equal(found, in_float32(source, rows, mean, scale))
    exact = (source[rows].double() - mean.double()) * torch.tensor(scale).double()
    magnitude = scale * (source[rows].double().abs() + mean.double().abs())
    close(found, exact, magnitude=magnitude)
    if placed:
        assert (out[order[n:]] == UNTOUCHED).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_mean_and_scale_rows_are_only_widened(dtype):
    source, rows = made(50, 37, 200, 3, dtype)
    out = torch.empty(200, 37)
    public.gather_rows_(out, source, rows)
    assert torch.equal(out, source[rows].float())


@pytest.mark.parametrize("dtype", LOW.values())
def test_every_16_bit_number_is_widened_exactly(dtype):
    source = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(-1, 64)
    out = torch.empty(source.shape)
    public.gather_rows_(out, source, torch.arange(len(source)))
    wanted = source.float()
    assert torch.equal(out.isnan(), wanted.isnan())
    numbers = ~wanted.isnan()
    assert torch.equal(out[numbers].view(torch.int32), wanted[numbers].view(torch.int32))


def test_part_of_a_batch_is_written_and_nothing_beside_it():
    source, rows = made(20, 24, 6, 5, torch.float16)
    batch = torch.full((10, 24), UNTOUCHED)
    public.gather_rows_(batch[2:8], source, rows)
    assert torch.equal(batch[2:8], source[rows].float())
    assert (batch[:2] == UNTOUCHED).all()
    assert (batch[8:] == UNTOUCHED).all()


def test_strided_arguments_are_understood():
    source, rows = made(24, 40, 30, 7, torch.bfloat16)
    mean = torch.randn(40, 2)[:, 0]
    wide, doubled = source.t().contiguous().t(), rows.repeat_interleave(2)[::2]
    out = torch.empty(30, 40)
    public.gather_rows_(out, wide, doubled, mean=mean, scale=2.5)
    assert torch.equal(out, in_float32(source, rows, mean, 2.5))


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # only the CPU has threads
def test_result_does_not_depend_on_the_threads():
    source, rows = made(300, 129, 1000, 9, torch.float16)
    mean = torch.randn(129)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(public.gather_rows_(torch.empty(1000, 129), source, rows, mean=mean))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # the tensor itself, no copy of it
def test_write_is_announced_to_autograd():
    source, rows = made(4, 3, 2, 11)
    out = torch.empty(2, 3)
    version = out._version
    assert public.gather_rows_(out, source, rows) is out
    assert out._version == version + 1
