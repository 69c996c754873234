"""Train with sae_fast and the packaged trainers, each at its best rate, and compare held-out FVU.

    python -m benchmarks.time_to_fvu --shard-dir DIR --plot results/time_to_fvu.png
    python -m benchmarks.time_to_fvu --shard-dir DIR --json F.json --append --seeds 0 1 2

Every implementation trains once for each learning rate of a grid, from one start, on one order of
rows, in a process of its own, as in `wall_clock`. In all of them the rate rises and falls as by
sae_fast's default. The best rate is the one that ends with the lowest held-out FVU. While it is at
the end of the grid, the next one beyond is tried, with the ratio of the last two. The grid is
trained with the first seed, of the start and of the order of the rows; with the other seeds each
trains at its best rate alone. The curve is the one that ends with the median FVU. With --append
what the --json file has is kept, and only the implementations and seeds that it lacks train.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def curves_of(found: Mapping[str, Any]) -> dict[str, Curve]:
    """Return the curves of an implementation at its best rate, by seed."""
    return {seed: Curve(**curve) for seed, curve in found["curves"].items()}


def median_curve(curves: Sequence[Curve]) -> Curve:
    """Return the curve that ends with the median FVU, of an even number the lower one."""
    return sorted(curves, key=lambda curve: curve.fvu[-1])[(len(curves) - 1) // 2]


def spread(values: Sequence[float | None], digits: int) -> str:
    """Return the median with smallest and largest, one value alone as it is, "-" for a None."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    median = f"{statistics.median(known):,.{digits}f}"
    low, high = f"{min(known):,.{digits}f}", f"{max(known):,.{digits}f}"
    return median if len(known) == 1 else f"{median} ({low} to {high})"


def report(results: Mapping[str, Any]) -> str:
    """Return the table, as Markdown."""
    groups = [list(curves_of(found).values()) for found in results["best"]]
    everything = [curve for curves in groups for curve in curves]
    level = max(curve.fvu[-1] for curve in everything)
    rows = []
    for found, curves in zip(results["best"], groups, strict=True):
        ends = ", ".join(f"{rate:.3g}: {fvu:.4f}" for rate, fvu in found["ends"])
        rows.append(
            [
                describe(found["implementation"], "cpu"),
                f"{found['rate']:.3g}" + (" (end of the grid)" if found["is_at_end"] else ""),
                str(len(curves)),
                spread([curve.fvu[-1] for curve in curves], 4),
                spread([curve.seconds[-1] for curve in curves], 1),
                spread([seconds_to(curve, level) for curve in curves], 1),
                spread([tokens_to(curve, level, results["batch_size"]) for curve in curves], 0),
                ends,
            ]
        )
    headings = [
        *("implementation", "best rate", "seeds", "held-out FVU at the end", "s in all"),
        *(f"s to FVU {level:.3f}", f"tokens to FVU {level:.3f}", "FVU at the end, by rate"),
    ]
    quiet = statistics.mean(curve.quiet_share for curve in everything)
    return "\n\n".join(
        [
            "# Held-out FVU over seconds and tokens, each at its best rate",
            f"{results['setting']} Every implementation runs its own training loop, from one start "
            "and on one order of rows, once for each learning rate of the grid, which rises during "
            f"the first {RISE:.0%} of the steps and falls to 0 during the last {FALL:.0%}; in "
            "sparsify, whose trainer has one shape only, it falls as soon as it has risen. The "
            "rest of each recipe is its own. Figures are medians over the seeds, of the start and "
            "of the order of the rows, with the smallest and the largest; the grid is trained with "
            "the first seed. "
            f"{clock_line(results)} In {quiet:.0%} of the samples other programs used less "
            f"than {QUIET_SHARE:.0%} of a processor. The FVU that seconds and tokens are counted "
            f"to is the highest one at the end.{absent(results)}",
            markdown_table(headings, rows),
            *closing_lines(results["machine"], results["commands"], everything),
        ]
    )


