"""Measure a step of several ranks, and the bytes that each gives the others.

    python -m benchmarks.ranks --mesh data=1 latents=2 data=2,latents=2 --json results/ranks.json

The tokens of a step (`--mesh data=R`), the latents of the model (`--mesh latents=R`) or both are
divided among processes of one machine, each with its share of the machine's threads, connected by
gloo over the loopback interface. The first steps are not timed. Bytes are what a process gives to
be gathered, padding and messages included; no latent is dead yet, so there is no AuxK. A dense
gradient, which other trainers reduce, has 8 · d_in · d_sae bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.problem import Size, make_activations, parse_size
from benchmarks.support.tables import (
    add_run_arguments,
    machine_line,
    markdown_table,
    milliseconds,
    percent,
    publish,
)
from sae_fast import SAEConfig, TrainConfig, Trainer
from sae_fast.config.mesh import parsed_mesh
from sae_fast.distributed.environment import launched

SIZES = "1024x384x3072x32,1024x384x24576x32,1024x384x98304x32"
MESHES = ["data=1", "data=2", "data=4", "latents=2", "latents=4", "data=2,latents=2"]
WARM_UP = 3


def train(size: Size, arch: str, mesh: str, steps: int) -> dict[str, float]:
    """Make some steps as one of several ranks, or alone; return what the timed ones took."""
    x = make_activations(size, 8)
    trainer = Trainer(
        SAEConfig(arch=arch, d_sae=size.d_sae, k=size.k, dead_after_tokens=10_000_000),
        TrainConfig(
            batch_size=size.n_tokens // parsed_mesh(mesh).get("data", 1),
            max_steps=WARM_UP + steps,
            mesh=mesh,
            log_every=1,
            eval_every=0,
        ),
        x,
        show_progress=False,
    )
    with trainer:
        while not trainer.is_done:
            trainer.advance()
        rows = trainer.history[WARM_UP:-1]  # the last one has an evaluation
    times = sorted(row["time_per_step_ms"] / 1e3 for row in rows)
    shares = sorted(row.get("communication_fraction", 0.0) for row in rows)
    sent = sorted(row.get("exchanged_bytes", 0.0) for row in rows)
    middle = len(rows) // 2
    return {"seconds": times[middle], "communication": shares[middle], "bytes": sent[middle]}


def measure(options: argparse.Namespace, size: Size, mesh: str) -> dict[str, float]:
    """Start the ranks and return what rank 0 measured."""
    ranks = prod(parsed_mesh(mesh).values())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        command = [sys.executable, "-m", *(launcher if ranks > 1 else ())]
        flags = [
            "--as-rank",
            str(out),
            "--sizes",
            f"{size.n_tokens}x{size.d_in}x{size.d_sae}x{size.k}",
        ]
        flags += ["--arch", options.arch, "--mesh", mesh, "--steps", str(options.steps)]
        threads = str(max(1, options.threads // ranks))
        flags += ["--threads", threads]
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run([*command, "benchmarks.ranks", *flags], env=environment, check=True)
        found: dict[str, float] = json.loads(out.read_text())
        return found


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the table as Markdown."""
    body = [
        (
            name,
            "one process" if divided == "data=1" else divided,
            milliseconds(row["seconds"]),
            percent(row["communication"]) if row["bytes"] else "-",
            f"{row['bytes']:,.0f}" if row["bytes"] else "-",
            f"{row['dense_bytes']:,}",
        )
        for name, rows in result["sizes"].items()
        for divided, row in rows.items()
    ]
    headings = ("size", "mesh", "ms a step", "communication", "bytes", "dense gradient")
    parts = ["# Ranks", "", __doc__.split("\n\n")[2].strip(), "", markdown_table(headings, body)]
    parts += ["", machine_line(result["machine"]), "", f"`{result['command']}`"]
    return "\n".join(parts)


def main() -> None:
    """Run, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.ranks")
    parser.add_argument("--sizes", default=SIZES, help="sizes NxDxFxK, separated by commas")
    parser.add_argument("--mesh", nargs="+", default=MESHES, help="data=1 is one process")
    parser.add_argument("--arch", default="topk")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    add_run_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [parse_size(text) for text in options.sizes.split(",")]
    if options.as_rank is not None:
        found = train(sizes[0], options.arch, options.mesh[0], options.steps)
        if launched().rank == 0:
            options.as_rank.write_text(json.dumps(found))
        return
    result: dict[str, Any] = {"arch": options.arch, "sizes": {}}
    for size in sizes:
        name = f"{size.n_tokens} tokens, d_in {size.d_in}, d_sae {size.d_sae:,}, k {size.k}"
        dense = 8 * size.d_in * size.d_sae
        result["sizes"][name] = {
            mesh: measure(options, size, mesh) | {"dense_bytes": dense} for mesh in options.mesh
        }
    result |= {"machine": describe_machine(torch.device("cpu"))}
    result["command"] = command_line("benchmarks.ranks")
    publish(result, report(result), options.json, options.markdown)


if __name__ == "__main__":
    main()
