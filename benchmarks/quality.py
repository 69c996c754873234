"""Train one autoencoder with sae_fast and with plain PyTorch, and compare the results.

    python -m benchmarks.quality --shard-dir DIR --markdown results/quality.md
    python -m benchmarks.quality --shard-dir DIR --device cpu cuda --repeat --fvu-tolerance 0.01

Both start from the same weights and see the same rows in the same order, with the same learning
rate at every step; both are evaluated by the same plain PyTorch code on the held-out shards, on the
CPU. With several devices, or with --repeat, runs of one training are also compared: a repeated run
must end with the same bits, and the FVU on another device must be near the first device's.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.tuned import TunedTrainer
from benchmarks.support.groups import say
from benchmarks.support.machine import command_line, describe_machine, device_or_exit
from benchmarks.support.problem import Weights
from benchmarks.support.tables import (
    add_run_arguments,
    machine_line,
    markdown_table,
    write_json,
    write_text,
)
from sae_fast.activations import Transform
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.fitted_rates import BETAS
from sae_fast.training.trainer import Trainer

REFERENCE = "PyTorch reference"


@dataclass(frozen=True)
class Quality:
    """The results of one training."""

    trainer: str
    seed: int
    fvu: float
    dead_share: float
    l0: float
    final_loss: float
    seconds: float
    digest: str = ""  # hash of the parameters


def train_all(options: argparse.Namespace, seed: int) -> list[Quality]:
    """Train one seed: the reference, then sae_fast in each precision on each device."""
    results = []
    if not options.no_reference:
        results.append(train_reference(make_trainer(options, seed, "off", "cpu"), seed))
    for amp in ("off", *options.amp):
        for device in dict.fromkeys(options.device):
            results += train_ours(options, seed, amp, device)
    return results


def train_ours(options: argparse.Namespace, seed: int, amp: str, device: str) -> list[Quality]:
    """Train sae_fast in one precision on one device, with --repeat twice; return the results."""
    name = "sae_fast" if amp == "off" else f"sae_fast --amp {amp}"
    name += "" if device == "cpu" else f" --device {device}"
    results = []
    for again in range(2 if options.repeat else 1):
        trainer = make_trainer(options, seed, amp, device)
        start = time.perf_counter()
        sae = trainer.train()
        seconds = time.perf_counter() - start
        weights = weights_of(sae)
        final = float(trainer.summary["final_loss"])
        shown = name + (", again" if again else "")
        results.append(assess(shown, seed, weights, trainer, final, seconds))
    return results


def weights_of(sae: SparseAutoencoder) -> Weights:
    """Return the parameters, on the CPU."""
    return Weights(*(sae.get_parameter(name).detach().cpu() for name in Weights.__annotations__))


def make_trainer(options: argparse.Namespace, seed: int, amp: Any, device: str) -> Trainer:
    """Return sae_fast's trainer as a user would create it, without any files written."""
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
        betas=BETAS,  # as torch has them by default, and the reference
        amp=amp,
        device=device,
        seed=seed,
        eval_every=0,
        checkpoint_every=0,
    )
    return Trainer(model, training, show_progress=False)


def train_reference(trainer: Trainer, seed: int) -> Quality:
    """Train plain PyTorch with the weights, rows and schedule that `trainer` would use."""
    size, weights = trainer.sae_config, weights_of(trainer.sae)
    reference = TunedTrainer(weights, size.k, 0.0, dead_after_tokens=size.dead_after_tokens)
    source = trainer.source
    source.set_transform(transform_of(trainer))
    start = time.perf_counter()
    for step in range(trainer.total_steps):
        for group in reference.optimizer.param_groups:
            group["lr"] = trainer.schedules.rate(step)
        loss = reference.step(source.next_batch())
    seconds = time.perf_counter() - start
    source.close()
    trained = Weights(*(parameter.detach() for parameter in reference.parameters))
    return assess(REFERENCE, seed, trained, trainer, float(loss), seconds)


def transform_of(trainer: Trainer) -> Transform:
    """Return the normalisation of the model's input."""
    return Transform(trainer.sae.activation_mean.cpu(), float(trainer.sae.activation_scale))


def assess(
    name: str, seed: int, weights: Weights, trainer: Trainer, final_loss: float, seconds: float
) -> Quality:
    """Measure held-out FVU, dead latents and L0 in plain PyTorch; return all results of a run."""
    heldout = trainer.data.heldout
    if heldout is None:
        raise ValueError(f"no held-out shards in {trainer.train_config.shard_dir}")
    fvu, dead_share, l0 = evaluate(weights, trainer.sae_config.k, heldout, transform_of(trainer))
    say(f"  seed {seed}, {name}: FVU {fvu:.4f}, dead {dead_share:.2%}, {seconds:.0f} s")
    return Quality(name, seed, fvu, dead_share, l0, final_loss, seconds, digest(weights))


def digest(weights: Weights) -> str:
    """Return a hash of all bits of the parameters."""
    bits = hashlib.sha256()
    for tensor in vars(weights).values():
        bits.update(tensor.contiguous().numpy().tobytes())
    return bits.hexdigest()[:16]