class Runs:
    """Trainings of the implementations on the rows of the shards.

    Args:
        options: of the command.
        folder: for the rows of each seed.
        peers: the interpreter of each implementation that has one of its own.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, peers: Mapping[str, str]) -> None:
        self.options, self.folder, self.peers = options, folder, peers
        rows, heldout = self._read(options.seeds[0])
        d_in = rows.shape[1]
        self.size = Size("time_to_fvu", options.batch_size, d_in, options.d_sae, options.k)
        self.name: str = options.name or options.shard_dir.name
        self.setting = (
            f"{self.name}: {options.steps} steps of {options.batch_size} rows, d_in {d_in}, "
            f"d_sae {options.d_sae}, k {options.k}; {len(heldout):,} held-out rows."
        )

    def grid(self, name: str) -> dict[str, Any]:
        """Train an implementation with each rate of the grid and what lies beyond; keep the best.

        All have the first seed.
        """
        curves: dict[float, Curve] = {}
        waiting = sorted(float(rate) for rate in self.options.rates.split(","))
        while waiting:
            rate = waiting.pop(0)
            curves[rate] = self.one(name, rate, self.options.seeds[0])
            beyond = None if waiting else next_rate(curves)
            waiting += [] if beyond is None else [beyond]
        rate = best_rate(curves)
        return {
            "implementation": name,
            "rate": rate,
            "is_at_end": rate in (min(curves), max(curves)),
            "ends": [(each, curves[each].fvu[-1]) for each in sorted(curves)],
            "curves": {str(self.options.seeds[0]): asdict(curves[rate])},
        }

    def one(self, name: str, rate: float, seed: int) -> Curve:
        """Train an implementation once."""
        say(f"  {name}, rate {rate:.3g}, seed {seed}")
        if not self._path(seed).exists():
            self._read(seed)
        place = (name, self.peers.get(name, sys.executable), self.size, self._path(seed))
        steps = self.options.steps
        return run_one(*place, self.options, rate, batches=steps, length=steps, seed=seed)

    def _path(self, seed: int) -> Path:
        return self.folder / f"rows_{seed}.pt"

    def _read(self, seed: int) -> tuple[Tensor, Tensor]:
        """Save the rows in the order of a seed; return them and the held-out ones."""
        options = self.options
        data = prepare(options.shard_dir, options.batch_size, options.steps, seed)
        torch.save(data, self._path(seed))
        return data["rows"], data["heldout"]


def results_before(options: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Return the results that --append keeps; raise SystemExit if they are of another setting."""
    if not options.append:
        return {"best": [], "commands": []}
    if options.json is None:
        raise SystemExit("error: --append needs --json, the file that has the earlier results")
    if not options.json.exists():
        return {"best": [], "commands": []}
    found: dict[str, Any] = json.loads(options.json.read_text())
    if (found["setting"], found["clock"]) != (setting, options.clock):
        raise SystemExit(f"error: the results in {options.json} are of {found['setting']}")
    return found


def main() -> None:
    """Run the benchmark, print the table and write the files asked for."""
    packaged = "sparsify,saelens,dictionary_learning"
    parser = make_parser(__doc__, "python -m benchmarks.time_to_fvu", packaged)
    parser.add_argument("--rates", default=RATES, help="learning rates that each is trained with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first for the grid")
    parser.add_argument("--append", action="store_true", help="keep what --json has")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    interpreters = dict(entry.split("=", 1) for entry in options.peer_python)
    names = [name for name in options.peers.split(",") if name]
    local, peers, missing = choose_implementations(names, interpreters)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(options, Path(folder), peers)
        before = results_before(options, runs.setting)
        best: dict[str, dict[str, Any]] = {
            found["implementation"]: found for found in before["best"]
        }
        for name in ["sae_fast", *[name for name in names if name in local or name in peers]]:
            if name not in best:
                best[name] = runs.grid(name)
            found = best[name]["curves"]
            for seed in options.seeds:
                if str(seed) not in found:
                    found[str(seed)] = asdict(runs.one(name, best[name]["rate"], seed))
    groups = [curves_of(found) for found in best.values()]
    for seed in {seed for curves in groups for seed in curves}:
        require_one_start([curves[seed] for curves in groups if seed in curves])
    results: dict[str, Any] = {
        "setting": runs.setting,
        "batch_size": options.batch_size,
        "clock": options.clock,
        "best": list(best.values()),
        "missing": missing,
        "machine": describe_machine(),
        "commands": [*before["commands"], command_line("benchmarks.time_to_fvu")],
    }
    if options.plot:
        sizes = f"d_sae {options.d_sae}, k {options.k}, {thread_count(options.threads)}"
        title = f"{runs.name}, {sizes}, each at its best learning rate"
        drawn = [median_curve(list(curves.values())) for curves in groups]
        draw(drawn, options.plot, title, clock=options.clock, tokens_per_step=options.batch_size)
    publish(results, report(results), options.json, options.markdown)


if __name__ == "__main__":
    main()
