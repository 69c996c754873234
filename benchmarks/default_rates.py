"""Train with the default rates and with multiples of the default learning rate.

    python -m benchmarks.default_rates --shard-dir DIR --epochs 1 5 --markdown default_rates.md
    python -m benchmarks.default_rates --shard-dir DIR --arch relu --target-l0 32 --tokens 50000 \\
      --json default_rates.json --markdown default_rates.md --append

The defaults follow from the tokens of the run (training/fitted_batch.py, fitted_rates.py). A row is
a number of tokens, a batch size, and a factor of the default learning rate; everything else has its
default, as in `python -m sae_fast.train --shard-dir DIR --k K`, or with `--target-l0`. FVU, dead
latents and L0 are of the held-out shards, where a latent is dead that fires on none of their rows.
They are means over the seeds, with the largest distance from the mean. CPU seconds are medians of
what the process computes from the first step to the last evaluation; other work on the machine
lengthens them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.support.machine import command_line, describe_machine, device_or_exit
from benchmarks.support.tables import add_run_arguments, machine_line, markdown_table, publish
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.fitted_rates import SHARES
from sae_fast.training.trainer import Trainer

WITH_K = ("topk", "batch_topk", "matryoshka")
FIGURES = ("heldout_fvu", "heldout_dead_fraction", "heldout_l0")


def train(
    options: argparse.Namespace, limit: dict[str, int], batch_size: int, factor: float, seed: int
) -> dict[str, Any]:
    """Train one autoencoder; return its rate, steps, seconds and held-out figures.

    `limit` is what ends the run: max_epochs or max_tokens, by this name.
    """
    size = {"k": options.k} if options.arch in WITH_K else {"target_l0": options.target_l0}
    sae = SAEConfig(arch=options.arch, d_sae=options.d_sae, **size)
    given: dict[str, Any] = {
        "shard_dir": options.shard_dir,
        **limit,
        "batch_size": batch_size or None,
        "seed": seed,
        "eval_every": 0,
        "checkpoint_every": 0,
        "num_threads": options.threads,
        "device": options.device,
    }
    trainer = Trainer(sae, TrainConfig(**given), show_progress=False)
    rate = trainer.schedules.rate.peak * factor
    if factor != 1:
        trainer.close()
        trainer = Trainer(sae, TrainConfig(**given, lr=rate), show_progress=False)
    begin = time.process_time()
    trainer.train()
    seconds = time.process_time() - begin
    figures = {name: trainer.history[-1][name] for name in FIGURES}
    setting = {**limit, "tokens": trainer.tokens, "asked": batch_size}
    setting |= {"factor": factor, "seed": seed}
    batch = {"batch_size": trainer.train_config.batch_size, "steps": trainer.total_steps}
    return {**setting, **batch, "rate": rate, "seconds": seconds, **figures}


def spread(values: list[float], digits: int) -> str:
    """Return mean ± largest distance from it."""
    mean = statistics.mean(values)
    distance = max(abs(value - mean) for value in values)
    return f"{mean:.{digits}f} ± {distance:.{digits}f}"


def rows_of(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Return the row of each setting, over its seeds."""
    groups: dict[tuple[int, int, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["tokens"], run["asked"], run["factor"]), []).append(run)
    rows = []
    for (tokens, asked, factor), group in groups.items():
        size = f"{group[0]['batch_size']:,}{'' if asked else ', default'}"
        name = f"{group[0]['rate']:.2g}{', default' if factor == 1 else ''}"
        fvu, dead, l0 = ([run[figure] for run in group] for figure in FIGURES)
        shown = [spread(fvu, 4), spread([100 * share for share in dead], 1), spread(l0, 1)]
        seconds = f"{statistics.median(run['seconds'] for run in group):.0f}"
        rows.append([f"{tokens:,}", size, f"{group[0]['steps']:,}", name, *shown, seconds])
    return rows


def report(result: dict[str, Any]) -> str:
    """Return the explanation and the table of every part as Markdown."""
    headings = ["tokens", "batch", "steps", "learning rate"]
    headings += ["held-out FVU", "dead %", "held-out L0", "CPU seconds"]
    lines = ["# Default learning rates", (__doc__ or "").strip().split("\n\n")[2]]
    for part in result["parts"]:
        lines += [f"## {part['title']}", part["about"]]
        lines += [markdown_table(headings, rows_of(part["runs"]))]
        lines += [machine_line(part["machine"]), f"`{part['command']}`"]
    return "\n\n".join(line for line in lines if line)


def parts_before(path: Path | None) -> list[dict[str, Any]]:
    """Return the parts of a file of results, none where it does not exist yet."""
    if path is None:
        raise SystemExit("error: --append needs --json, the file that has the earlier parts")
    parts: list[dict[str, Any]] = json.loads(path.read_text())["parts"] if path.exists() else []
    return parts


def main() -> None:
    """Train all, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.default_rates")
    parser.add_argument("--shard-dir", required=True)
    parser.add_argument("--arch", default="topk", choices=[*WITH_K, *SHARES])
    parser.add_argument("--k", type=int, default=32, help="of the architectures that have one")
    parser.add_argument("--target-l0", type=float, help="of the others; default: theirs")
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[0], help="0: the default")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--tokens", type=int, nargs="+", help="in place of --epochs")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.3, 1.0, 2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--about", default="", help="one sentence about the shards")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--append", action="store_true", help="keep the parts that --json has")
    add_run_arguments(parser)
    options = parser.parse_args()
    device = device_or_exit(options.device)
    limits = [{"max_epochs": epochs} for epochs in options.epochs]
    if options.tokens:
        limits = [{"max_tokens": tokens} for tokens in options.tokens]
    parts = parts_before(options.json) if options.append else []
    runs = [
        train(options, limit, batch_size, factor, seed)
        for limit in limits
        for batch_size in options.batch_sizes
        for factor in options.factors
        for seed in options.seeds
    ]
    sparsity = f"k {options.k}" if options.arch in WITH_K else f"target L0 {options.target_l0}"
    title = f"{options.arch}, {sparsity}, d_sae {options.d_sae}"
    part = {"title": title, "about": options.about, "runs": runs}
    part |= {
        "machine": describe_machine(device),
        "command": command_line("benchmarks.default_rates"),
    }
    result = {"parts": [*parts, part]}
    publish(result, report(result), options.json, options.markdown)


if __name__ == "__main__":
    main()
