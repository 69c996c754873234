"""Find the slowest kernels of a training step, and measure them with ncu.

    python -m benchmarks.profile_step slowest --size G1 --json slowest.json
    ncu … python -m benchmarks.profile_step run --size G1
    python -m benchmarks.profile_step summary --csv ncu.csv --slowest slowest.json

`slowest` adds up the time of every kernel over some steps with torch.profiler and prints a pattern
for `ncu --kernel-name` that matches the slowest ones; `run` takes the few steps that ncu measures,
between cudaProfilerStart and cudaProfilerStop; `summary` makes a table from ncu's output.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.sae_fast_trainer import CapturedTrainer, SaeFastTrainer
from benchmarks.support.machine import device_or_exit
from benchmarks.support.ncu import METRICS, base_name, read_launches, summary_table
from benchmarks.support.problem import (
    learning_rate,
    make_activations,
    make_weights,
    parse_size,
)
from benchmarks.support.tables import markdown_table, write_json, write_text

WARMUP_STEPS = 3
BATCHES = 2


class Steps:
    """The training steps of a model, after some untimed ones."""

    def __init__(self, options: argparse.Namespace) -> None:
        size, device = parse_size(options.size), device_or_exit(options.device)
        weights = make_weights(size, device=device)
        trainer = SaeFastTrainer(weights, size.k, learning_rate(size), precision=options.precision)
        self.trainer = CapturedTrainer(trainer) if options.graph else trainer
        self.x: Tensor = make_activations(size, BATCHES, device=device)
        self.size = size
        self.take(WARMUP_STEPS)

    def take(self, count: int) -> None:
        """Take `count` steps and wait until the device has finished."""
        for step in range(count):
            first = step % BATCHES * self.size.n_tokens
            self.trainer.step(self.x[first : first + self.size.n_tokens])
        if self.x.is_cuda:
            torch.cuda.synchronize()


def wall_time(steps: Steps, count: int) -> float:
    """Return the microseconds of a step without the profiler, gaps between kernels included."""
    began = time.perf_counter()
    steps.take(count)
    return (time.perf_counter() - began) / count * 1e6


def kernel_times(steps: Steps, count: int) -> list[dict[str, Any]]:
    """Profile steps; return each kernel's launches and microseconds a step, the slowest first."""
    on_cuda = steps.x.is_cuda
    activity = torch.profiler.ProfilerActivity
    wanted = [activity.CUDA] if on_cuda else [activity.CPU]
    with torch.profiler.profile(activities=wanted) as profiler:
        steps.take(count)
    rows: dict[str, dict[str, Any]] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if spent <= 0:
            continue
        name = base_name(event.key)
        row = rows.setdefault(name, {"kernel": name, "launches": 0.0, "microseconds": 0.0})
        row["launches"] += event.count / count
        row["microseconds"] += spent / count
    return sorted(rows.values(), key=lambda row: -row["microseconds"])


def slowest(options: argparse.Namespace) -> str:
    """Profile a step and write the kernels and the pattern for ncu as JSON; return the table."""
    steps = Steps(options)
    wall = wall_time(steps, options.steps)
    kernels = kernel_times(steps, options.steps)
    total = sum(row["microseconds"] for row in kernels)
    # Copies and fills are not kernels, and ncu cannot select them.
    names = [row["kernel"] for row in kernels if not row["kernel"].startswith(("Memcpy", "Memset"))]
    pattern = "^(" + "|".join(names[: options.count]) + ")$"
    result = {"size": options.size, "wall": wall, "kernels": kernels, "pattern": pattern}
    write_json(options.json, result)
    rows = [
        [
            row["kernel"],
            f"{row['launches']:.1f}",
            f"{row['microseconds']:.1f}",
            f"{row['microseconds'] / total:.0%}",
        ]
        for row in kernels
    ]
    headings = ["kernel", "launches a step", "µs a step", "share"]
    title = f"# Kernels of a step, {parse_size(options.size).describe()}, {options.precision}"
    way = "as a CUDA graph" if options.graph else "launched kernel by kernel"
    last = f"Together {total:.0f} µs a step, which takes {wall:.0f} µs {way}, without the profiler."
    return f"{title}\n\n{markdown_table(headings, rows)}\n\n{last}"


def run(options: argparse.Namespace) -> None:
    """Take the steps that ncu measures."""
    steps = Steps(options)
    if steps.x.is_cuda:
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    steps.take(options.steps)
    if steps.x.is_cuda:
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def summary(options: argparse.Namespace) -> str:
    """Return the table of ncu's metrics, in the order of the profile."""
    order = [row["kernel"] for row in json.loads(options.slowest.read_text())["kernels"]]
    launches = read_launches(options.csv.read_text())
    return "# The slowest kernels under ncu\n\n" + summary_table(launches, order)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.profile_step")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("slowest", "run"):
        command = commands.add_parser(name)
        command.add_argument("--size", default="G1", help="G1…G3 or NxDxFxK")
        command.add_argument("--precision", default="screened", help="screened, bf16 or fp16")
        command.add_argument("--device", default="cuda", help="cuda, or cpu to try the command")
        command.add_argument("--steps", type=int, default=1 if name == "run" else 10)
        command.add_argument("--graph", action="store_true", help="replay a CUDA graph of the step")
        if name == "slowest":
            command.add_argument("--count", type=int, default=5, help="kernels in the pattern")
            command.add_argument("--json", type=Path, required=True)
            command.add_argument("--markdown", type=Path)
    command = commands.add_parser("summary")
    command.add_argument("--csv", type=Path, required=True, help="output of ncu --csv --page raw")
    command.add_argument("--slowest", type=Path, required=True, help="the JSON file of `slowest`")
    command.add_argument("--markdown", type=Path)
    commands.add_parser("metrics", help="print the list for ncu --metrics")
    return parser.parse_args()


def main() -> None:
    """Run one of the commands."""
    options = parse_arguments()
    if options.command == "metrics":
        print(",".join(METRICS))
        return
    if options.command == "run":
        run(options)
        return
    text = slowest(options) if options.command == "slowest" else summary(options)
    if options.markdown:
        write_text(options.markdown, text)
    print(text)


if __name__ == "__main__":
    main()
