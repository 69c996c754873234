"""Train with sae_fast, PyTorch and the peers, and draw held-out FVU over the seconds of training.

    python -m benchmarks.wall_clock --shard-dir DIR --plot results/wall_clock.png

Every implementation runs its own training loop in a process of its own, one after another. All
start from the same weights, see the same rows in the same order, and use the same constant learning
rate; the rest of the recipe is the implementation's own. The clock counts the steps, from a request
for a batch to the next request; evaluations are outside of it, and each implementation reconstructs
the held-out rows with its own inference.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from benchmarks.implementations import adapter_module, choose_implementations, describe
from benchmarks.support.groups import say
from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.peer_process import PeerProcess
from benchmarks.support.problem import Size
from benchmarks.support.tables import add_run_arguments, machine_line, markdown_table, publish
from benchmarks.support.timing import QUIET_SHARE

BATCHES_IN_MEMORY = 64  # shuffled again for each pass over the rows; longer trainings repeat them
CLOCKS = {"wall": "seconds of training", "cpu": "CPU seconds of training"}
# Colours that colour-blind readers can tell apart (Okabe and Ito), with a marker each.
STYLES = {
    "sae_fast": ("#D55E00", "o", "sae_fast"),
    "sae_fast_bf16": ("#E69F00", "s", "sae_fast, --amp bf16"),
    "eager": ("#000000", "^", "PyTorch, dense"),
    "tuned": ("#56B4E9", "v", "PyTorch, embedding_bag"),
    "gather": ("#0072B2", "D", "PyTorch, gather-based"),
    "sparsify": ("#009E73", "P", "sparsify"),
    "saelens": ("#CC79A7", "X", "SAELens"),
    "dictionary_learning": ("#999999", "*", "dictionary_learning"),
}


@dataclass(frozen=True)
class Curve:
    """The held-out FVU of one implementation during its training.

    Attributes:
        implementation: name of the implementation.
        steps: numbers of steps after which it was evaluated.
        seconds: seconds of training up to these steps.
        fvu: FVU of the held-out rows after these steps.
        quiet_share: share of the samples without other programs on the processors.
        versions: versions of the libraries in its process.
    """

    implementation: str
    steps: list[int]
    seconds: list[float]
    fvu: list[float]
    quiet_share: float
    versions: dict[str, str]


def read_rows(shard_dir: Path, pattern: str) -> Tensor:
    """Return the rows [n, D] of the shards of a directory whose names match."""
    parts = []
    for path in sorted(shard_dir.glob(pattern)):
        with h5py.File(path) as file:
            parts.append(torch.from_numpy(file["activations"][:]).float())
    if not parts:
        raise SystemExit(f"error: {shard_dir} has no file {pattern}")
    return torch.cat(parts)


def prepare(
    shard_dir: Path, batch_size: int, batches: int = BATCHES_IN_MEMORY, seed: int = 0
) -> dict[str, Tensor]:
    """Return normalised training rows in the order they are served, and held-out rows.

    The seed is of the order.
    """
    rows, heldout = read_rows(shard_dir, "train*.h5"), read_rows(shard_dir, "heldout*.h5")
    mean = rows.mean(0)
    scale = rows.shape[1] ** 0.5 / (rows - mean).norm(dim=1).mean()
    generator = torch.Generator().manual_seed(seed)
    passes = -(-batches * batch_size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])
    served = rows[order[: batches * batch_size]]
    return {"rows": (served - mean) * scale, "heldout": (heldout - mean) * scale}


def evaluation_steps(total: int) -> list[int]:
    """Return steps at which to evaluate: 0, then about eight in each doubling up to `total`."""
    steps = {0, total}
    step = 4.0
    while step < total:
        steps.add(round(step))
        step *= 2**0.5
    return sorted(steps)


def train(peer: PeerProcess, total: int, clock: str) -> Curve:
    """Let a process train; return the curve of its held-out FVU over the seconds of a clock."""
    curve = Curve(peer.implementation, [0], [0.0], [peer.heldout_fvu()], 1.0, peer.versions)
    quiet = []
    for before, step in zip(curve.steps, evaluation_steps(total)[1:], strict=False):
        sample = peer.step(step - before)
        quiet.append(sample.quiet)
        seconds = sample.cpu_seconds if clock == "cpu" else sample.seconds
        curve.seconds.append(curve.seconds[-1] + seconds * (step - before))
        curve.steps.append(step)
        curve.fvu.append(peer.heldout_fvu())
    say(f"  {peer.implementation}: FVU {curve.fvu[-1]:.4f} after {curve.seconds[-1]:.1f} s")
    share = sum(quiet) / len(quiet)
    return Curve(**{**asdict(curve), "quiet_share": share})


def seconds_to(curve: Curve, fvu: float) -> float | None:
    """Return the seconds after which a curve is at this FVU, linear between its points."""
    points = list(zip(curve.seconds, curve.fvu, strict=True))
    for (t0, f0), (t1, f1) in pairwise(points):
        if f1 <= fvu < f0:
            return t0 + (t1 - t0) * (f0 - fvu) / (f0 - f1)
    return None


def report(results: Mapping[str, Any]) -> str:
    """Return the table, as Markdown."""
    curves = [Curve(**curve) for curve in results["curves"]]
    level = max(curve.fvu[-1] for curve in curves)
    base = seconds_to(curves[0], level)
    rows = []
    for curve in curves:
        reached = seconds_to(curve, level)
        times = f"{reached / base:.1f}×" if reached is not None and base else "-"
        rows.append(
            [
                describe(curve.implementation, "cpu"),
                f"{1000 * curve.seconds[-1] / curve.steps[-1]:.1f}",
                f"{curve.seconds[-1]:.1f}",
                f"{curve.fvu[-1]:.4f}",
                "-" if reached is None else f"{reached:.1f}",
                times,
                f"{curve.quiet_share:.0%}",
            ]
        )
    headings = [
        *("implementation", "ms a step", "s in all", "held-out FVU at the end"),
        *(f"s to FVU {level:.3f}", "times sae_fast", "quiet samples"),
    ]
    return "\n\n".join(
        [
            "# Held-out FVU over seconds of training",
            f"{results['setting']} Every implementation runs its own training loop, one after "
            "another, from the same weights, on the same rows in the same order, with the same "
            "constant learning rate; the rest of its recipe is its own. "
            f"{clock_line(results)} Each reconstructs the held-out rows with its own inference. "
            "FVU is the share of the variance that the reconstruction misses. The FVU in the table "
            "is the highest one that a training ended with. A sample is quiet if other programs "
            f"used less than {QUIET_SHARE:.0%} of a processor during it.{absent(results)}",
            markdown_table(headings, rows),
            *closing_lines(results["machine"], [results["command"]], curves),
        ]
    )


def thread_count(threads: int) -> str:
    """Return the number of threads for a title."""
    return f"{threads} CPU thread{'' if threads == 1 else 's'}"


def clock_line(results: Mapping[str, Any]) -> str:
    """Return one sentence about the seconds of the table."""
    if results.get("clock", "wall") == "wall":
        return "The clock counts steps, not evaluations."
    return (
        "Seconds are CPU time of the process in its steps, evaluations not counted; other programs "
        "that use the machine change it less than the time that passes."
    )


def absent(results: Mapping[str, Any]) -> str:
    """Return a sentence about the implementations that are not installed; "" where all are."""
    missing = results["missing"]
    return f" Not installed here: {', '.join(missing)}." if missing else ""


def closing_lines(
    machine: Mapping[str, Any], commands: Sequence[str], curves: Sequence[Curve]
) -> list[str]:
    """Return the last lines of a report: versions, machine and commands."""
    versions = {name: v for curve in curves for name, v in curve.versions.items()}
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    lines = [machine_line(machine), *(f"`{command}`" for command in commands)]
    return [f"Versions: {named}.", "\n".join(lines)]


def draw(
    curves: Sequence[Curve],
    path: Path,
    title: str,
    *,
    clock: str = "wall",
    tokens_per_step: int | None = None,
) -> None:
    """Draw the curves into an image that is readable at half of a page's width.

    `clock` is what their seconds are of. With `tokens_per_step` a second panel has them over the
    tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: list[tuple[str, Callable[[Curve], Sequence[float]]]]
    panels = [(CLOCKS[clock], lambda curve: curve.seconds)]
    if tokens_per_step is not None:
        per_step = tokens_per_step
        panels.append(("tokens", lambda curve: [step * per_step for step in curve.steps]))
    with plt.rc_context({"font.size": 13, "svg.hashsalt": "sae_fast"}):
        size = (8.0 if len(panels) == 1 else 5.6 * len(panels), 4.6)
        fig, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        for ax, (name, places) in zip(grid[0], panels, strict=True):
            _draw_panel(ax, curves, places)
            ax.set_xlabel(f"{name} (log scale)")
        grid[0][0].set_ylabel("held-out FVU (log scale)")
        grid[0][0].legend(fontsize=11.5, framealpha=1)
        fig.suptitle(title, fontsize=13)
        fig.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=160, metadata={"Software": None})
        plt.close(fig)


