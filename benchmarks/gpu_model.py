"""Predict the time of a training step on an H200, kernel by kernel, from bytes and operations.

    python -m benchmarks.gpu_model --markdown benchmarks/results/gpu_model.md
    python -m benchmarks.gpu_model --profile profiles.md   # of benchmarks/first_light.sh

Every row has the bytes and the operations of its kernels, the floor that the device's published
rates put under them, and a prediction by rates that kernels of this kind reach (`RATES`). A profile
of `benchmarks.profile_step slowest`, its table or its JSON, fills the column of measured times.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.step_nodes import chunks, count_nodes, own_and_other, read_limits
from benchmarks.support.machine import command_line
from benchmarks.support.problem import Size, parse_size
from benchmarks.support.tables import add_run_arguments, markdown_table, publish

SIZES = ("G1", "G2", "G3")
GOALS = {"G1": 0.75, "G2": 9.0, "G3": 24.0}  # milliseconds of a step

# NVIDIA H200 Tensor Core GPU data sheet (SXM): 4.8 TB/s of HBM3e; 1,979 TFLOP/s of bfloat16 with
# sparsity, so half of them without.
MEMORY = 4.8e12
TENSOR = 989e12
# Rates that predictions count on, to be replaced by measured ones: bytes or operations a second.
RATES = {
    "stream": 4.3e12,  # 90 % of the memory's rate
    # Reads and writes of one row after the other, with reductions between them; the rows of the
    # dense side that are summed again come from L2 or from memory.
    "update": 3.9e12,
    "update from memory": 3.4e12,
    "gather": 3.6e12,  # rows in random order, from memory
    "gather in L2": 4.3e12,  # the same where they fit into CACHE
    "product": 790e12,  # 80 % of the tensor cores' rate
}
CACHE = 40e6  # bytes of the 50 MB of L2 that one array can count on
NODE = 2.3e-6  # seconds of a small kernel in a graph

# For the bytes in flight: the H200's multiprocessors, the registers and threads of each,
# and the latency of its memory, which is assumed.
MULTIPROCESSORS, REGISTERS, THREADS = 132, 65536, 2048
LATENCY = 0.7e-6  # seconds
UPDATE_REGISTERS, UPDATE_THREADS = 64, 256  # of update_kernel, by tools/cuda_resources.py

_PRODUCTS = re.compile(r"gemm|nvjet|cutlass|xmma|sm90", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """Kernels of a step that do one thing.

    Attributes:
        name: of the row.
        kernels: their names, or the beginnings of them, in a profile.
        launches: of a step.
        rate: the name of the rate that limits them, in RATES; "node": they are too small for one.
        moved: bytes read and written.
        operations: of a product.
        in_cache: whether the bytes come from L2, so that memory is no floor for them.
    """

    name: str
    kernels: tuple[str, ...]
    launches: int
    rate: str
    moved: float = 0.0
    operations: float = 0.0
    in_cache: bool = False

    @property
    def floor(self) -> float:
        """Seconds that the published rates allow."""
        return max(0.0 if self.in_cache else self.moved / MEMORY, self.operations / TENSOR)

    @property
    def predicted(self) -> float:
        """Seconds by the rates of RATES; no kernel is faster than a small one."""
        least = self.launches * NODE
        if self.rate == "node":
            return least
        work = self.operations if self.rate == "product" else self.moved
        return max(least, work / RATES[self.rate])


def rows(size: Size) -> Iterator[Row]:
    """Yield the rows of a step of TopK in bfloat16 without dead latents, states in float32."""
    n, d, f, entries = size.n_tokens, size.d_in, size.d_sae, size.entries
    limits = read_limits()
    nodes = {name: limit.nodes for name, limit in limits.items()}
    weights, tokens = float(f * d), float(n * d)

    def gather(bytes_of_source: float) -> tuple[str, bool]:
        fits = bytes_of_source <= CACHE
        return ("gather in L2" if fits else "gather"), fits

    rounding = ("prepare_kernel", "sub")
    yield Row("rounding of x − b_dec, twice", rounding, 2, "stream", 2 * 6 * tokens)
    products = 2.0 * tokens * f
    yield Row("encoder's products", (), chunks(size), "product", 2 * weights, products)
    yield Row("selection", ("select_kernel",), chunks(size), "stream", 4.0 * n * f)
    ends = ("sort_kernel", "score_rows_kernel", "pick_kernel")
    yield Row("ends of the encoder", ends, 3, "node", 40.0 * entries)
    rate, fits = gather(2 * weights)
    moved = 2.0 * entries * d + 6 * tokens
    yield Row("reconstruction", ("reconstruct_kernel",), 1, rate, moved, in_cache=fits)
    statistics = ("partial_statistics_kernel", "statistics_kernel")
    yield Row("statistics", statistics, nodes["batch_statistics"], "stream", 4 * tokens)
    sums = ("partial_rows_kernel", "row_parts_kernel")
    yield Row("gradients of b_dec", sums, 4, "stream", 4 * weights + 2 * tokens)
    sort = ("count_entries_kernel", "place_entries_kernel", "order_lists_kernel")
    yield Row("code by latent", sort, nodes["latent_major"], "node", 80.0 * entries)
    small = ("code_gradients_kernel", "gather_kernel", "latent_sums_kernel")
    yield Row("gradients of entries", small, 4, "node", 60.0 * entries)
    # The dense sides are x − b_dec for W_enc, the residual for W_dec, 2 bytes a number each.
    rate, fits = gather(2 * tokens)
    yield Row(
        "rows of the gradient, W_enc and W_dec",
        *(("gradient_norm_kernel", "chunk_kernel"), 4, rate, 2 * 2.0 * entries * d),
        in_cache=fits,
    )
    yield Row("projection of W_dec's gradient", (), 0, "stream", 4 * weights)
    yield Row("plans of the norm", ("plan_kernel",), 2, "node", 2 * 16.0 * f)
    # W, both moments: read and written; the copy: written.
    rate = "update" if 2 * tokens <= CACHE else "update from memory"
    yield Row("update of both matrices", ("update_kernel",), 2, rate, 2 * 26 * weights)
    ends = ("scalars_kernel", "square_kernel", "vector_kernel", "finish_kernel")
    yield Row("numbers and vectors of the step", ends, 4, "node", 60.0 * f)
    _, other = own_and_other(count_nodes("topk", size))
    yield Row("small kernels of PyTorch", ("",), other - 1, "node")


def is_product(kernel: str) -> bool:
    """Return whether a kernel is one of the library's products."""
    return _PRODUCTS.search(kernel) is not None


