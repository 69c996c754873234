"""Time each op of sae_fast beside its PyTorch equivalent and the floor of its work.

python -m benchmarks.kernels --sizes S2 --markdown results/kernels.md
python -m benchmarks.kernels --device cuda --sizes G1,G2
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.cuda_rates import device_section, measure_device
from benchmarks.support.floors import Rates, bare_product_seconds, measure_rates
from benchmarks.support.groups import say
from benchmarks.support.kernel_cases import all_cases
from benchmarks.support.kernel_setting import Case, Setting
from benchmarks.support.machine import command_line, describe_machine, device_or_exit
from benchmarks.support.problem import DEFAULT_SIZES, Size, parse_size
from benchmarks.support.reader import measure_reader, reader_section
from benchmarks.support.tables import (
    machine_line,
    markdown_table,
    milliseconds,
    percent,
    ratio,
    write_json,
    write_text,
)
from benchmarks.support.timing import (
    Sample,
    calls_per_sample,
    interleave,
    measure,
    measure_cold,
    median_ratio,
    summarize,
)

PRECISIONS = ("screened", "fp32", "bf16", "fp16")


def time_case(case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    """Check an op against PyTorch, then time both in turn, on a GPU with a cold L2 cache."""
    case.check()

    def sampler(call: Callable[[], object]) -> Callable[[], Sample]:
        call()
        if device.type == "cpu":
            return lambda: measure(call)
        calls = calls_per_sample(measure_cold(call, device).seconds, device)
        return lambda: measure_cold(call, device, calls)

    samplers = {"ours": sampler(case.ours), "torch": sampler(case.torch)}
    if case.floor_call is not None:
        samplers["floor"] = sampler(case.floor_call)
    samples = interleave(samplers, rounds)
    ours, theirs = summarize(samples["ours"]), summarize(samples["torch"])
    floor, over_floor = case.floor, ours.median / case.floor
    if case.floor_call is not None:
        floor = summarize(samples["floor"]).median
        over_floor = median_ratio(samples["ours"], samples["floor"])
    say(f"  {case.name}: {ours.median * 1e3:.2f} ms, PyTorch {theirs.median * 1e3:.2f} ms")
    return {
        "op": case.name,
        "ours": asdict(ours),
        "torch": asdict(theirs),
        "ratio": median_ratio(samples["torch"], samples["ours"]),
        "floor": floor,
        "over_floor": over_floor,
        "floor_of": case.floor_of,
    }


def run_size(
    size: Size, rounds: int, device: torch.device, deadline: float = math.inf
) -> dict[str, Any]:
    """Measure all ops at one size; return its JSON entry, without the ops after the deadline."""
    say(size.describe())
    start = time.perf_counter()
    rates = measure_rates(size, "fp32", device)
    products = {
        precision: bare_product_seconds(size, precision, device) for precision in PRECISIONS
    }
    with torch.no_grad():
        seconds = {name: seconds for name, (seconds, _) in products.items()}
        setting = Setting(size, rates, seconds, device)
    rows, failures = [], []
    # The cases create tensors on the device; on a CPU the context would only cost time.
    with nullcontext() if device.type == "cpu" else device:
        for case in all_cases(setting):
            if time.monotonic() > deadline:
                failures.append(f"{case.name} and the following ops: no time left")
                break
            try:
                rows.append(time_case(case, rounds, device))
            except RuntimeError as error:  # out of memory, or a result that differs from PyTorch's
                failures.append(f"{case.name}: {str(error).splitlines()[0]}")
                say(f"  {failures[-1]}")
    say(f"  took {time.perf_counter() - start:.0f} s")
    return {
        "failures": failures,
        "size": asdict(size),
        "ops": rows,
        "rates": asdict(rates),
        "products": {
            name: {"seconds": seconds, "source": source}
            for name, (seconds, source) in products.items()
        },
    }


def size_section(result: Mapping[str, Any]) -> list[str]:
    """Return the heading, tables and explanations of one size."""
    size, rates = Size(**result["size"]), Rates(**result["rates"])
    headings = [
        *("op", "ms", "min", "PyTorch ms", "PyTorch / ours", "floor ms", "time / floor"),
        *("share of floor", "quiet rounds"),
    ]
    rows = []
    for row in result["ops"]:
        ours = row["ours"]
        rows.append(
            [
                row["op"],
                milliseconds(ours["median"]),
                milliseconds(ours["minimum"]),
                milliseconds(row["torch"]["median"]),
                ratio(row["ratio"]),
                milliseconds(row["floor"]),
                f"{row['over_floor']:.2f}",
                percent(1 / row["over_floor"]),
                f"{ours['quiet_rounds']}/{ours['rounds']}",
            ]
        )
    products = ", ".join(
        f"{name} {milliseconds(product['seconds'])} ms "
        f"({size.product_flops / product['seconds'] / 1e9:.0f} GFLOP/s, {product['source']})"
        for name, product in result["products"].items()
    )
    floors = dict.fromkeys(f"{row['op'].split(' ')[0]}: {row['floor_of']}" for row in result["ops"])
    return [
        f"## {size.describe()}",
        markdown_table(headings, rows),
        f"Bare product: {products}. Gathers {rates.gather_latents / 1e9:.0f} GB/s from W_dec, "
        f"{rates.gather_tokens / 1e9:.0f} GB/s from a batch; stream {rates.stream / 1e9:.0f} GB/s.",
        "Floors, all at rates measured in the same run. " + "; ".join(floors) + ".",
        *(f"Not timed: {failure}." for failure in result.get("failures", [])),
    ]


def report(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    parts = [
        "# The ops, one by one",
        "Times are medians of interleaved rounds in milliseconds. The floor counts only the work "
        "named below each table, at rates measured in the same run; for the selection it is the "
        "bare product, so `time / floor` shows the cost of selecting on top of it. On a GPU the L2 "
        "cache is cold when a call begins.",
    ]
    for result in results["sizes"].values():
        parts += size_section(result)
    for name, rates in results.get("device", {}).items():
        parts += device_section(name, rates)
    if results.get("reader"):
        parts += reader_section(results["reader"])
    parts.append(f"{machine_line(results['machine'])}\n`{results['command']}`")
    return "\n\n".join(parts)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.kernels")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--sizes", help="S1…S4, G1…G3 or NxDxFxK, comma-separated; default: all for the device"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="time limit; no op is started after it"
    )
    parser.add_argument("--no-reader", action="store_true", help="do not measure the data reader")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    return parser.parse_args()


def main() -> None:
    """Run, print the tables, write the files."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    device, deadline = device_or_exit(options.device), time.monotonic() + options.seconds
    names = options.sizes.split(",") if options.sizes else DEFAULT_SIZES[device.type]
    sizes = [parse_size(text) for text in names]
    results: dict[str, Any] = {
        "machine": describe_machine(device),
        "command": command_line("benchmarks.kernels"),
        "sizes": {},
        "device": {},
    }

    def keep() -> None:
        """Write the results so far, so that a long run that is cut short keeps them."""
        if options.json:
            write_json(options.json, results)
        if options.markdown:
            write_text(options.markdown, report(results))

    for size in sizes:
        if device.type == "cuda":
            results["device"][size.name] = measure_device(size, device)
        results["sizes"][size.name] = run_size(size, options.rounds, device, deadline)
        keep()
    if device.type == "cpu" and not options.no_reader:
        results["reader"] = measure_reader(sizes[0])
        keep()
    print(report(results))
    sys.exit(1 if any(result["failures"] for result in results["sizes"].values()) else 0)


if __name__ == "__main__":
    main()
