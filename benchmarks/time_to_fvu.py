"""Train with sae_fast and the packaged trainers, each at its best rate, and compare held-out FVU.

    python -m benchmarks.time_to_fvu --shard-dir DIR --plot results/time_to_fvu.png

Every implementation trains once for each learning rate of a grid, from one start, on one order of
rows, in a process of its own, as in `wall_clock`. In all of them the rate rises and falls as by
sae_fast's default. Its curve is the one that ends with the lowest held-out FVU. While the best rate
is at the end of the grid, the next one beyond is tried, with the ratio of the last two.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.implementations import choose_implementations, describe
from benchmarks.support.groups import say
from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.problem import Size
from benchmarks.support.tables import markdown_table, publish
from benchmarks.support.timing import QUIET_SHARE
from benchmarks.wall_clock import (
    Curve,
    absent,
    clock_line,
    closing_lines,
    draw,
    make_parser,
    prepare,
    require_one_start,
    run_one,
    seconds_to,
    thread_count,
)
from benchmarks.worker import FALL, RISE

RATES = "1.5e-3,3e-3,6e-3"
MOST_RATES = 8


def next_rate(curves: Mapping[float, Curve]) -> float | None:
    """Return a rate beyond the grid if the best one is at its end, else None."""
    rates = sorted(curves)
    best = best_rate(curves)
    if len(rates) < 2 or len(rates) >= MOST_RATES:
        return None
    if best == rates[-1]:
        return rates[-1] * rates[-1] / rates[-2]
    return rates[0] * rates[0] / rates[1] if best == rates[0] else None


def best_rate(curves: Mapping[float, Curve]) -> float:
    """Return the rate whose curve ends with the lowest FVU; one that is not finite is the worst."""
    ends = {rate: curve.fvu[-1] for rate, curve in curves.items()}
    return min(ends, key=lambda rate: ends[rate] if math.isfinite(ends[rate]) else math.inf)


def tokens_to(curve: Curve, fvu: float, tokens_per_step: int) -> float | None:
    """Return the tokens after which a curve is at this FVU, linear between its points."""
    steps = Curve(**{**asdict(curve), "seconds": [float(step) for step in curve.steps]})
    reached = seconds_to(steps, fvu)
    return None if reached is None else reached * tokens_per_step


def report(results: Mapping[str, Any]) -> str:
    """Return the table, as Markdown."""
    curves = [Curve(**found["curve"]) for found in results["best"]]
    level = max(curve.fvu[-1] for curve in curves)
    rows = []
    for found, curve in zip(results["best"], curves, strict=True):
        seconds = seconds_to(curve, level)
        tokens = tokens_to(curve, level, results["batch_size"])
        ends = ", ".join(f"{rate:.3g}: {fvu:.4f}" for rate, fvu in found["ends"])
        rows.append(
            [
                describe(curve.implementation, "cpu"),
                f"{found['rate']:.3g}" + (" (end of the grid)" if found["is_at_end"] else ""),
                f"{curve.fvu[-1]:.4f}",
                f"{curve.seconds[-1]:.1f}",
                "-" if seconds is None else f"{seconds:.1f}",
                "-" if tokens is None else f"{tokens:,.0f}",
                ends,
            ]
        )
    headings = [
        *("implementation", "best rate", "held-out FVU at the end", "s in all"),
        *(f"s to FVU {level:.3f}", f"tokens to FVU {level:.3f}", "FVU at the end, by rate"),
    ]
    quiet = statistics.mean(curve.quiet_share for curve in curves)
    return "\n\n".join(
        [
            "# Held-out FVU over seconds and tokens, each at its best rate",
            f"{results['setting']} Every implementation runs its own training loop, from one start "
            "and on one order of rows, once for each learning rate of the grid, which rises during "
            f"the first {RISE:.0%} of the steps and falls to 0 during the last {FALL:.0%}; in "
            "sparsify, whose trainer has one shape only, it falls as soon as it has risen. The "
            "rest of each recipe is its own. "
            f"{clock_line(results)} In {quiet:.0%} of the samples other programs used less "
            f"than {QUIET_SHARE:.0%} of a processor. The FVU that seconds and tokens are counted "
            f"to is the highest one at the end.{absent(results)}",
            markdown_table(headings, rows),
            *closing_lines(results, curves),
        ]
    )


def main() -> None:
    """Run the benchmark, print the table and write the files asked for."""
    packaged = "sparsify,saelens,dictionary_learning"
    parser = make_parser(__doc__, "python -m benchmarks.time_to_fvu", packaged)
    parser.add_argument("--rates", default=RATES, help="learning rates that each is trained with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = sorted(float(rate) for rate in options.rates.split(","))
    interpreters = dict(entry.split("=", 1) for entry in options.peer_python)
    names = [name for name in options.peers.split(",") if name]
    local, peers, missing = choose_implementations(names, interpreters)
    data = prepare(options.shard_dir, options.batch_size, options.steps)
    d_in = data["rows"].shape[1]
    size = Size("time_to_fvu", options.batch_size, d_in, options.d_sae, options.k)
    best: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.pt"
        torch.save(data, path)
        for name in ["sae_fast", *[name for name in names if name in local or name in peers]]:
            curves: dict[float, Curve] = {}
            waiting = list(rates)
            while waiting:
                rate = waiting.pop(0)
                say(f"  {name}, rate {rate:.3g}")
                place = (name, peers.get(name, sys.executable), size, path, options, rate)
                curves[rate] = run_one(*place, batches=options.steps, length=options.steps)
                beyond = None if waiting else next_rate(curves)
                waiting += [] if beyond is None else [beyond]
            rate = best_rate(curves)
            best.append(
                {
                    "rate": rate,
                    "is_at_end": rate in (min(curves), max(curves)),
                    "ends": [(each, curves[each].fvu[-1]) for each in sorted(curves)],
                    "curve": asdict(curves[rate]),
                }
            )
    chosen = [Curve(**found["curve"]) for found in best]
    require_one_start(chosen)
    data_name = options.name or options.shard_dir.name
    results: dict[str, Any] = {
        "setting": (
            f"{data_name}: {options.steps} steps of {options.batch_size} rows, d_in {d_in}, "
            f"d_sae {options.d_sae}, k {options.k}; {len(data['heldout']):,} held-out rows."
        ),
        "batch_size": options.batch_size,
        "clock": options.clock,
        "best": best,
        "missing": missing,
        "machine": describe_machine(),
        "command": command_line("benchmarks.time_to_fvu"),
    }
    if options.plot:
        sizes = f"d_sae {options.d_sae}, k {options.k}, {thread_count(options.threads)}"
        title = f"{data_name}, {sizes}, each at its best learning rate"
        draw(chosen, options.plot, title, clock=options.clock, tokens_per_step=options.batch_size)
    publish(results, report(results), options.json, options.markdown)


if __name__ == "__main__":
    main()