def assign(times: Mapping[str, float], size: Size) -> dict[str, float]:
    """Return the measured seconds of each row; kernels that no row names are PyTorch's.

    Args:
        times: microseconds a step by kernel.
        size: of the step.
    """
    known = [row for row in rows(size) if row.launches]
    found = dict.fromkeys((row.name for row in known), 0.0)
    for kernel, microseconds in times.items():
        name = known[-1].name
        if is_product(kernel):
            name = "encoder's products"
        for row in known[:-1]:
            if any(kernel.startswith(begin) for begin in row.kernels):
                name = row.name
        found[name] += microseconds * 1e-6
    return found


def read_profiles(path: Path) -> dict[str, dict[str, float]]:
    """Return by size the microseconds of each kernel in bf16, from a table or JSON of a profile.

    Raises:
        ValueError: for a file that has none.
    """
    text = path.read_text("utf-8")
    if path.suffix == ".json":
        content = json.loads(text)
        kernels = {row["kernel"]: row["microseconds"] for row in content["kernels"]}
        return {content["size"]: kernels}
    found: dict[str, dict[str, float]] = {}
    for part in re.split(r"(?m)^# Kernels of a step, ", text)[1:]:
        heading = part.splitlines()[0]
        if heading.endswith(", bf16"):
            lines = re.findall(r"(?m)^\| ([^|]+) \| [\d.]+ \| ([\d.]+) \| \d+% \|$", part)
            found[heading.split(" ")[0]] = {name: float(time) for name, time in lines}
    if not found:
        raise ValueError(f"{path}: no table of kernels in bf16")
    return found


def table(size: Size, measured: Mapping[str, float] | None) -> str:
    """Return the table of a size."""
    listed = [*rows(size)]
    lines = [[*_cells(row), _measured(row.name, measured)] for row in listed]
    floor, predicted = (sum(map(of, listed)) for of in (_floor, _predicted))
    total = None if measured is None else sum(measured.values())
    launches = str(sum(row.launches for row in listed))
    last = ["together", launches, "", "", _us(floor), _us(predicted)]
    lines.append([*last, "-" if total is None else _us(total)])
    headings = ["kernels", "launches", "MB", "GFLOP", "floor, µs", "predicted, µs", "measured, µs"]
    goal = GOALS.get(size.name)
    told = f"Predicted {predicted * 1e3:.2f} ms"
    told += f", goal {goal:g} ms." if goal else "."
    return f"## {size.describe()}\n\n{markdown_table(headings, lines)}\n\n{told}"


