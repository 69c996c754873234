"""The rows of shards that a dictionary is measured on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations import (
    ShardError,
    ShardSet,
    find_shards,
    find_targets,
    full_origin,
    open_shards,
    origin_difference,
)
from sae_fast.activations.cutting import cut_shards
from sae_fast.activations.heldout import HeldOut, read_column, read_labels
from sae_fast.activations.mixing import single
from sae_fast.activations.tensor_shards import open_shard
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.evaluate import EvaluateConfig
from sae_fast.evaluation.text_rows import DOCUMENT, TOKENS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationRows:
    """Rows in the order they are stored, each time from the start.

    Attributes:
        shards: the shards, with the targets of a transcoder.
        batch_tokens: rows of a batch.
        max_rows: the first rows only; None: all.
        were_trained_on: whether a training on the directory trains on these rows.
    """

    shards: ShardSet
    batch_tokens: int
    max_rows: int | None
    were_trained_on: bool

    @property
    def origin(self) -> dict[str, Any]:
        """The place that the activations are of, as far as the shards say it."""
        return full_origin(single(self.shards))

    @property
    def count(self) -> int:
        """The number of rows."""
        return self._of(self.shards).rows

    def batches(self) -> HeldOut:
        """Return the rows, [n, D] each time."""
        return self._of(self.shards)

    def targets(self) -> HeldOut | None:
        """Return the targets of the rows, [n, d_out] each time; None: there are none."""
        targets = self.shards.targets
        return None if targets is None else self._of(targets)

    def documents(self) -> Iterator[Tensor] | None:
        """Return the document of each row, [n] each time; None: the shards do not say."""
        numbers = self.columns.get(DOCUMENT)
        return None if numbers is None else iter(torch.split(numbers, self.batch_tokens))

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """The numbers beside the rows [rows] by column: documents, tokens and labels."""
        found = {**text_columns(self.shards), **read_labels(self.shards)}
        return {name: numbers[: self.count] for name, numbers in found.items()}

    def _of(self, shards: ShardSet) -> HeldOut:
        return HeldOut(shards, batch_size=self.batch_tokens, max_rows=self.max_rows)


def text_columns(shards: ShardSet) -> dict[str, Tensor]:
    """Return tokens and documents of the served rows, [rows] int64, by column.

    A column that not all shards have with one whole number a row is left out: shards of other
    programs may have other data by these names. A warning says what is wrong with it.
    """
    found = {}
    for name in (DOCUMENT, TOKENS):
        try:
            found[name] = read_column(shards, name, whole=True)
        except ValueError as error:
            if _holds(shards, name):
                logger.warning("%s: %s is left out", error, name)
    return found


def _holds(shards: ShardSet, name: str) -> bool:
    """Return whether a shard, one at least, has data of this name."""
    for shard in shards.shards:
        with open_shard(shard) as file:
            if file.has(name):
                return True
    return False


def open_rows(config: EvaluateConfig, sae: SparseAutoencoder) -> EvaluationRows:
    """Open the rows that a configuration names, for a dictionary.

    Raises ShardError or ValueError, in one line, for shards that cannot be read, or that are of
    another width or place than the dictionary.
    """
    assert config.shard_dir is not None
    train, held = find_shards(config.shard_dir, config.heldout, for_training=False)
    takes_all = config.rows == "all" or not held
    if config.heldout is not None and not held:
        raise ShardError(f"{config.heldout}: no held-out shards")
    if config.heldout_fraction and held:
        raise ValueError(
            f"heldout_fraction = {config.heldout_fraction:g} needs a directory without held-out "
            f"shards, and there is {held[0]}"
        )
    paths = [*train, *held] if config.rows == "all" else train if takes_all else held
    shards = _open(config, sae, paths, train if paths is held else held)
    if config.heldout_fraction:
        _, shards = cut_shards(shards, config.heldout_fraction)
    check_belongs(sae, shards, force=config.force)
    is_trained = takes_all and not config.heldout_fraction
    return EvaluationRows(shards, config.batch_tokens, config.max_rows, is_trained)


def _open(
    config: EvaluateConfig, sae: SparseAutoencoder, paths: list[Path], others: list[Path]
) -> ShardSet:
    key = config.activations_key
    targets = None
    if sae.config.transcoder:
        if config.target_shard_dir is None and config.target_key is None:
            raise ValueError(
                "a transcoder needs targets: name their data set in the shards with --target-key, "
                "or the directory with their files with --target-shard-dir"
            )
        place = config.target_shard_dir
        targets = find_targets(paths, place, config.target_key or key, others)
    elif config.target_shard_dir is not None or config.target_key is not None:
        raise ValueError("target_shard_dir and target_key belong to a transcoder")
    # Rows are checked when they are read, so that shards are read once, unless some are dropped.
    skip, repeated = config.skip_nonfinite, config.repeated_rows
    labels = [] if config.labels is None else [config.labels]
    return open_shards(
        paths,
        key=key,
        verify=skip or repeated == "drop",
        skip_nonfinite=skip,
        repeated_rows=repeated,
        targets=targets,
        columns=labels,
    )


def check_belongs(sae: SparseAutoencoder, shards: ShardSet, *, force: bool) -> None:
    """Raise ValueError unless shards can be of the activations that a dictionary was trained on.

    Args:
        sae: the dictionary.
        shards: of activations.
        force: whether activations of another model, hook point or layer are accepted.
    """
    place = shards.shards[0].path
    if shards.d_in != sae.d_in:
        raise ValueError(
            f"the dictionary has d_in {sae.d_in}, the rows of {place} have {shards.d_in} numbers"
        )
    if shards.targets is not None and shards.targets.d_in != sae.config.target_width:
        raise ValueError(
            f"the transcoder has d_out {sae.config.target_width}, the targets of "
            f"{shards.targets.shards[0].path} have {shards.targets.d_in} numbers"
        )
    if not force:
        check_same_place(sae.origin, full_origin(single(shards)), str(place))


def check_same_place(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    """Raise ValueError, naming both values, where two origins are of different places.

    Args:
        ours: the origin of a dictionary.
        theirs: the origin of activations.
        what: the activations, for the message.
    """
    if (difference := origin_difference(ours, theirs)) is not None:
        raise ValueError(
            f"the dictionary is of {difference} as {what}: --force continues all the same"
        )
