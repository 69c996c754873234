"""Makes biographies with labelled activations: `python -m sae_fast.biographies --out DIR`.

Made-up people with six facts each, a small GPT-2 trained here until it knows them, and its
activations as shards with labels, by layer. No network is needed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sae_fast.command_line import EXIT_BAD_INPUT, parse, refusal
from sae_fast.ground_truth.biographies import files
from sae_fast.ground_truth.biographies.language_model import (
    BiographyModel,
    LanguageModelConfig,
    train_language_model,
)
from sae_fast.ground_truth.biographies.probes import probe_accuracies
from sae_fast.ground_truth.biographies.text import make_biographies
from sae_fast.output_streams import run_command

PROGRAM = "python -m sae_fast.biographies"
KNOWS = 0.99  # accuracy below which the command warns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Make biographies, a language model that knows them, and shards of its activations."""

    out: Path | None = None
    """Directory to write: biographies.json, model/ and layer_L/ with shards. Must be empty."""
    entities: int = 300
    """People; each has one answer to each of six relations. [people]"""
    templates: int = 6
    """Phrasings of each relation. [phrasings]"""
    answers: int = 16
    """Answers that each relation can have. [answers]"""
    heldout_fraction: float = 0.2
    """Share of the people whose sentences go into the held-out shards. [share]"""
    blocks: int = 4
    """Blocks of the language model. [blocks]"""
    d_model: int = 128
    """Width of its residual stream, the d_in of the shards. [numbers]"""
    heads: int = 4
    """Attention heads of a block. [heads]"""
    layers: tuple[int, ...] | None = None
    """Layers that are written: L is the residual stream after block L; default: all."""
    steps: int = 3000
    """Training steps of the language model. [steps]"""
    batch_size: int = 64
    """Sentences in a step. [sentences]"""
    learning_rate: float = 1e-3
    """Peak of the learning rate."""
    num_threads: int | None = None
    """CPU threads; default: torch's own choice. [threads]"""
    seed: int = 0
    """Of the people, the language model and its training."""

    def __post_init__(self) -> None:
        for name in ("blocks", "d_model", "heads", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {self.num_threads}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be greater than 0, got {self.learning_rate}")
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads = {self.heads}, got {self.d_model}"
            )
        for layer in self.layers or ():
            if not 0 <= layer < self.blocks:
                raise ValueError(f"layers must be from 0 to {self.blocks - 1}, got {layer}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, 2 for bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        options = parse(
            Options, Options(), sys.argv[1:] if arguments is None else arguments, PROGRAM
        )
        if options.out is None:
            raise ValueError("out must be given: --out DIR")
        _make(options, options.out)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _make(options: Options, out: Path) -> None:
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
    """Shards and model; shows what linear probes read from each layer."""
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
    """A bar of the steps, or a line now and then where there is no terminal."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._bar = tqdm(
            total=steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, step: int, loss: float) -> None:
        """Shows a step."""
        self._bar.update()
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if self._bar.disable and step % max(1, self._steps // 8) == 0:
            print(f"step {step:,} of {self._steps:,}: loss {loss:.4f}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
