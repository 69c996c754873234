"""Time a step with half of the latents active, beside dense PyTorch.

    python -m benchmarks.dense_step --json results/dense_step.json

A whole step of relu (loss, backward, clip, Adam) is timed at the start of a training, when about
half of all latents are active and the step works on all latents: with sae_fast in both precisions,
and with plain PyTorch in float32 and in bfloat16 autocast. Their losses on the first batch must be
equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.dense_architectures import DenseArchitecture
from benchmarks.dense_switch import Step
from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.problem import Size, make_activations, parse_size
from benchmarks.support.tables import (
    add_run_arguments,
    machine_line,
    markdown_table,
    milliseconds,
    publish,
    ratio,
)
from benchmarks.support.timing import interleave, measure, median_ratio, quiet_rounds, summarize
from sae_fast.autoencoder.thresholded import LISTED

NAMES = {
    "sae_fast": "sae_fast",
    "sae_fast_bf16": "sae_fast, `--amp bf16`",
    "eager": "PyTorch dense, float32",
    "eager_bf16": "PyTorch dense, bfloat16 autocast",
}
LOSS_TOLERANCE = {"sae_fast": 1e-4, "sae_fast_bf16": 1e-2, "eager": 1e-4, "eager_bf16": 1e-2}
RATE = 1e-4


def make_steps(size: Size, x: Tensor) -> dict[str, Callable[[], float]]:
    """Return a function per implementation that takes a step and returns its loss."""
    steps: dict[str, Callable[[], float]] = {}
    for name, precision in (("sae_fast", "screened"), ("sae_fast_bf16", "bf16")):
        steps[name] = partial(_own_step, Step("relu", size, x), precision)
    for name, is_autocast in (("eager", False), ("eager_bf16", True)):
        theirs = DenseArchitecture(Step("relu", size, x).sae, RATE)
        steps[name] = partial(_dense_step, theirs, x, is_autocast)
    return steps


def _own_step(step: Step, precision: str) -> float:
    step.sae.get_buffer(LISTED).fill_(float(step.sae.config.d_sae))
    with step.sae.kept_copies(session=step.optimizer):
        loss = step.sae.training_loss(step.x, dense_grad=False, precision=precision)
        loss.total.backward()  # type: ignore[no-untyped-call]
        step.sae.update_fired_(loss.code, len(step.x))
        step.optimizer.step(RATE)
        step.optimizer.zero_grad()
    return float(loss.total.detach())


def _dense_step(theirs: DenseArchitecture, x: Tensor, is_autocast: bool) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        return float(theirs.step(x))


def time_size(size: Size, rounds: int) -> list[dict[str, Any]]:
    """Time every implementation at one size, interleaved; return the rows of the table."""
    steps = make_steps(size, make_activations(size, 1))
    losses = {name: step() for name, step in steps.items()}
    for name, loss in losses.items():
        if abs(loss / losses["eager"] - 1) > LOSS_TOLERANCE[name]:
            raise RuntimeError(f"{name}: its first loss is {loss:g}, not {losses['eager']:g}")
    samplers = {name: partial(measure, step) for name, step in steps.items()}
    samples = interleave(samplers, rounds)
    quiet = quiet_rounds(list(samples.values()))
    is_quiet = all(samples[name][turn].quiet for name in steps for turn in quiet)
    return [
        {
            "name": name,
            "seconds": summarize(samples[name]).median,
            "cpu_seconds": summarize(samples[name]).cpu_median,
            "least_cpu_seconds": min(sample.cpu_seconds for sample in samples[name]),
            "over_sae_fast": median_ratio(samples[name], samples["sae_fast"]),
            "rounds": rounds,
            "quiet_rounds": len(quiet) if is_quiet else 0,
        }
        for name in steps
    ]


def report(result: dict[str, Any]) -> str:
    """Return the explanation and the tables as Markdown."""
    parts = ["# A step while half of the latents are active", "", __doc__.split("\n\n")[2].strip()]
    headings = [
        "step of relu",
        "ms",
        "relative to sae_fast",
        "CPU ms",
        "least CPU ms",
        "quiet rounds",
    ]
    for name, rows in result["sizes"].items():
        body = [
            [
                NAMES[row["name"]],
                milliseconds(row["seconds"]),
                ratio(row["over_sae_fast"]),
                milliseconds(row["cpu_seconds"]),
                milliseconds(row["least_cpu_seconds"]),
                f"{row['quiet_rounds']}/{row['rounds']}",
            ]
            for row in rows
        ]
        parts += ["", f"## {name}", "", markdown_table(headings, body)]
    parts += ["", machine_line(result["machine"]), "", f"`{result['command']}`"]
    return "\n".join(parts)


def main() -> None:
    """Run, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.dense_step")
    parser.add_argument("--sizes", default="S1,S2", help="S1…S4 or NxDxFxK (k is not used)")
    parser.add_argument("--rounds", type=int, default=5)
    add_run_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"sizes": {}}
    for size in map(parse_size, options.sizes.split(",")):
        name = size.describe().rsplit(", ", 1)[0] + ")"
        result["sizes"][name] = time_size(size, options.rounds)
    result |= {"machine": describe_machine(torch.device("cpu"))}
    result["command"] = command_line("benchmarks.dense_step")
    publish(result, report(result), options.json, options.markdown)


if __name__ == "__main__":
    main()
