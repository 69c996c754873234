"""The prediction of a step's kernels on a GPU, and the measured times laid beside it."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.gpu_model import (
    CACHE,
    MEMORY,
    TENSOR,
    assign,
    read_profiles,
    rows,
    table,
    update_in_flight,
)
from benchmarks.support.problem import parse_size

KERNELS = Path(__file__).resolve().parents[2] / "csrc/kernels/cuda"
G1, G2 = parse_size("G1"), parse_size("G2")
PROFILE = """\
# Kernels of a step, G1 (N=4096, d_in=768, d_sae=24576, k=32), bf16

| kernel | launches a step | µs a step | share |
|---|---:|---:|---:|
| update_kernel | 2.0 | 301.0 | 60% |
| nvjet_hsh_128x256 | 12.0 | 190.0 | 38% |
| elementwise_kernel | 4.0 | 9.0 | 2% |

Together 500 µs a step, which takes 510 µs as a CUDA graph, without the profiler.
"""


def test_no_row_is_predicted_below_its_floor():
    for row in (*rows(G1), *rows(G2)):
        assert row.predicted >= row.floor, row.name


def test_floors_are_bytes_and_operations_at_the_published_rates():
    by_name = {row.name: row for row in rows(G1)}
    update = by_name["update of both matrices"]
    assert update.floor == 2 * 24576 * 768 * 26 / MEMORY
    product = by_name["encoder's products"]
    assert product.floor == 2 * 4096 * 768 * 24576 / TENSOR
    assert product.launches == 2
    assert by_name["selection"].floor == 4 * 4096 * 24576 / MEMORY
    assert by_name["rows of the gradient, W_enc and W_dec"].floor == 0


def test_the_update_has_more_in_flight_than_memory_needs():
    """5 blocks of 192 threads at G1, 4 of 256 at G2; a thread reads 16 bytes at once."""
    small, large = update_in_flight(G1), update_in_flight(G2)
    assert small["weights"] == 16 * 192 * 5 < small["needed"] < small["fetched ahead"]
    assert large["weights"] == 16 * 256 * 4 < large["needed"] < large["fetched ahead"]
    assert large["fetched ahead"] == 3 * 4 * 4096 * 4
    assert small["between reads"] == 26 * 24576 * 768 / 32 < CACHE < large["between reads"]


def test_measured_times_fill_the_rows_of_their_kernels(tmp_path):
    path = tmp_path / "profiles.md"
    path.write_text(PROFILE + PROFILE.replace("G1 (", "G2 (").replace(", bf16", ", screened"))
    (size,) = found = read_profiles(path)
    assert size == "G1"
    measured = assign(found["G1"], G1)
    assert measured["update of both matrices"] == pytest.approx(301e-6)
    assert measured["encoder's products"] == pytest.approx(190e-6)
    assert measured["small kernels of PyTorch"] == pytest.approx(9e-6)
    lines = table(G1, measured).splitlines()
    assert next(line for line in lines if line.startswith("| update of")).endswith("| 301 |")
    assert next(line for line in lines if line.startswith("| together")).endswith("| 500 |")


def test_the_json_of_a_profile_is_read_too(tmp_path):
    kernels = [{"kernel": "update_kernel", "launches": 2.0, "microseconds": 7.0}]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"size": "G1", "kernels": kernels}))
    assert read_profiles(path) == {"G1": {"update_kernel": 7.0}}


def test_a_file_without_a_profile_is_refused(tmp_path):
    path = tmp_path / "profiles.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="no table of kernels in bf16"):
        read_profiles(path)


@pytest.mark.parametrize(
    "source",
    [
        *("bookkeeping.cu", "rows.cu", "latent_major.cu", "latent_sum.cu", "scalars.cu"),
        *("decode.cu", "encode/state.cu", "encode/topk.cu", "update/gradient_norm.cu"),
    ],
)
def test_kernels_of_a_step_have_a_row(source):
    names = re.findall(r"\b(\w+_kernel)\(", (KERNELS / source).read_text("utf-8"))
    begins = [begin for row in rows(G1) for begin in row.kernels if begin]
    elsewhere = {"normalize_kernel", "accumulate_kernel", "decode_kernel", "decode_backward_kernel"}
    for name in {*names} - elsewhere:
        assert any(name.startswith(begin) for begin in begins), name