def _draw_panel(
    ax: Any, curves: Sequence[Curve], places: Callable[[Curve], Sequence[float]]
) -> None:
    """Draw the held-out FVU of all curves over their `places`."""
    for curve in curves:
        colour, marker, label = STYLES[curve.implementation]
        width = 2.8 if curve.implementation.startswith("sae_fast") else 1.8
        style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": width}
        # The start has no place on a logarithmic axis.
        ax.plot(places(curve)[1:], curve.fvu[1:], label=label, **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter("{x:,.12g}")
    ticks = [0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
    low, high = ax.get_ylim()
    ax.set_yticks([tick for tick in ticks if low <= tick <= high])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.grid(alpha=0.3, which="both", linewidth=0.6)


def make_parser(description: str | None, prog: str, peers: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that comparisons of whole trainings share."""
    parser = argparse.ArgumentParser(description=description, prog=prog)
    parser.add_argument("--shard-dir", type=Path, required=True, help="train*.h5 and heldout*.h5")
    parser.add_argument("--name", help="what the table calls the data; default: the folder's name")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--peers", default=peers)
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="the Python of a peer's own environment",
    )
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="cpu: CPU time of the process, where other programs use the machine; --threads 1",
    )
    add_run_arguments(parser)
    parser.add_argument("--plot", type=Path, help="draw the curves into this .png, .svg or .pdf")
    return parser


def main() -> None:
    """Run the benchmark, print the table and write the files asked for."""
    default_peers = "eager,gather,sparsify,saelens"
    parser = make_parser(__doc__, "python -m benchmarks.wall_clock", default_peers)
    parser.add_argument("--lr", type=float, default=1e-3, help="of all, constant")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    interpreters = dict(entry.split("=", 1) for entry in options.peer_python)
    names = [name for name in options.peers.split(",") if name]
    local, peers, missing = choose_implementations(names, interpreters)
    data = prepare(options.shard_dir, options.batch_size)
    d_in = data["rows"].shape[1]
    size = Size("wall_clock", options.batch_size, d_in, options.d_sae, options.k)
    curves: list[Curve] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.pt"
        torch.save(data, path)
        for name in ["sae_fast", *[name for name in names if name in local or name in peers]]:
            python = peers.get(name, sys.executable)
            curves.append(run_one(name, python, size, path, options, options.lr))
    require_one_start(curves)
    data_name = options.name or options.shard_dir.name
    results: dict[str, Any] = {
        "setting": (
            f"{data_name}: {options.steps} steps of {options.batch_size} rows, d_in {d_in}, "
            f"d_sae {options.d_sae}, k {options.k}, learning rate {options.lr:g}."
        ),
        "clock": options.clock,
        "curves": [asdict(curve) for curve in curves],
        "missing": missing,
        "machine": describe_machine(),
        "command": command_line("benchmarks.wall_clock"),
    }
    if options.plot:
        sizes = f"d_sae {options.d_sae}, k {options.k}, {thread_count(options.threads)}"
        draw(curves, options.plot, f"{data_name}, {sizes}", clock=options.clock)
    publish(results, report(results), options.json, options.markdown)


def run_one(
    name: str,
    python: str,
    size: Size,
    data: Path,
    options: argparse.Namespace,
    rate: float,
    *,
    batches: int = BATCHES_IN_MEMORY,
    length: int | None = None,
    seed: int = 0,
) -> Curve:
    """Train with one implementation in a process of its own; return its curve.

    The data are so many batches. With the length of the run in steps the rate rises and falls. The
    seed is of the first weights.
    """
    place = (adapter_module(name), python, size, batches, options.threads)
    with PeerProcess(name, *place, data=data, rate=rate, length=length, seed=seed) as peer:
        return train(peer, options.steps, options.clock)


def require_one_start(curves: Sequence[Curve]) -> None:
    """Raise ValueError unless all implementations begin with the same reconstruction."""
    start = statistics.median(curve.fvu[0] for curve in curves)
    for curve in curves:
        if abs(curve.fvu[0] - start) > 1e-3 * start:
            raise ValueError(
                f"{curve.implementation} starts at FVU {curve.fvu[0]:.5f}, others at {start:.5f}"
            )


if __name__ == "__main__":
    main()
