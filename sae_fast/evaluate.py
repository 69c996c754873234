"""Measure trained dictionaries: `python -m sae_fast.evaluate SAE --shard-dir DIR --out DIR`.

With `--dataset FILE` the language model reads a text, and its losses with the dictionary's
reconstructions in place of its activations are measured too, also without shards.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae_fast.command_errors import check_out
from sae_fast.command_frame import run_framed
from sae_fast.config.command_line import CommandLine
from sae_fast.config.evaluate import EvaluateConfig
from sae_fast.config.output import OutputConfig
from sae_fast.log_output import CommandOutput
from sae_fast.output_streams import run_command

if TYPE_CHECKING:
    from sae_fast.report.evaluation import Evaluation

PROGRAM = "python -m sae_fast.evaluate"
USAGE = f"{PROGRAM} SAE … --shard-dir DIR [--dataset FILE] --out DIR [flags]"


@functools.cache
def command_line() -> CommandLine:
    """Return the command line of the command."""
    sections = {"evaluate": EvaluateConfig, "output": OutputConfig}
    return CommandLine(USAGE, inspect.getdoc(EvaluateConfig) or "", sections)


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [command_line()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input."""
    words = sys.argv[1:] if arguments is None else arguments
    return run_framed(lambda output: _run(words, output))


def _run(words: Sequence[str], output: CommandOutput) -> int:
    given = command_line().read(words)
    config, shown = EvaluateConfig(**given["evaluate"]), OutputConfig(**given["output"])
    output.configure(quiet=shown.quiet, log_file=shown.log_file)
    _evaluate(config, output)
    return 0


def _evaluate(config: EvaluateConfig, output: CommandOutput) -> None:
    needed = {"SAE": config.saes, "--out": config.out}
    if missing := [name for name, value in needed.items() if not value]:
        raise ValueError(f"{' and '.join(missing)} must be given: {USAGE}")
    assert config.out is not None
    check_out(config.out)
    from sae_fast.autoencoder.files import require_no_model
    from sae_fast.dictionary_evaluation import DictionaryEvaluator
    from sae_fast.report.evaluation import MARKDOWN, save_overview
    from sae_fast.report.names import distinct_names
    from sae_fast.report.page import REPORT

    require_no_model(config.out)
    evaluator = DictionaryEvaluator(config, show_progress=not output.is_quiet)
    done: list[Evaluation] = []
    names = [name.replace("/", "-") for name in distinct_names(config.saes, "dictionaries")]
    _find(config.saes)
    for name, place in zip(names, config.saes, strict=True):
        evaluation = evaluator.evaluate(place, name)
        directory = config.out if len(names) == 1 else config.out / name
        evaluation.save(directory)
        done.append(evaluation)
        for line in _summary(evaluation):
            output.say(line)
        output.say(f"wrote {directory}")
    if len(done) > 1:
        save_overview(done, config.out)
        output.say(f"wrote {config.out / MARKDOWN}")
    output.say(f"report: {config.out / REPORT}")


def _find(places: Sequence[Path]) -> None:
    """Raise FileNotFoundError for a dictionary that is not there, before one is measured."""
    from sae_fast.autoencoder.foreign import explain_missing, local_place

    for place in map(local_place, places):
        if not place.exists():
            raise explain_missing(place)


def _summary(evaluation: Evaluation) -> Iterator[str]:
    """Yield the most important metrics on one line, and where they differ L0 by both rules."""
    groups = evaluation.metrics
    sparsity = groups["sparsity"]
    shown = [
        ("FVU", groups["reconstruction_quality"], "fvu", ".4f"),
        ("L0", sparsity, "l0", ".1f"),
        ("alive", groups["misc_metrics"], "frac_alive", ".1%"),
        ("cosine", groups["reconstruction_quality"], "cossim", ".4f"),
    ]
    if (losses := groups.get("model_performance_preservation")) is not None:
        shown += [
            ("CE increase", losses, "ce_loss_increase", "+.4f"),
            ("CE score", losses, "ce_loss_score", ".4f"),
        ]
    told = [
        f"{label} {found[name]:{form}}" if math.isfinite(found[name]) else f"{label} has no value"
        for label, found, name, form in shown
    ]
    yield f"{evaluation.name}: {', '.join(told)}"
    if sparsity["l0_training_rule"] != sparsity["l0"]:
        yield (
            f"L0 {sparsity['l0']:.1f} is by the rule of inference: latents above a threshold; by "
            "the rule of training, the N·k largest of a batch of N rows, it is "
            f"{sparsity['l0_training_rule']:.1f}"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
