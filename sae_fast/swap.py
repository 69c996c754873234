"""Swap relation slots in a language model: `python -m sae_fast.swap CHECKPOINT --data DIR`.

DIR is what `python -m sae_fast.biographies` wrote; the slots are the last latents of the
autoencoder, one a relation.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_fast.atomic_files import write_json
from sae_fast.command_errors import EXIT_BAD_INPUT, refusal
from sae_fast.config.command_line import CommandLine, of_one, parse
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import setting
from sae_fast.output_streams import run_command

if TYPE_CHECKING:
    from sae_fast.ground_truth.biographies.swap import SwapTable

PROGRAM = "python -m sae_fast.swap"
USAGE = f"{PROGRAM} CHECKPOINT --data DIR [flags]"
SEED = 0  # of the choice of people, where not all are asked


@configuration()
@dataclass(frozen=True)
class SwapOptions(ConfigFile):
    """Set the slot of the relation asked to 0 and another to a strength; see what is answered."""

    checkpoint: Path | None = setting(None, positional=True, metavar="CHECKPOINT")
    """A checkpoint, a run (its latest checkpoint) or a saved model."""
    data: Path | None = setting(None, metavar="DIR")
    """Directory that `python -m sae_fast.biographies` wrote."""
    layer: int | None = setting(None)
    """Layer whose activations are replaced; default: the layer of the
    shards that the checkpoint was trained on."""
    strengths: tuple[float, ...] = setting((0.5, 1.0, 2.0, 5.0, 10.0))
    """Strengths that a slot is set to, in units of its mean value where its relation is asked."""
    max_entities: int | None = setting(None, at_least=1)
    """Number of the held-out people that are asked, chosen at random; default: all. [people]"""
    out: Path | None = setting(None, metavar="FILE")
    """JSON file to write the table to, with all pairs of relations; default: none."""


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [of_one(SwapOptions, USAGE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        options = parse(SwapOptions, arguments, USAGE)
        table = _table(options)
        print(table)
        if options.out is not None:
            _write(options.out, table)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _table(options: SwapOptions) -> SwapTable:
    if options.checkpoint is None or options.data is None:
        raise ValueError(f"a checkpoint and --data must be given: {PROGRAM} CHECKPOINT --data DIR")
    from sae_fast.autoencoder import SparseAutoencoder
    from sae_fast.ground_truth.biographies import files
    from sae_fast.ground_truth.biographies.swap import swap_success

    path = _model_directory(options.checkpoint)
    layer = _trained_layer(path) if options.layer is None else options.layer
    model = files.load(options.data)
    heldout = [person for person, entity in enumerate(model.biographies.entities) if entity.heldout]
    if options.max_entities is not None and options.max_entities < len(heldout):
        heldout = random.Random(SEED).sample(heldout, options.max_entities)
    asked = set(heldout)
    sentences = [item for item in model.biographies.sentences() if item.entity in asked]
    sae = SparseAutoencoder.from_pretrained(path)
    return swap_success(sae, model, sentences, layer, options.strengths)


def _model_directory(path: Path) -> Path:
    if (path / "sae.safetensors").is_file():
        return path
    from sae_fast.training.checkpoint import CheckpointError, find_checkpoint

    try:
        checkpoint = find_checkpoint(str(path), None)
    except CheckpointError:
        checkpoint = None
    if checkpoint is None:
        raise ValueError(f"{path} is no saved model, no checkpoint and no run that has one")
    return checkpoint


def _trained_layer(path: Path) -> int:
    """Return the layer of the shards that a checkpoint was trained on."""
    from sae_fast.ground_truth.biographies.files import layer_of
    from sae_fast.training.checkpoint import CheckpointError, read_newest_state
    from sae_fast.training.resume_state import check_state

    try:
        trained_on = read_newest_state(path, check_state)["config"]["train"].get("shard_dir")
    except CheckpointError:
        trained_on = None
    layer = None if trained_on is None else layer_of(Path(trained_on))
    if layer is None:
        raise ValueError(f"layer must be given: {path} does not tell which it was trained on")
    return layer


def _write(path: Path, table: SwapTable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table.to_dict())


if __name__ == "__main__":
    sys.exit(run_command(main))
