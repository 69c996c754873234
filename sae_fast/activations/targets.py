"""Targets of a transcoder: a row to predict for each row of activations, of its own width.

They are another dataset of the shards, or files of the same names in another directory, as a
capture of two hooks writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae_fast.activations.errors import ShardError
from sae_fast.activations.files import shards_in
from sae_fast.activations.remote import local_place
from sae_fast.activations.shard import Shard
from sae_fast.activations.tensor_shards import open_shard

# Name of the column that the targets are served as, [N, d_out].
TARGETS = "targets"
# Columns that are equal if two shards were captured from the same tokens.
_TOKEN_COLUMNS = ("token_ids", "doc_id", "position")


@dataclass(frozen=True)
class TargetFiles:
    """The files with the targets.

    Attributes:
        paths: a file for each shard, perhaps the shard itself.
        key: name of their dataset.
    """

    paths: tuple[Path, ...]
    key: str


def find_targets(
    shards: Sequence[Path],
    place: str | Path | None,
    key: str,
    others: Iterable[Path] = (),
) -> TargetFiles:
    """Find the files of `place` named as the shards are, or without a place the shards.

    `place` is a directory, or one file for one shard. Raises ShardError if a shard has no file
    there, or if a file there belongs to neither the shards nor the `others`: the directory is then
    not what was captured with them.
    """
    if place is None:
        return TargetFiles(tuple(shards), key)
    directory = local_place(place)
    if directory.is_file():
        if len(shards) > 1:
            raise ShardError(f"{directory}: targets of one shard, but there are {len(shards)}")
        return TargetFiles((directory,), key)
    if not directory.is_dir():
        raise ShardError(f"{directory}: no such directory or file of targets")
    paths = tuple(directory / shard.name for shard in shards)
    for shard, path in zip(shards, paths, strict=True):
        if not path.is_file():
            raise ShardError(f"{directory}: has no {path.name} with the targets of {shard}")
    names = {path.name for path in (*shards, *others)}
    for path in shards_in(directory):
        if path.name not in names:
            raise ShardError(f"{path}: holds targets of no shard, none has its name")
    return TargetFiles(paths, key)


def check_pair(shard: Shard, targets: Shard) -> None:
    """Raise ShardError unless the targets belong to the rows of the shard, as far as known."""
    if shard.rows != targets.rows:
        raise ShardError(
            f"{targets.path}: {targets.key!r} has {targets.rows} rows of targets, "
            f"{shard.path} has {shard.rows} rows of activations"
        )
    if shard.path == targets.path:
        return
    with open_shard(shard) as inputs, open_shard(targets) as outputs:
        for name in _TOKEN_COLUMNS:
            if not (inputs.has(name) and outputs.has(name)):
                continue
            one, other = (file.read_column(name, 0, shard.rows) for file in (inputs, outputs))
            if (differing := np.flatnonzero(one != other)).size:
                row = int(differing[0])
                raise ShardError(
                    f"{targets.path}: row {row} belongs to another token than in {shard.path}: "
                    f"{name} is {other[row]}, there {one[row]}"
                )
