"""Trains the same autoencoder with sae_fast and with plain PyTorch, and compares what comes out.

    python -m benchmarks.quality --shard-dir DIR --markdown results/quality.md

Both start from the same weights and see the same rows in the same order, with the same learning
rate at every step; both are judged by the same plain PyTorch code on the held-out shards.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.tuned import TunedTrainer
from benchmarks.support.heats import say
from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.problem import Weights
from benchmarks.support.tables import machine_line, markdown_table, write_json, write_text
from sae_fast.activations import Transform
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

REFERENCE = "PyTorch reference"


@dataclass(frozen=True)
class Quality:
    """What one training run reached."""

    trainer: str
    seed: int
    fvu: float
    dead_share: float
    l0: float
    final_loss: float
    seconds: float


def train_both(options: argparse.Namespace, seed: int) -> list[Quality]:
    """One seed: the reference, then sae_fast in each precision, from the same start."""
    results = []
    for amp in ("off", *options.amp):
        trainer = make_trainer(options, seed, amp)
        if amp == "off":
            results.append(train_reference(trainer, seed))
        name = "sae_fast" if amp == "off" else f"sae_fast --amp {amp}"
        start = time.perf_counter()
        sae = trainer.train()
        seconds = time.perf_counter() - start
        weights = Weights(*(sae.get_parameter(name).detach() for name in Weights.__annotations__))
        final = float(trainer.summary["final_loss"])
        results.append(judge(name, seed, weights, trainer, final, seconds))
    return results


def make_trainer(options: argparse.Namespace, seed: int, amp: Any) -> Trainer:
    """sae_fast's trainer as a user makes it; nothing is written to disk."""
    model = SAEConfig(
        expansion_factor=options.expansion_factor,
        k=options.k,
        dead_after_tokens=options.dead_after_tokens,
    )
    training = TrainConfig(
        shard_dir=str(options.shard_dir),
        batch_size=options.batch_size,
        max_epochs=options.epochs,
        learning_rate=options.lr,
        amp=amp,
        seed=seed,
        eval_every=0,
        checkpoint_every=0,
    )
    return Trainer(model, training, show_progress=False)


def train_reference(trainer: Trainer, seed: int) -> Quality:
    """Plain PyTorch from the weights, rows and schedule that `trainer` is about to use."""
    sae, size = trainer.sae, trainer.sae_config
    weights = Weights(*(sae.get_parameter(name).detach() for name in Weights.__annotations__))
    reference = TunedTrainer(weights, size.k, 0.0, dead_after_tokens=size.dead_after_tokens)
    source = trainer.data.open(transform_of(trainer))
    start = time.perf_counter()
    for step in range(trainer.total_steps):
        for group in reference.optimizer.param_groups:
            group["lr"] = trainer.schedule(step)
        loss = reference.step(source.next_batch())
    seconds = time.perf_counter() - start
    source.close()
    trained = Weights(*(parameter.detach() for parameter in reference.parameters))
    return judge(REFERENCE, seed, trained, trainer, float(loss), seconds)


def transform_of(trainer: Trainer) -> Transform:
    """The normalisation the model was given."""
    return Transform(trainer.sae.activation_mean, float(trainer.sae.activation_scale))


def judge(
    name: str, seed: int, weights: Weights, trainer: Trainer, final_loss: float, seconds: float
) -> Quality:
    """Held-out FVU, dead latents and L0 by plain PyTorch."""
    heldout = trainer.data.heldout
    if heldout is None:
        raise ValueError(f"no held-out shards in {trainer.train_config.shard_dir}")
    fvu, dead_share, l0 = evaluate(weights, trainer.sae_config.k, heldout, transform_of(trainer))
    say(f"  seed {seed}, {name}: FVU {fvu:.4f}, dead {dead_share:.2%}, {seconds:.0f} s")
    return Quality(name, seed, fvu, dead_share, l0, final_loss, seconds)


