"""Make biographies with labelled activations: `python -m sae_fast.biographies --out DIR`.

Made-up people with six facts each, a small GPT-2 trained here until it knows them, and its
activations as shards with labels, by layer. No network is needed.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_fast.command_errors import EXIT_BAD_INPUT, refusal
from sae_fast.config.command_line import CommandLine, of_one, parse
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import MOST_THREADS, setting
from sae_fast.output_streams import run_command
from sae_fast.progress_bar import progress_bar

if TYPE_CHECKING:
    from sae_fast.ground_truth.biographies.language_model import BiographyModel

PROGRAM = "python -m sae_fast.biographies"
USAGE = f"{PROGRAM} --out DIR [flags]"
KNOWS = 0.99  # accuracy below which the command warns

logger = logging.getLogger(__name__)


@configuration()
@dataclass(frozen=True)
class BiographyOptions(ConfigFile):
    """Make biographies, a language model that knows them, and shards of its activations."""

    out: Path | None = setting(None, metavar="DIR")
    """Directory to write: biographies.json, model/ and layer_L/ with shards. Must be empty."""
    entities: int = setting(300)
    """People; each has one answer to each of six relations. [people]"""
    templates: int = setting(6)
    """Phrasings of each relation. [phrasings]"""
    answers: int = setting(16)
    """Answers that each relation can have. [answers]"""
    heldout_fraction: float = setting(0.2)
    """Share of the people whose sentences go into the held-out shards. [share]"""
    blocks: int = setting(4, at_least=1)
    """Blocks of the language model. [blocks]"""
    d_model: int = setting(128, at_least=1)
    """Width of its residual stream, the d_in of the shards. [numbers]"""
    heads: int = setting(4, at_least=1)
    """Attention heads of a block. [heads]"""
    layers: tuple[int, ...] | None = setting(None)
    """Layers that are written: L is the residual stream after block L; default: all."""
    steps: int = setting(3000, at_least=1)
    """Training steps of the language model. [steps]"""
    batch_size: int = setting(64, at_least=1)
    """Sentences in a step. [sentences]"""
    learning_rate: float = setting(1e-3, above=0)
    """Peak of the learning rate."""
    num_threads: int | None = setting(None, at_least=1, at_most=MOST_THREADS)
    """CPU threads; default: torch's own choice. [threads]"""
    seed: int = setting(0)
    """Seed of the people, the language model and its training."""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads = {self.heads}, got {self.d_model}"
            )
        for layer in self.layers or ():
            if not 0 <= layer < self.blocks:
                raise ValueError(f"layers must be from 0 to {self.blocks - 1}, got {layer}")


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [of_one(BiographyOptions, USAGE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        options = parse(BiographyOptions, arguments, USAGE)
        if options.out is None:
            raise ValueError("out must be given: --out DIR")
        _make(options, options.out)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _make(options: BiographyOptions, out: Path) -> None:
    import torch

    from sae_fast import ops  # noqa: F401  # a missing compiled module is refused before the work
    from sae_fast.ground_truth.biographies import files
    from sae_fast.ground_truth.biographies.language_model import (
        LanguageModelConfig,
        train_language_model,
    )
    from sae_fast.ground_truth.biographies.text import make_biographies

    biographies = make_biographies(
        options.entities,
        options.templates,
        options.heldout_fraction,
        options.seed,
        options.answers,
    )
    files.prepare(out)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    heldout = sum(entity.heldout for entity in biographies.entities)
    sentences = biographies.sentences()
    print(
        f"{options.entities:,} people ({heldout:,} held out), {len(biographies.relations)} "
        f"relations in {options.templates} phrasings: {len(sentences):,} sentences of "
        f"{len(biographies.vocabulary):,} words, {biographies.answer_count} answers",
        flush=True,
    )
    config = LanguageModelConfig(
        options.blocks,
        options.d_model,
        options.heads,
        options.steps,
        options.batch_size,
        options.learning_rate,
        options.seed,
    )
    started = time.monotonic()
    with _Progress(options.steps) as progress:
        model = train_language_model(biographies, config, progress.report)
    accuracy = model.accuracy(model.prompts(sentences))
    print(
        f"the language model answers {accuracy:.2%} right "
        f"({options.steps:,} steps, {time.monotonic() - started:.0f} s)",
        flush=True,
    )
    if accuracy < KNOWS:
        logger.warning("it does not know all answers: more --steps or fewer --entities would help")
    layers = tuple(range(options.blocks)) if options.layers is None else options.layers
    _write(out, model, layers, {"accuracy": accuracy, "language_model": asdict(config)})


def _write(
    out: Path, model: BiographyModel, layers: Sequence[int], measured: dict[str, object]
) -> None:
    """Write shards and model; print what linear probes read from each layer."""
    from sae_fast.ground_truth.biographies import files
    from sae_fast.ground_truth.biographies.probes import probe_accuracies

    layers = sorted(set(layers))
    folders = files.write_shards(out, model, layers)
    probes = probe_accuracies(model, layers)
    files.save(out, model, {**measured, "probes": {str(layer): probes[layer] for layer in layers}})
    print("linear probes on held-out people:")
    print("layer  relation  answer  shards")
    for layer, folder in zip(layers, folders, strict=True):
        relation, answer = probes[layer]["relation"], probes[layer]["answer"]
        print(f"{layer:>5}  {relation:>8.1%}  {answer:>6.1%}  {folder}")


class _Progress:
    """A progress bar of the steps, or a line after each eighth of them without a terminal."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._bar = progress_bar(total=steps, unit="step")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, step: int, loss: float) -> None:
        """Show a step."""
        self._bar.update()
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if self._bar.disable and step % max(1, self._steps // 8) == 0:
            print(f"step {step:,} of {self._steps:,}: loss {loss:.4f}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
