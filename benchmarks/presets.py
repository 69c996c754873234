"""Measure the memory, planned and used, and the time that every preset needs on this machine.

    python -m benchmarks.presets --json benchmarks/results/presets.json

Each preset takes a few steps at its full size on random rows, in a process of its own. Memory is
the peak above that process's state after a tiny training, which loads the libraries that every
training loads. The time of a whole training assumes the rate of these steps and the number of
tokens that such a model is usually trained on. In the measured steps ReLU codes have half of all
latents active; they become faster as they become sparse.

Times are left out if other programs kept more than 15 % of a CPU busy during the measurement.
`--keep FILE` measures some presets again and takes the others from the JSON of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import timing
from benchmarks.support.groups import say
from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.memory import PeakMemory
from benchmarks.support.tables import machine_line, markdown_table, publish
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.presets import PRESETS, preset
from sae_fast.presets import MEASURED_STEPS, first_steps
from sae_fast.training.trainer import Trainer

_GIB = 2**30


def measure(name: str, steps: int) -> dict[str, Any]:
    """Take some steps of one preset in this process; return its figures."""
    tiny = TrainConfig(batch_size=64, max_steps=2, eval_every=0, checkpoint_every=0)
    Trainer(SAEConfig(k=4), tiny, data=torch.randn(64, 32), show_progress=False).train()
    memory = PeakMemory()
    trainer = first_steps(name, steps + 1)
    sample = timing.measure(trainer.train)
    peak = memory.above()
    times = [float(row["time_per_step_ms"]) / 1e3 for row in trainer.history[1:]]
    seconds = sorted(times)[len(times) // 2]
    config = trainer.sae.config
    return {
        "arch": config.arch,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "batch_size": trainer.train_config.kept_batch_size,
        "planned_bytes": sum(trainer.memory_plan.parts.values()),
        "peak_bytes": peak,
        "seconds": times,
        "others": sample.others,
        "tokens_per_second": trainer.train_config.kept_batch_size / seconds,
        "losses": [float(row["loss"]) for row in trainer.history],
        "tokens": preset(name).tokens,
    }


def measure_apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a preset in a new process, so that no memory of another preset is counted."""
    flags = ["--inside", "--presets", name, "--steps", str(options.steps)]
    command = [sys.executable, "-m", "benchmarks.presets", *flags]
    command += ["--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name}: failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the table as Markdown."""
    headings = ["preset", "architecture", "d_in", "d_sae", "tokens a step"]
    headings += ["planned GiB", "peak GiB", "s a step", "tokens/s", "tokens", "hours"]
    body = []
    for name, found in result["presets"].items():
        rate = found["tokens_per_second"]
        sizes = [f"{found[key]:,}" for key in ("d_in", "d_sae", "batch_size")]
        memory = [f"{found[key] / _GIB:.2f}" for key in ("planned_bytes", "peak_bytes")]
        step, hours = found["batch_size"] / rate, found["tokens"] / rate / 3600
        times = [f"{step:.3g}", f"{rate:,.0f}", f"{found['tokens']:,}", f"{hours:,.1f}"]
        if found.get("others", 0.0) >= timing.QUIET_SHARE:
            times = ["-", "-", times[2], "-"]
        body.append([name, found["arch"], *sizes, *memory, *times])
    about = (__doc__ or "").strip().split("\n\n")[2:]
    parts = ["# Memory and time of the presets", *about, markdown_table(headings, body)]
    for runs, names in _by_run(result).items():
        machine, command = json.loads(runs)
        of = "" if len(names) == len(result["presets"]) else f"{', '.join(names)}: "
        parts += [f"{of}{machine_line(machine)}", f"`{command}`"]
    return "\n\n".join(parts)


def _by_run(result: dict[str, Any]) -> dict[str, list[str]]:
    """Return the names of presets by the machine and command of their numbers, as JSON."""
    runs: dict[str, list[str]] = {}
    for name, found in result["presets"].items():
        run = [found.get(key, result[key]) for key in ("machine", "command")]
        runs.setdefault(json.dumps(run), []).append(name)
    return runs


def kept(path: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the presets of an earlier result, with machine and command, updated by new ones."""
    before = json.loads(path.read_text(encoding="utf-8"))
    origin = {"machine": before["machine"], "command": before["command"]}
    earlier = {name: {**origin, **found} for name, found in before["presets"].items()}
    return {**earlier, **measured}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.presets")
    parser.add_argument("--presets", default=",".join(PRESETS), help="separated by commas")
    parser.add_argument(
        "--steps", type=int, default=MEASURED_STEPS, help="timed steps, after one untimed"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="JSON of an earlier run, for the other presets")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--inside", action="store_true", help="measure in this process")
    options = parser.parse_args()
    for name in options.presets.split(","):
        if name not in PRESETS:
            parser.error(f"--presets: {name!r} is none of {', '.join(PRESETS)}")
    return options


def main() -> None:
    """Run, print the table, write the files."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.inside:
        print(json.dumps(measure(options.presets, options.steps)))
        return
    found = {}
    for name in options.presets.split(","):
        found[name] = measure_apart(name, options)
        say(f"  {name}: {found[name]['tokens_per_second']:,.0f} tokens/s")
    presets = found if options.keep is None else kept(options.keep, found)
    result = {"presets": presets, "machine": describe_machine()}
    result["command"] = command_line("benchmarks.presets")
    table = report(result)
    publish(result, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
