"""Train every architecture at several sparsities and seeds, and compare the results.

    python -m benchmarks.architectures --shard-dir examples/activations

On activations it measures held-out FVU and L0, with a plot, and the share of latents that are
silent on the held-out rows; then the time of a step of the trained model, beside a step of the
architecture in plain dense PyTorch from the same weights. On data made from a known sparse
dictionary (`--planted`) it measures how well the decoder's rows match the dictionary (MCC). All
architectures train on the same rows; only the settings of the architecture differ.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.dense_architectures import DenseArchitecture
from benchmarks.support.groups import say
from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.planted import Planted, matched_cosine
from benchmarks.support.tables import (
    add_run_arguments,
    machine_line,
    markdown_table,
    milliseconds,
    write_json,
    write_text,
)
from benchmarks.support.timing import interleave, measure, median_ratio, summarize
from sae_fast.activations import Rows
from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.optimizer.loss_scaler import LossScaler
from sae_fast.training.optimizer.row_optimizer import RowOptimizer
from sae_fast.training.step import TrainingStep
from sae_fast.training.trainer import Trainer

_TARGETS = (16, 32, 64)
_WITH_K = ("topk", "batch_topk", "matryoshka")
_WITH_TARGET = ("relu", "jumprelu", "gated")
# By architecture, three settings of its sparsity, from sparse to dense.
RECIPES: dict[str, Sequence[dict[str, Any]]] = {
    **{arch: [{"k": k} for k in _TARGETS] for arch in _WITH_K},
    **{arch: [{"target_l0": l0} for l0 in _TARGETS] for arch in _WITH_TARGET},
}
# These come near the target L0 within some hundred steps; the defaults suit longer trainings.
QUICK: dict[str, dict[str, Any]] = {
    "relu": {"l1_penalty_coeff": 1.5, "target_l0_rate": 0.02},
    "jumprelu": {"sparsity_penalty_coeff": 30.0, "jumprelu_threshold_lr": 10.0},
    "gated": {"target_l0_rate": 0.02},
}


@dataclass(frozen=True)
class Reached:
    """The results of one training; `mcc` only for planted data."""

    arch: str
    setting: str
    seed: int
    fvu: float
    l0: float
    dead_share: float
    mcc: float | None = None


@dataclass(frozen=True)
class StepTime:
    """Times of a step of a trained model in sae_fast and in dense PyTorch."""

    arch: str
    setting: str
    l0: float
    ours: float  # seconds, medians
    dense: float
    ratio: float  # median over rounds


def train(
    arch: str, fields: dict[str, Any], seed: int, options: argparse.Namespace, planted: bool
) -> tuple[Reached, Trainer]:
    """Train one model on shards or on planted data; return its results and its trainer."""
    setting = ", ".join(f"{name} {value:g}" for name, value in fields.items())
    training = TrainConfig(
        shard_dir=None if planted else str(options.shard_dir),
        batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=options.lr,
        seed=seed,
        eval_every=0,
        checkpoint_every=0,
    )
    data = Planted(seed=seed) if planted else None
    sizes: dict[str, Any] = {"expansion_factor": options.expansion_factor}
    rows: dict[str, Tensor] = {}
    if data is not None:
        sizes = {"d_sae": data.n_features, "normalize_activations": "none"}
        rows = {"data": data.draw(options.planted_rows), "heldout": data.draw(4096)}
    fields = fields | QUICK.get(arch, {})
    model = SAEConfig(arch=arch, dead_after_tokens=options.dead_after_tokens, **sizes, **fields)
    trainer = Trainer(model, training, show_progress=False, **rows)
    sae = trainer.train()
    mcc = None if data is None else matched_cosine(sae.W_dec.detach(), data.features)
    reached = Reached(
        arch,
        setting,
        seed,
        trainer.summary["final_heldout_fvu"],
        trainer.summary["final_heldout_l0"],
        trainer.summary["final_heldout_dead_fraction"],
        mcc,
    )
    shown = "" if mcc is None else f", MCC {mcc:.3f}"
    say(f"  {arch}, {setting}, seed {seed}: FVU {reached.fvu:.4f}, L0 {reached.l0:.1f}{shown}")
    return reached, trainer


def time_steps(trained: Reached, trainer: Trainer, rounds: int) -> StepTime:
    """Time steps of a trained model and of dense PyTorch, interleaved, on a held-out batch.

    Raises ValueError if their first losses differ.
    """
    assert trainer.data.heldout is not None
    heldout = torch.cat(list(trainer.data.heldout))
    x = trainer.sae.normalize(heldout[: trainer.train_config.kept_batch_size])
    rows = Rows(x, {})
    dense = DenseArchitecture(trainer.sae, lr=1e-6)
    step = TrainingStep(
        trainer.sae, RowOptimizer(trainer.sae), LossScaler(enabled=False), "screened"
    )
    step.run([rows], StepSettings(1e-6))
    ours_first, dense_first = step.read({}).metrics["loss"], float(dense.step(x))
    if abs(ours_first - dense_first) > 1e-3 * abs(dense_first):
        raise ValueError(f"{trained.arch}: loss {ours_first:.6g}, dense {dense_first:.6g}")
    samplers = {
        "ours": lambda: measure(lambda: step.run([rows], StepSettings(1e-6))),
        "dense": lambda: measure(lambda: dense.step(x)),
    }
    samples = interleave(samplers, rounds)
    ours, theirs = summarize(samples["ours"]), summarize(samples["dense"])
    ratio = median_ratio(samples["dense"], samples["ours"])
    return StepTime(trained.arch, trained.setting, trained.l0, ours.median, theirs.median, ratio)


def table(runs: Sequence[Reached]) -> str:
    """Return a table with a row per architecture and setting: means over seeds, with the range."""
    with_mcc = any(run.mcc is not None for run in runs)
    headings = ["architecture", "setting", "held-out L0", "held-out FVU", "silent on held-out"]
    headings += ["MCC"] if with_mcc else []
    rows = []
    for arch, setting in dict.fromkeys((run.arch, run.setting) for run in runs):
        own = [run for run in runs if (run.arch, run.setting) == (arch, setting)]
        row = [
            arch,
            setting,
            _mean_and_range([run.l0 for run in own], 1),
            _mean_and_range([run.fvu for run in own], 4),
            f"{statistics.mean(run.dead_share for run in own):.2%}",
        ]
        if with_mcc:
            row.append(_mean_and_range([run.mcc or 0.0 for run in own], 3))
        rows.append(row)
    return markdown_table(headings, rows)


def time_table(times: Sequence[StepTime]) -> str:
    """Return a table of step times with a row per architecture and setting."""
    headings = ["architecture", "setting", "L0", "sae_fast, ms", "dense PyTorch, ms", "ratio"]
    rows = [
        [
            time.arch,
            time.setting,
            f"{time.l0:.1f}",
            milliseconds(time.ours),
            milliseconds(time.dense),
            f"{time.ratio:.1f}x",
        ]
        for time in times
    ]
    return markdown_table(headings, rows)


def _mean_and_range(values: Sequence[float], digits: int) -> str:
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def draw(runs: Sequence[Reached], path: Path, title: str) -> None:
    """Plot FVU against L0: a curve per architecture through the means, and a point per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, arch in enumerate(dict.fromkeys(run.arch for run in runs)):
        own = [run for run in runs if run.arch == arch]
        colour = f"C{number}"
        axes.plot([run.l0 for run in own], [run.fvu for run in own], ".", color=colour, alpha=0.5)
        means = sorted(_means(own))
        marker = "osD^vPX*"[number % 8]
        axes.plot(*zip(*means, strict=True), marker=marker, color=colour, label=arch, markersize=6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("L0 on held-out rows: active latents per token")
    axes.set_ylabel("fraction of variance unexplained on held-out rows")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _means(runs: Sequence[Reached]) -> list[tuple[float, float]]:
    groups = [
        [run for run in runs if run.setting == setting]
        for setting in dict.fromkeys(run.setting for run in runs)
    ]
    return [
        (statistics.mean(run.l0 for run in group), statistics.mean(run.fvu for run in group))
        for group in groups
    ]


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    parts = ["# Architectures compared"]
    for kind, about in results["about"].items():
        runs = [Reached(**run) for run in results[kind]]
        parts += [f"## {kind.capitalize()}", about, table(runs)]
        if kind == "activations" and results["times"]:
            parts += ["One training step of the first seed's model:"]
            parts += [time_table([StepTime(**time) for time in results["times"]])]
    parts.append(f"{machine_line(results['machine'])}\n`{results['command']}`")
    return "\n\n".join(parts)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.architectures")
    parser.add_argument(
        "--shard-dir", type=Path, help="shards and heldout*.h5; without it: only --planted"
    )
    parser.add_argument("--archs", default=",".join(RECIPES), help="separated by commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--expansion-factor", type=float, default=4.0)
    parser.add_argument("--dead-after-tokens", type=int, default=200_000)
    parser.add_argument("--planted", action="store_true", help="also recover a known dictionary")
    parser.add_argument("--planted-rows", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timed steps; 0: no timing")
    add_run_arguments(parser)
    parser.add_argument("--plot", type=Path, help="draw FVU against L0 here, a PNG")
    options = parser.parse_args()
    unknown = [arch for arch in options.archs.split(",") if arch not in RECIPES]
    if unknown:
        parser.error(f"--archs: {unknown[0]!r} is none of {', '.join(RECIPES)}")
    if options.shard_dir is None and not options.planted:
        parser.error("give --shard-dir, --planted or both")
    return options


def main() -> None:
    """Run, print the tables, write the files."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    seeds = [int(text) for text in options.seeds.split(",")]
    common = f"{options.steps} steps of {options.batch_size} rows, learning rate {options.lr:g}"
    common += f", {options.expansion_factor:g} latents a dimension"
    about = {}
    if options.shard_dir is not None:
        about["activations"] = f"{options.shard_dir.name}, {len(seeds)} seeds: {common}."
    if options.planted:
        about["planted"] = f"{Planted.about()}; {len(seeds)} seeds, all with equal steps and rates."
    results: dict[str, Any] = {"about": about, "times": []}
    for kind in about:
        say(kind)
        results[kind] = []
        recipes = RECIPES if kind == "activations" else PLANTED_RECIPES
        for arch in options.archs.split(","):
            for fields in recipes[arch]:
                for seed in seeds:
                    run, trainer = train(arch, fields, seed, options, kind == "planted")
                    results[kind].append(asdict(run))
                    if kind == "activations" and seed == seeds[0] and options.rounds > 0:
                        results["times"].append(asdict(time_steps(run, trainer, options.rounds)))
    results |= {
        "machine": describe_machine(),
        "command": command_line("benchmarks.architectures"),
    }
    if options.json:
        write_json(options.json, results)
    if options.markdown:
        write_text(options.markdown, report(results))
    if options.plot and "activations" in results:
        runs = [Reached(**run) for run in results["activations"]]
        draw(runs, options.plot, about["activations"])
    print(report(results))


# On planted data the number of active features is known.
PLANTED_RECIPES: dict[str, Sequence[dict[str, Any]]] = {
    **{arch: [{"k": Planted.active}] for arch in _WITH_K},
    **{arch: [{"target_l0": Planted.active}] for arch in _WITH_TARGET},
}


if __name__ == "__main__":
    main()
