"""Several sets of shards mixed by weight: whose row comes when, and what the sets must agree on.

The sets' turns are a fixed pattern that repeats. It is Tijdeman's solution of the chairman
assignment problem (Discrete Mathematics 32, 1980): of the first t rows each of n sets has its share
of t to within 1 - 1/(2n - 2) of a row, whatever t; so of any rows in a row, a batch or an epoch, to
within less than two. Each set is shuffled by itself and served whole before any row of it repeats.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_fast.activations.columns import Column
from sae_fast.activations.errors import ShardError
from sae_fast.activations.origin import ORIGIN, joined, named, origin_of_attributes
from sae_fast.activations.shard_set import ShardSet, check_same_width
from sae_fast.activations.targets import TARGETS

logger = logging.getLogger(__name__)

# Turns of the longest pattern; shares that need more are rounded to this part of a row.
MAX_PERIOD = 1 << 16


@dataclass(frozen=True)
class ShardMix:
    """Sets of shards of one width, and the turns [period] in which they serve a row."""

    sets: tuple[ShardSet, ...]
    turns: npt.NDArray[np.int64]  # numbers of sets

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.sets[0].d_in

    @property
    def shares(self) -> list[float]:
        """Share of the rows that each set has."""
        return [count / len(self.turns) for count in self.counts]

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch: as many as it takes until every set was served whole."""
        lengths = []
        for number, shards in enumerate(self.sets):
            turns = np.flatnonzero(self.turns == number)
            periods, left = divmod(shards.rows - 1, len(turns))
            lengths.append(periods * len(self.turns) + int(turns[left]) + 1)
        return max(lengths)

    @property
    def targets(self) -> ShardMix | None:
        """The targets of all sets, mixed as these are."""
        targets = [shards.targets for shards in self.sets if shards.targets is not None]
        return ShardMix(tuple(targets), self.turns) if targets else None

    @property
    def nonfinite_rows(self) -> int:
        """Rows of all sets that are left out, such as those that hold NaN or Inf."""
        return sum(shards.nonfinite_rows for shards in self.sets)

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Name, type and range of the columns beside the rows, over all sets."""
        joined = dict(self.sets[0].columns)
        for shards in self.sets[1:]:
            for name, column in shards.columns.items():
                joined[name] = joined[name].joined(column)
        return joined

    def turns_at(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the set of each of `count` rows, from row `first` of the mix on."""
        return np.take(self.turns, np.arange(first, first + count), mode="wrap")

    @property
    def counts(self) -> list[int]:
        """Turns that each set has in a period."""
        counts: list[int] = np.bincount(self.turns, minlength=len(self.sets)).tolist()
        return counts


def single(shards: ShardSet) -> ShardMix:
    """Return a mix of one set, which serves every row."""
    return ShardMix((shards,), np.zeros(1, np.int64))


def mix_shards(sets: Sequence[ShardSet], weights: Sequence[Fraction | float]) -> ShardMix:
    """Mix sets of shards, each with the share of the rows that its weight has of all weights.

    Raises ValueError for a weight that is not positive or is too small a part, ShardError where
    the sets differ in width, in their columns or in what was captured.
    """
    for shards in sets[1:]:
        check_same_width(sets[0], shards)
        _check_same_columns(sets[0], shards)
    check_same_origin(*sets)
    return ShardMix(tuple(sets), turns_of(weights))


def turns_of(weights: Sequence[Fraction | float]) -> npt.NDArray[np.int64]:
    """Return the pattern of turns for these weights; raise ValueError naming a bad weight."""
    parts = _parts_of(weights)
    period, n_sets = sum(parts), len(parts)
    if n_sets == 1:
        return np.zeros(1, np.int64)
    slack = 2 * n_sets - 2
    # By set: what it is behind its share, t * share - rows served, in units of 1 / period.
    behind = [0] * n_sets
    turns = np.empty(period, np.int64)
    for turn in range(period):
        behind = [late + part for late, part in zip(behind, parts, strict=True)]
        # Of those that are behind enough to be served, the one that must be served soonest.
        _, chosen = min(
            ((period * (slack - 1) - slack * late) / part, number)
            for number, (late, part) in enumerate(zip(behind, parts, strict=True))
            if slack * late >= period
        )
        turns[turn] = chosen
        behind[chosen] -= period
    return turns