def update_in_flight(size: Size) -> dict[str, float]:
    """Return the bytes that a multiprocessor must have in flight, and what the update has.

    Little's law: rate times latency. Without fetching ahead, every thread of the resident blocks
    waits for 16 bytes of the weights, then for 16 of each moment; with it, for its row's three.
    Between two reads of a row of the dense side lies what the update streams meanwhile.
    """
    warps = min(max(-(-size.d_in // 128), 1), UPDATE_THREADS // 32)
    blocks = min(REGISTERS // (UPDATE_REGISTERS * 32 * warps), THREADS // (32 * warps))
    streamed = 26.0 * size.d_sae * size.d_in
    return {
        "needed": MEMORY / MULTIPROCESSORS * LATENCY,
        "weights": 16.0 * 32 * warps * blocks,
        "fetched ahead": 12.0 * size.d_in * blocks,
        "between reads": streamed * size.n_tokens / size.entries,
        "dense side": 2.0 * size.n_tokens * size.d_in,
    }


def update_table(sizes: list[Size]) -> str:
    """Return the table of `update_in_flight`."""
    headings = ["size", "needed, KB", "weights of a pass, KB", "rows fetched ahead, KB"]
    headings += ["between reads of a dense row, MB", "dense side, MB"]
    lines = []
    for size in sizes:
        found = update_in_flight(size)
        kilobytes = [f"{found[name] / 1e3:.0f}" for name in ("needed", "weights", "fetched ahead")]
        megabytes = [f"{found[name] / 1e6:.0f}" for name in ("between reads", "dense side")]
        lines.append([size.name, *kilobytes, *megabytes])
    return f"""## Memory of the update

By Little's law a multiprocessor needs its share of {MEMORY / 1e12:g} TB/s times a latency, taken to
be {LATENCY * 1e6:g} µs, in flight. The pass over the weights has less, so a block fetches its row
of weights and moments into L2 when it begins. What is streamed between two reads of a row of the
dense side, which the update sums again for latents with few entries, would push the row out of
{CACHE / 1e6:.0f} MB of L2 where it is more than that, so weights and moments are read and written
as data that caches give up first. Where the dense side itself fits, the update is predicted at
{RATES["update"] / 1e12:g} TB/s, elsewhere at {RATES["update from memory"] / 1e12:g}.

{markdown_table(headings, lines)}"""


def _floor(row: Row) -> float:
    return row.floor


def _predicted(row: Row) -> float:
    return row.predicted


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def _cells(row: Row) -> list[str]:
    operations = f"{row.operations / 1e9:,.0f}" if row.operations else ""
    moved = f"{row.moved / 1e6:,.0f}"
    return [row.name, str(row.launches), moved, operations, _us(row.floor), _us(row.predicted)]


def _measured(name: str, measured: Mapping[str, float] | None) -> str:
    if measured is None or name not in measured:
        return "-"
    return _us(measured[name])


def _numbers(size: Size, measured: Mapping[str, float] | None) -> dict[str, Any]:
    by_name = {
        row.name: {
            **{"launches": row.launches, "bytes": row.moved, "operations": row.operations},
            **{"floor": row.floor, "predicted": row.predicted},
            "measured": None if measured is None else measured.get(row.name),
        }
        for row in rows(size)
    }
    return {"goal": GOALS.get(size.name), "rows": by_name}


INTRO = f"""# A step on an H200, predicted

Predictions for TopK in bfloat16, states in float32, no latent dead, the step a CUDA graph; the last
column has measured times, once `--profile` is given the profile of a GPU. Bytes and operations are
counted from the shapes; the launches are the ones that `python -m benchmarks.step_nodes` counts.
The floor is what NVIDIA's data sheet of the H200 allows, {MEMORY / 1e12:g} TB/s of memory and
{TENSOR / 1e12:.0f} TFLOP/s of bfloat16 without sparsity; where the bytes come from L2 it is 0.
Predictions assume {RATES["stream"] / 1e12:g} TB/s for streams,
{RATES["gather"] / 1e12:g} for rows in random order ({RATES["gather in L2"] / 1e12:g} from L2),
{RATES["product"] / 1e12:.0f} TFLOP/s for products and {NODE * 1e6:g} µs for a small kernel,
and are good to ±20 % at best. The product is written while it is computed, and the selection
reads it from memory. The projection reads W_dec in the kernels of the row above it, whose measured
time has both."""


def main() -> None:
    """Compute the prediction of every size, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.gpu_model")
    parser.add_argument("--sizes", default=",".join(SIZES), help="G1…G3 or NxDxFxK")
    parser.add_argument("--profile", type=Path, action="append", default=[])
    add_run_arguments(parser)
    options = parser.parse_args()
    measured: dict[str, dict[str, float]] = {}
    for path in options.profile:
        for name, times in read_profiles(path).items():
            measured[name] = assign(times, parse_size(name))
    sizes = [parse_size(name) for name in options.sizes.split(",")]
    tables = [table(size, measured.get(size.name)) for size in sizes]
    numbers = {size.name: _numbers(size, measured.get(size.name)) for size in sizes}
    command = "`" + command_line("benchmarks.gpu_model") + "`"
    text = "\n\n".join([INTRO, *tables, update_table(sizes), command])
    publish({"sizes": numbers}, text, options.json, options.markdown)


if __name__ == "__main__":
    main()