@torch.no_grad()
def evaluate(
    weights: Weights, k: int, batches: Iterable[Tensor], transform: Transform
) -> tuple[float, float, float]:
    """Return FVU = Σ|x − x̂|² / Σ|x − mean(x)|², the share of silent latents, and L0."""
    model = TunedTrainer(weights, k, 0.0)
    on_cpu = (batch.cpu() for batch in batches)
    rows = torch.cat([(batch - transform.mean) * transform.scale for batch in on_cpu])
    error, active = 0.0, 0
    fired = torch.zeros(len(weights.b_enc), dtype=torch.bool)
    for x in torch.split(rows, 4096):
        values, indices = model.select(x)
        x_hat = model.decode(values, indices) + weights.b_dec
        error += float((x - x_hat).double().square().sum())
        active += int((values > 0).sum())
        fired[indices[values > 0]] = True
    variance = float((rows - rows.mean(0)).double().square().sum())
    return error / variance, 1 - float(fired.double().mean()), active / len(rows)


def report(results: dict[str, Any]) -> str:
    """Return the explanation and the table as Markdown."""
    runs = [Quality(**run) for run in results["runs"]]
    names = list(dict.fromkeys(run.trainer for run in runs))
    # The others are compared with the first trainer: plain PyTorch unless it was left out.
    reference = {run.seed: run.fvu for run in runs if run.trainer == names[0]}
    headings = [
        *("trainer", "seed", "held-out FVU", "vs reference", "dead on held-out", "L0"),
        *("final loss", "seconds", "parameters' hash"),
    ]
    rows = []
    for name in names:
        own = [run for run in runs if run.trainer == name]
        rows += [_row(run, reference[run.seed]) for run in own]
        if len(own) == 1:
            continue
        change = statistics.mean(run.fvu / reference[run.seed] - 1 for run in own)
        rows.append(
            [
                f"**{name}, mean**",
                "",
                f"**{statistics.mean(run.fvu for run in own):.5f}**",
                f"**{change:+.2%}**",
                f"**{statistics.mean(run.dead_share for run in own):.2%}**",
                *("", "", "", ""),
            ]
        )
    return "\n\n".join(
        [
            "# Quality of trained autoencoders",
            f"{results['data']}: {results['setting']}. All runs of a seed have the same first "
            "weights, order of rows and learning rates, and are evaluated by the same plain "
            "PyTorch code on the held-out shards. FVU is the fraction of variance unexplained.",
            markdown_table(headings, rows),
            *results["wrong"],
            f"{machine_line(results['machine'])}\n`{results['command']}`",
        ]
    )


def _row(run: Quality, reference: float) -> list[str]:
    """Return a run's row of the table; `reference` is the FVU it is compared with."""
    return [
        run.trainer,
        str(run.seed),
        f"{run.fvu:.5f}",
        f"{run.fvu / reference - 1:+.2%}",
        f"{run.dead_share:.2%}",
        f"{run.l0:.2f}",
        f"{run.final_loss:.3f}",
        f"{run.seconds:.0f}",
        run.digest,
    ]


def what_is_wrong(runs: list[Quality], tolerance: float | None) -> list[str]:
    """Return a sentence per repeated run with other bits and per FVU outside the tolerance.

    The tolerance is relative to the first run of the seed.
    """
    wrong = []
    first: dict[int, Quality] = {}
    by_name = {(run.trainer, run.seed): run for run in runs}
    for run in runs:
        once = by_name.get((run.trainer.removesuffix(", again"), run.seed), run)
        if once.digest != run.digest:
            wrong.append(f"Seed {run.seed}: {once.trainer} ended with other parameters again.")
        base = first.setdefault(run.seed, run)
        change = run.fvu / base.fvu - 1
        if tolerance is not None and not abs(change) <= tolerance:
            wrong.append(
                f"Seed {run.seed}: the FVU of {run.trainer} is {change:+.2%} from that of "
                f"{base.trainer}, more than {tolerance:.2%}."
            )
    return wrong


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.quality")
    parser.add_argument("--shard-dir", type=Path, required=True, help="shards and heldout*.h5")
    parser.add_argument("--name", help="name of the data in the table; default: the folder's name")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--expansion-factor", type=float, default=8.0)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, help="default: sae_fast's own")
    parser.add_argument("--dead-after-tokens", type=int, default=10_000_000)
    parser.add_argument("--amp", nargs="*", default=[], help="also train with --amp bf16 or fp16")
    parser.add_argument("--device", nargs="+", default=["cpu"], help="cpu, cuda or both")
    parser.add_argument("--repeat", action="store_true", help="train twice and expect equal bits")
    parser.add_argument(
        "--no-reference", action="store_true", help="do not train with plain PyTorch"
    )
    parser.add_argument(
        "--fvu-tolerance",
        type=float,
        help="fail if an FVU differs from the first by a larger share",
    )
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Run, print the table, write the files."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    for name in options.device:
        device_or_exit(name)
    runs: list[Quality] = []
    for seed in (int(text) for text in options.seeds.split(",")):
        runs += train_all(options, seed)
    probe = make_trainer(options, 0, "off", "cpu")
    size = probe.sae_config
    results: dict[str, Any] = {
        "data": options.name or options.shard_dir.name,
        "setting": (
            f"{probe.source.rows_per_epoch:,} tokens, {options.epochs} epochs, {probe.total_steps} "
            f"steps of {options.batch_size}, d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}, "
            f"peak learning rate {probe.schedules.rate.peak:.2e}, a latent dead after "
            f"{size.dead_after_tokens:,} silent tokens"
        ),
        "runs": [asdict(run) for run in runs],
        "wrong": what_is_wrong(runs, options.fvu_tolerance),
        "machine": describe_machine(torch.device(options.device[-1])),
        "command": command_line("benchmarks.quality"),
    }
    if options.json:
        write_json(options.json, results)
    if options.markdown:
        write_text(options.markdown, report(results))
    print(report(results))
    sys.exit(1 if results["wrong"] else 0)


if __name__ == "__main__":
    main()
