"""Compare training straight from a model with training on captured shards.

    python -m benchmarks.from_model --json benchmarks/results/from_model.json

Both trainings have the same text (the documentation strings of Python's standard library), layers
of a real model, held-out documents and numbers of tokens and steps. One reads the activations from
float16 shards into which they were captured; the other takes them from the model into the pool. The
order of rows differs, because the second way shuffles consecutive windows of text. The table shows
the held-out fraction of variance unexplained (FVU) of both, for several seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.capture import MINILM, find_model
from benchmarks.support.documentation import write_documentation
from benchmarks.support.machine import command_line, describe_machine, distribution_version
from benchmarks.support.tables import add_run_arguments, machine_line, markdown_table, publish
from sae_fast import RunConfig, SAEConfig, Sweep, TrainConfig
from sae_fast.capture import main as capture
from sae_fast.config.model_text import FromModelConfig
from sae_fast.training.from_model import open_from_model
from sae_fast.training.sweep import with_settings

FROM_SHARDS, FROM_MODEL = "from shards", "straight from the model"


def configuration(options: argparse.Namespace) -> RunConfig:
    """Return the training's configuration without the source of the activations."""
    sae = SAEConfig(k=options.k, expansion_factor=options.expansion_factor)
    train = TrainConfig(
        batch_size=options.batch_size * options.ctx_len,
        max_tokens=options.tokens,
        pool_rows=options.pool_rows,
        learning_rate=options.lr,
        shuffle_seed=42,
        eval_every=0,
        checkpoint_every=0,
        num_threads=options.threads,
    )
    return RunConfig(sae=sae, train=train)


def train_from_shards(options: argparse.Namespace, texts: Path, folder: Path) -> dict[str, Any]:
    """Capture shards, then train a sweep over the seeds for each layer; return the FVUs."""
    words = {
        "--max-tokens": options.tokens,
        "--heldout-tokens": options.heldout_tokens,
        "--ctx-len": options.ctx_len,
        "--batch-size": options.batch_size,
        "--num-threads": options.threads,
        "--out": folder / "shards",
    }
    flags = [str(word) for pair in words.items() for word in pair]
    layers = [str(layer) for layer in options.layers]
    if capture([options.model, str(texts), "--layers", *layers, *flags]) != 0:
        raise SystemExit("the activations could not be captured")
    found: dict[str, Any] = {}
    for layer in options.layers:
        base = configuration(options)
        shards = str(folder / "shards" / f"residual.{layer}")
        base = replace(base, train=replace(base.train, shard_dir=shards))
        configs = {
            f"seed_{seed}": with_settings(base, "", {"seed": seed}) for seed in options.seeds
        }
        found |= results(Sweep(configs, show_progress=False), f"residual.{layer}/")
    return {"fvu": found}


def train_from_model(options: argparse.Namespace, texts: Path) -> dict[str, Any]:
    """Train all layers and seeds from the same forward passes; return the FVUs."""
    settings = FromModelConfig(
        layers=tuple(options.layers),
        max_tokens=options.tokens,
        batch_size=options.batch_size,
        ctx_len=options.ctx_len,
        heldout_tokens=options.heldout_tokens,
        init_seeds=tuple(options.seeds),
    )
    configs = {"": configuration(options)}
    sweep = open_from_model(options.model, str(texts), settings, configs, show_progress=False)
    return {"fvu": results(sweep, "")}


def results(sweep: Sweep, prefix: str) -> dict[str, float]:
    """Train a sweep; return the held-out FVU of each training by its name after `prefix`."""
    sweep.train()
    return {
        f"{prefix}{name}": trainer.summary["final_heldout_fvu"]
        for name, trainer in sweep.trainers.items()
    }


def report(result: dict[str, Any]) -> str:
    """Return the explanation and the table as Markdown."""
    one, other = result[FROM_SHARDS]["fvu"], result[FROM_MODEL]["fvu"]
    rows = [
        [name, f"{one[name]:.4f}", f"{other[name]:.4f}", f"{other[name] / one[name] - 1:+.2%}"]
        for name in one
    ]
    for layer in sorted({name.partition("/")[0] for name in one}):
        means = [
            statistics.mean(fvu for name, fvu in found.items() if name.startswith(f"{layer}/"))
            for found in (one, other)
        ]
        rows.append([f"{layer}, mean", *(f"{mean:.4f}" for mean in means)])
        rows[-1].append(f"{means[1] / means[0] - 1:+.2%}")
    headings = ["training", f"FVU {FROM_SHARDS}", f"FVU {FROM_MODEL}", "difference"]
    machine = f"{machine_line(result['machine'])} transformers {result['transformers']}."
    return "\n\n".join(
        [
            "# Training straight from a model, and on shards",
            *(__doc__ or "").strip().split("\n\n")[2:],
            f"{result['documents']:,} documents, {result['tokens']:,} tokens a layer.",
            markdown_table(headings, rows),
            machine,
            f"`{result['command']}`",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.from_model")
    parser.add_argument("--model", help=f"default: the weights in the package {MINILM}")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--heldout-tokens", type=int, default=16_384)
    parser.add_argument("--ctx-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--pool-rows", type=int, default=65_536)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--expansion-factor", type=float, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_run_arguments(parser)
    options = parser.parse_args()
    options.model = find_model(options.model)
    return options


def main() -> None:
    """Run, print the table, write the files."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = folder / "documentation.jsonl"
        result: dict[str, Any] = {"documents": write_documentation(texts)}
        result[FROM_MODEL] = train_from_model(options, texts)
        result[FROM_SHARDS] = train_from_shards(options, texts, folder)
    result |= {"tokens": options.tokens, "machine": describe_machine()}
    result |= {"command": command_line("benchmarks.from_model")}
    result["transformers"] = distribution_version("transformers")
    table = report(result)
    publish(result, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