@torch.no_grad()
def evaluate(
    weights: Weights, k: int, batches: Iterable[Tensor], transform: Transform
) -> tuple[float, float, float]:
    """Σ|x − x̂|² / Σ|x − mean(x)|² over all rows, the share of silent latents, and L0."""
    judge_of = TunedTrainer(weights, k, 0.0)
    rows = torch.cat([(batch - transform.mean) * transform.scale for batch in batches])
    error, active = 0.0, 0
    fired = torch.zeros(len(weights.b_enc), dtype=torch.bool)
    for x in torch.split(rows, 4096):
        values, indices = judge_of.select(x)
        x_hat = judge_of.decode(values, indices) + weights.b_dec
        error += float((x - x_hat).double().square().sum())
        active += int((values > 0).sum())
        fired[indices[values > 0]] = True
    variance = float((rows - rows.mean(0)).double().square().sum())
    return error / variance, 1 - float(fired.double().mean()), active / len(rows)


def report(results: dict[str, Any]) -> str:
    """The table, as Markdown."""
    runs = [Quality(**run) for run in results["runs"]]
    names = list(dict.fromkeys(run.trainer for run in runs))
    reference = {run.seed: run.fvu for run in runs if run.trainer == REFERENCE}
    headings = [
        *("trainer", "seed", "held-out FVU", "vs reference", "dead on held-out", "L0"),
        *("final loss", "seconds"),
    ]
    rows = []
    for name in names:
        own = [run for run in runs if run.trainer == name]
        rows += [
            [
                name,
                str(run.seed),
                f"{run.fvu:.5f}",
                f"{run.fvu / reference[run.seed] - 1:+.2%}",
                f"{run.dead_share:.2%}",
                f"{run.l0:.2f}",
                f"{run.final_loss:.3f}",
                f"{run.seconds:.0f}",
            ]
            for run in own
        ]
        change = statistics.mean(run.fvu / reference[run.seed] - 1 for run in own)
        rows.append(
            [
                f"**{name}, mean**",
                "",
                f"**{statistics.mean(run.fvu for run in own):.5f}**",
                f"**{change:+.2%}**",
                f"**{statistics.mean(run.dead_share for run in own):.2%}**",
                *("", "", ""),
            ]
        )
    return "\n\n".join(
        [
            "# What the training reaches",
            f"{results['data']}: {results['setting']}. The same first weights, rows in the same "
            "order and learning rates for both; judged by the same plain PyTorch code on the "
            "held-out shards. FVU is the share of the variance that the reconstruction misses.",
            markdown_table(headings, rows),
            f"{machine_line(results['machine'])}\n`{results['command']}`",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.quality")
    parser.add_argument("--shard-dir", type=Path, required=True, help="shards and heldout*.h5")
    parser.add_argument("--name", help="what the table calls the data; default: the folder's name")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--expansion-factor", type=float, default=8.0)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, help="default: sae_fast's own")
    parser.add_argument("--dead-after-tokens", type=int, default=10_000_000)
    parser.add_argument("--amp", nargs="*", default=[], help="also train with --amp bf16 or fp16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    return parser.parse_args()


def main() -> None:
    """Run, print the table, write the files."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    runs: list[Quality] = []
    for seed in (int(text) for text in options.seeds.split(",")):
        runs += train_both(options, seed)
    probe = make_trainer(options, 0, "off")
    size = probe.sae_config
    results: dict[str, Any] = {
        "data": options.name or options.shard_dir.name,
        "setting": (
            f"{probe.data.rows_per_epoch:,} tokens, {options.epochs} epochs, {probe.total_steps} "
            f"steps of {options.batch_size}, d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}, "
            f"peak learning rate {probe.schedule.peak:.2e}, a latent dead after "
            f"{size.dead_after_tokens:,} silent tokens"
        ),
        "runs": [asdict(run) for run in runs],
        "machine": describe_machine(),
        "command": command_line("benchmarks.quality"),
    }
    if options.json:
        write_json(options.json, results)
    if options.markdown:
        write_text(options.markdown, report(results))
    print(report(results))


if __name__ == "__main__":
    main()
