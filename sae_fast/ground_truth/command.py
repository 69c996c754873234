"""Score dictionaries against known answers: `python -m sae_fast.ground_truth NAME --out DIR`.

Each task makes its data, trains its own model where it has one, trains every architecture on the
activations, and compares the latents with what is known.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sae_fast.command_errors import check_out
from sae_fast.command_frame import run_framed
from sae_fast.config.command_line import CommandLine
from sae_fast.config.ground_truth import (
    BiographiesConfig,
    CircuitConfig,
    GroundTruthConfig,
    ModularAdditionConfig,
    StateMachineConfig,
    SuperpositionConfig,
)
from sae_fast.config.output import OutputConfig
from sae_fast.log_output import CommandOutput

if TYPE_CHECKING:
    from sae_fast.ground_truth.task import Task

PROGRAM = "python -m sae_fast.ground_truth"


class _Entry(NamedTuple):
    """A task in the list: its settings, the module and class that make it, and a line on it."""

    config: type[GroundTruthConfig]
    module: str
    maker: str
    about: str


TASKS = {
    "superposition": _Entry(
        SuperpositionConfig,
        "superposition",
        "Superposition",
        "a known dictionary, larger than the width, with heavy tails, groups, a hierarchy",
    ),
    "modular_addition": _Entry(
        ModularAdditionConfig,
        "modular_addition",
        "ModularAddition",
        "the frequencies with which a transformer adds modulo p",
    ),
    "state_machine": _Entry(
        StateMachineConfig,
        "state_machine",
        "StateMachine",
        "the states of a finite automaton in an LSTM",
    ),
    "circuit": _Entry(
        CircuitConfig,
        "circuit",
        "Circuit",
        "the variables of induction in a transformer of two attention layers",
    ),
    "biographies": _Entry(
        BiographiesConfig,
        "biographies.task",
        "Biographies",
        "relations and answers in a language model that knows invented people",
    ),
}


def command_lines() -> list[CommandLine]:
    """Return the command line of each task, for completion."""
    return [command_line(name) for name in TASKS]


def command_line(name: str) -> CommandLine:
    """Return the command line of a task."""
    config = TASKS[name].config
    sections = {"task": config, "output": OutputConfig}
    usage = f"{PROGRAM} {name} --out DIR [flags]"
    return CommandLine(usage, inspect.getdoc(config) or "", sections)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input, 128 + its number for a signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in ("-h", "--help", "--help-all"):
        print(listing())
        return 0
    return run_framed(lambda output: _run(words, output))


def listing() -> str:
    """Return the tasks with a line on each."""
    width = max(map(len, TASKS)) + 2
    return "\n".join(
        [
            f"usage: {PROGRAM} NAME --out DIR [flags]",
            "",
            "Train every architecture on a task whose right answer is known, and score it.",
            "",
            *(f"  {name:<{width}}{entry.about}" for name, entry in TASKS.items()),
            "",
            f"{PROGRAM} NAME --help shows the flags of a task.",
        ]
    )


def _task(words: Sequence[str]) -> tuple[str, _Entry]:
    """Return the task that the first word names; raise ValueError where there is none."""
    known = ", ".join(TASKS)
    if not words or words[0].startswith("-"):
        raise ValueError(f"the name of a task must come first, one of {known}")
    name = words[0].replace("-", "_")
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown task {words[0]!r}{hint}: one of {known}")
    return name, TASKS[name]


def _run(words: Sequence[str], output: CommandOutput) -> int:
    """Run a task and show its table; return the exit code, 128 and the number after a signal."""
    name, entry = _task(words)
    given = command_line(name).read(words[1:])
    config, shown = entry.config(**given["task"]), OutputConfig(**given["output"])
    output.configure(quiet=shown.quiet, log_file=shown.log_file)
    if (out := config.out) is None:
        raise ValueError("out must be given: --out DIR")
    check_out(out)
    from sae_fast.autoencoder.files import require_no_model
    from sae_fast.ground_truth.runs import Stopped, run
    from sae_fast.report.page import REPORT

    require_no_model(out)
    module = importlib.import_module(f"sae_fast.ground_truth.{entry.module}")
    task: Task = vars(module)[entry.maker](config)
    try:
        results = run(task, out, _command(words), output.say, show_progress=not output.is_quiet)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        output.note(stopped, logging.WARNING)
        return 128 + stopped.signal
    output.say(results.table())
    output.say(f"wrote {out}")
    output.say(f"report: {out / REPORT}")
    return 0


def _command(words: Sequence[str]) -> str:
    """Return the command as it was called, for a shell."""
    return shlex.join([*PROGRAM.split(), *words])
