"""List the presets with the memory that each needs: `python -m sae_fast.presets`.

`--measure NAME` makes a few steps of one on random activations and says how long its training takes
on this machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sae_fast.command_errors import EXIT_BAD_INPUT, refusal
from sae_fast.config.command_line import CommandLine, of_one, parse
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.presets import PRESETS, preset
from sae_fast.config.setting import setting
from sae_fast.output_streams import run_command

if TYPE_CHECKING:
    from sae_fast.training.trainer import Trainer

USAGE = "python -m sae_fast.presets [--measure NAME]"
MEASURED_STEPS = 3


def first_steps(name: str, steps: int) -> Trainer:
    """Return a trainer that makes so many steps of a preset's training, on random rows."""
    import torch

    from sae_fast.training.trainer import Trainer

    sae, train = preset(name).configs()
    train = replace(train, max_steps=steps, log_every=1, eval_every=0, checkpoint_every=0)
    rows = torch.randn(train.kept_batch_size, sae.d_in)
    columns = {}
    if sae.arch == "slots":  # the reconstruction alone would not be the whole step
        train = replace(train, reconstruction_epochs=0.0)
        relations = torch.arange(train.kept_batch_size) % (sae.n_relations or 1)
        columns = {str(sae.relation_labels): relations, str(sae.answer_labels): relations}
    return Trainer(sae, train, data=rows, columns=columns, show_progress=False)


def measured_tokens_per_second(name: str, steps: int = MEASURED_STEPS) -> float:
    """Return the tokens a second of `steps` steps of a preset on random rows, after one more."""
    trainer = first_steps(name, steps + 1)
    trainer.train()
    milliseconds = [float(row["time_per_step_ms"]) for row in trainer.history[1:]]
    return 1000 * trainer.train_config.kept_batch_size * len(milliseconds) / sum(milliseconds)


@configuration()
@dataclass(frozen=True)
class PresetOptions(ConfigFile):
    """List the presets with the memory that each needs, or measure how long one takes here."""

    measure: str | None = setting(None, metavar="NAME")
    """Make a few steps of this preset on random activations, and tell how long its training takes
    on this machine."""


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [of_one(PresetOptions, USAGE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        options = parse(PresetOptions, sys.argv[1:] if arguments is None else arguments, USAGE)
        print(_listing() if options.measure is None else _duration(options.measure))
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _listing() -> str:
    from sae_fast.ops.native import build_info
    from sae_fast.training.memory_plan import plan_memory

    native = build_info()["backend"] == "native"
    lines, width = [], max(map(len, PRESETS))
    for name, settings in PRESETS.items():
        sae, train = settings.configs()
        plan = plan_memory(sae, train, native=native, pool_bytes=0)
        needed = sum(plan.parts.values()) / 2**30
        sizes = f"{sae.arch}, {sae.d_in} to {sae.d_sae:,}"
        memory = f"{needed:6.2f} GiB beside the data"
        lines.append(f"{name:<{width}} {sizes:<24} {memory}  {settings.about}")
    lines.append("How long one takes on this machine: python -m sae_fast.presets --measure NAME")
    return "\n".join(lines)


def _duration(name: str) -> str:
    rate = measured_tokens_per_second(name)
    tokens = preset(name).tokens
    hours = tokens / rate / 3600
    return f"{name}: {rate:,.0f} tokens/s here; {tokens:,} tokens take {hours:,.1f} hours"


if __name__ == "__main__":
    sys.exit(run_command(main))
