"""Time one whole training step of sae_fast beside PyTorch and the packaged trainers.

python -m benchmarks.train_step --sizes S1,S2 --rounds 9 --json results/train_step.json
python -m benchmarks.train_step --device cuda --sizes G1,G2,G3

With `--dead all` a step in which AuxK trains every latent is timed too.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.implementations import (
    ALL_DEAD,
    BASELINES,
    DEFAULT_OURS,
    DEFAULT_PEERS,
    OURS_ON_CUDA,
    PEER_MODULES,
    UNPACKAGED,
    choose_implementations,
)
from benchmarks.support.floors import measure_rates, step_floor
from benchmarks.support.groups import Comparison, measure_memory, run_groups, say
from benchmarks.support.machine import command_line, describe_machine, device_or_exit
from benchmarks.support.problem import DEFAULT_SIZES, Size, parse_size
from benchmarks.support.step_report import read_results, report, size_result
from benchmarks.support.tables import write_json, write_text


def run_size(size: Size, comparison: Comparison, memory_steps: int) -> dict[str, Any]:
    """Measure one size; return its entry of the JSON file."""
    say(size.describe())
    memory: dict[str, int] = {}
    if memory_steps and comparison.device.type == "cpu":  # on a GPU torch counts it meanwhile
        for name in [*comparison.ours, *comparison.local]:
            memory[name] = measure_memory(name, size, comparison.threads, memory_steps)
            say(f"    {name}: peak memory {memory[name] / 2**20:.0f} MiB above the start")
    rates = {
        precision: measure_rates(size, precision, comparison.device)
        for precision in ("screened", "bf16")
    }
    floors = {precision: step_floor(size, precision, rates[precision]) for precision in rates}
    outcomes = run_groups(comparison)
    for name, peak in memory.items():
        outcomes[name].peak_bytes = peak
    return size_result(size, outcomes, rates, floors)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.train_step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--sizes", help="S1…S4, G1…G3 or NxDxFxK, comma-separated; default: all for the device"
    )
    known = ", ".join([*BASELINES, *PEER_MODULES, *UNPACKAGED])
    parser.add_argument("--peers", help=f"implementations, comma-separated, from {known}")
    parser.add_argument("--ours", help=f"modes, comma-separated, from {', '.join(OURS_ON_CUDA)}")
    parser.add_argument(
        "--dead", choices=["none", "all"], default="none", help="all: also time AuxK at its dearest"
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="interpreter with the peer installed; default: this one",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="untimed samples of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="time limit of a size; no implementation or round is started after it",
    )
    parser.add_argument(
        "--memory-steps",
        type=int,
        default=2,
        help="steps of the memory measurement; 0: no measurement",
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument(
        "--merge", action="store_true", help="keep the other sizes that are already in --json"
    )
    return parser.parse_args()


def names_in(text: str | None, default: Sequence[str]) -> list[str]:
    """Split a comma-separated option; return the default if it was not given."""
    return list(default) if text is None else [name for name in text.split(",") if name]


def main() -> None:
    """Run, print the tables, write the files."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = device_or_exit(options.device)
    ours = names_in(options.ours, DEFAULT_OURS[device.type])
    ours += [ALL_DEAD] if options.dead == "all" else []
    peer_names = names_in(options.peers, DEFAULT_PEERS[device.type])
    interpreters = dict(item.split("=", 1) for item in options.peer_python)
    local, peers, missing = choose_implementations(peer_names, interpreters)
    results = read_results(options.json) if options.merge else {}
    failed = False
    for size in map(parse_size, names_in(options.sizes, DEFAULT_SIZES[device.type])):
        limits = (options.rounds, options.warmup, options.threads)
        deadline = time.monotonic() + options.seconds
        comparison = Comparison(size, ours, local, peers, *limits, device, deadline)
        result = run_size(size, comparison, options.memory_steps)
        failed |= any("failure" in result["contestants"][name] for name in ours)
        result["machine"] = describe_machine(device)
        result["command"] = command_line("benchmarks.train_step")
        result["missing"] = missing
        results[size.name] = result
        # Written after every size, so that a run that is cut short keeps its results.
        if options.json:
            write_json(options.json, {"sizes": results})
        if options.markdown:
            write_text(options.markdown, report(results))
    print(report(results))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