def check_same_origin(*sets: ShardSet) -> None:
    """Raise ShardError unless all shards are of one model and hook, as far as they say."""
    known: dict[str, tuple[object, str]] = {}
    for shard in (shard for shards in sets for shard in shards.shards):
        for name in (*ORIGIN, "revision"):
            value = shard.metadata.get(name)
            if value is None:
                continue
            first, place = known.setdefault(name, (value, str(shard.path)))
            if value == first:
                continue
            difference = f"{shard.path}: is of {name} {value!r}, {place} of {first!r}"
            if name in ORIGIN:
                raise ShardError(f"{difference}: activations of one place in one model are needed")
            logger.warning("%s", difference)
            return


def origin_of(shards: ShardSet) -> dict[str, str]:
    """Return where the activations come from, as the first shard that says so tells it."""
    origin: dict[str, str] = {}
    for shard in shards.shards:
        told = origin_of_attributes(shard.metadata)
        for name in ORIGIN:
            if name in told:
                origin.setdefault(name, told[name])
    return origin


def full_origin(mix: ShardMix) -> dict[str, Any]:
    """Return the origin of the activations in shards, as far as these say it.

    See `origin_of_attributes`. A name for which the shards differ, such as the datasets of a mix,
    lists all values. Targets from files of their own are described under "targets".
    """
    shards = [shard for shards in mix.sets for shard in shards.shards]
    origin = joined([origin_of_attributes(shard.metadata) for shard in shards])
    targets = mix.targets
    if targets is not None and targets.sets[0].shards[0].path != shards[0].path:
        origin[TARGETS] = full_origin(targets)
    return {name: value for name, value in origin.items() if value}


def check_origin(shards: ShardSet, before: Mapping[str, str]) -> None:
    """Raise ValueError if the shards state another origin than `before`."""
    before = named(dict(before))
    for name, value in origin_of(shards).items():
        if value != before.get(name, value):
            raise ValueError(
                f"{shards.shards[0].path}: is of {name} {value!r}, "
                f"the checkpoint was trained on {name} {before[name]!r}"
            )


def _parts_of(weights: Sequence[Fraction | float]) -> list[int]:
    """Return the turns of each set in a period: exact, or of MAX_PERIOD if more were needed."""
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"mix: weights must be greater than 0, got {float(weight):g}")
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 means 7/10
    shares = [weight / sum(exact) for weight in exact]
    for weight, share in zip(weights, shares, strict=True):
        if share * MAX_PERIOD < 1:
            raise ValueError(
                f"mix: a weight of {float(weight):g} is less than 1/{MAX_PERIOD:,} of all weights"
            )
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    parts = [int(share * MAX_PERIOD) for share in shares]
    remainders = [part - share * MAX_PERIOD for share, part in zip(shares, parts, strict=True)]
    by_remainder = sorted(range(len(parts)), key=remainders.__getitem__)
    for number in by_remainder[: MAX_PERIOD - sum(parts)]:
        parts[number] += 1
    return parts


def _check_same_columns(first: ShardSet, other: ShardSet) -> None:
    """Raise unless a column is of one kind in both, and so are targets."""
    ours, theirs = first.columns, other.columns
    assert ours.keys() == theirs.keys()
    for name, column in theirs.items():
        if column.dtype != ours[name].dtype:
            raise ShardError(
                f"{other.shards[0].path}: {name} is read as {column.dtype}, "
                f"in {first.shards[0].path} as {ours[name].dtype}"
            )
