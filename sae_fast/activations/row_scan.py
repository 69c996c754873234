"""One look at every row of a shard: bad rows, norms, and a digest of the content.

Rows come in pieces in any order. Zero rows, and rows equal in every bit to the row before them, are
found where rows were never written, or where padding was kept; a few of them are normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_fast.activations.errors import ShardError
from sae_fast.activations.row_digest import RowDigest
from sae_fast.activations.shard import DEFAULT_KEY, Shard
from sae_fast.activations.storage import Array, as_tensor, nonfinite_rows

RowNumbers = npt.NDArray[np.int64]
RepeatedRows = Literal["refuse", "drop", "keep"]

NO_ROWS: RowNumbers = np.empty(0, np.int64)
# More repeated rows than this share of a shard, and than this number, are refused.
REPEATED_SHARE = 0.01
REPEATED_ROWS = 32
SLAB_BYTES = 512 << 10  # of rows as stored: with their float32 copies they stay in the cache
BINS_PER_OCTAVE = 4  # of the norms
MAX_BIN = 200 * BINS_PER_OCTAVE  # float32 ends at 2^128, and at 2^-149
OUTLIER_RATIO = 10  # times the median norm
OUTLIER_ENERGY = 0.5  # share of the sum of squares


@dataclass(frozen=True)
class RowScan:
    """Findings of a scan of the rows of a shard.

    Attributes:
        nonfinite: ascending numbers of the rows with NaN or infinity.
        repeated: ascending numbers of the rows that are zero or equal to the row before them.
        norms: how many finite rows there are by norm; bin b begins at 2^(b / BINS_PER_OCTAVE).
        repeated_norms: the part of `norms` that the repeated rows have.
        digest: of all rows as stored and in their order, see row_digest.py.
    """

    nonfinite: RowNumbers = field(default_factory=lambda: NO_ROWS)
    repeated: RowNumbers = field(default_factory=lambda: NO_ROWS)
    norms: Mapping[int, int] = field(default_factory=dict)
    repeated_norms: Mapping[int, int] = field(default_factory=dict)
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return what `json` can write; runs of row numbers are written as start and stop."""
        return {
            "nonfinite": _runs(self.nonfinite),
            "repeated": _runs(self.repeated),
            "norms": _counts_as_json(self.norms),
            "repeated_norms": _counts_as_json(self.repeated_norms),
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], rows: int) -> RowScan:
        """Read what `to_dict` wrote; raise ValueError, TypeError or KeyError for anything else."""
        norms, repeated_norms = (
            {int(number): int(count) for number, count in values[name].items()}
            for name in ("norms", "repeated_norms")
        )
        if not isinstance(digest := values["digest"], str):
            raise TypeError(f"digest {digest!r}")
        nonfinite, repeated = (_numbers(values[name], rows) for name in ("nonfinite", "repeated"))
        return cls(nonfinite, repeated, norms, repeated_norms, digest)

    @property
    def is_zero(self) -> bool:
        """Whether every row is zero."""
        return self.norms.keys() == {-MAX_BIN} and len(self.repeated) == self.norms[-MAX_BIN]

    def served_norms(self, repeated_rows: RepeatedRows) -> dict[int, int]:
        """Return how many of the rows that are served there are by norm."""
        left_out = self.repeated_norms if repeated_rows == "drop" else {}
        served = {number: count - left_out.get(number, 0) for number, count in self.norms.items()}
        return {number: count for number, count in served.items() if count > 0}


@dataclass(frozen=True)
class Outliers:
    """Rows with norms above OUTLIER_RATIO times the median: their share, and how large they are."""

    share: float
    energy: float  # share of the sum of squared norms
    ratio: float  # largest norm by the median, to within a bin


def outliers_of(norms: Sequence[Mapping[int, int]]) -> Outliers | None:
    """Find the outliers among the rows of several shards; None where they decide nothing.

    `norms` are the counts of each shard by norm, as in `RowScan`.
    """
    counts = _together(norms)
    if (median := _median(counts)) is None:
        return None
    total = sum(counts.values())
    limit = median + BINS_PER_OCTAVE * math.log2(OUTLIER_RATIO)
    energies = {
        number: count * 2.0 ** (2 * (number - median) / BINS_PER_OCTAVE)
        for number, count in counts.items()
    }
    rows = sum(count for number, count in counts.items() if number > limit)
    energy = sum(value for number, value in energies.items() if number > limit)
    if not rows or energy < OUTLIER_ENERGY * sum(energies.values()):
        return None
    ratio = 2.0 ** ((max(counts) - median) / BINS_PER_OCTAVE)
    return Outliers(rows / total, energy / sum(energies.values()), ratio)


def norm_limit(norms: Sequence[Mapping[int, int]], multiple: float) -> float:
    """Return the bin above which norms are more than `multiple` times the median.

    `norms` are the counts of each shard by norm, as in `RowScan`. The median is known to within a
    bin, a fifth of it; where it is 0 the limit is infinite.
    """
    median = _median(_together(norms))
    return math.inf if median is None else median + BINS_PER_OCTAVE * math.log2(multiple)


def norm_bins(x: Tensor) -> Array:
    """Return the bin [n] float of the norm of each row [n, D]; NaN where a row holds NaN."""
    return _bins_of(torch.linalg.vector_norm(x.float(), dim=1).cpu().numpy())


def count_bins(bins: Array) -> dict[int, int]:
    """Return how many rows there are by bin, without rows of NaN."""
    numbers, counts = np.unique(bins[~np.isnan(bins)].astype(np.int64), return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _bins_of(norms: Array) -> Array:
    with np.errstate(divide="ignore"):
        bins: Array = np.floor(BINS_PER_OCTAVE * np.log2(norms)).clip(-MAX_BIN, MAX_BIN)
    return bins


def _together(norms: Sequence[Mapping[int, int]]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for part in norms:
        for number, count in part.items():
            counts[number] = counts.get(number, 0) + count
    return counts


def _median(counts: Mapping[int, int]) -> int | None:
    """Return the bin of the median norm; None where it is 0, and without rows."""
    total, passed = sum(counts.values()), 0
    for number in sorted(counts):
        passed += counts[number]
        if 2 * passed >= total:
            return number if number > -MAX_BIN else None
    return None


class RowScanner:
    """Collects a `RowScan` from the pieces of a shard; raise ShardError for what is refused."""

    def __init__(self, shard: Shard, *, skip_nonfinite: bool, repeated_rows: RepeatedRows) -> None:
        if repeated_rows not in get_args(RepeatedRows):
            names = ", ".join(get_args(RepeatedRows))
            raise ValueError(f"repeated_rows must be one of {names}, got {repeated_rows!r}")
        self._shard = shard
        self._skip_nonfinite = skip_nonfinite
        self._limit = repeated_limit(shard.rows) if repeated_rows == "refuse" else shard.rows
        self._nonfinite: list[RowNumbers] = []
        self._repeated: list[RowNumbers] = []
        self._n_repeated = 0
        self._norms, self._repeated_norms = np.zeros((2, 2 * MAX_BIN + 1), np.int64)
        self._digest = RowDigest(shard.row_bytes)
        # By the number of the row behind or before them: rows at the ends of pieces whose
        # neighbours have not come yet.
        self._lasts: dict[int, Array] = {}
        self._firsts: dict[int, Array] = {}

    def add(self, start: int, rows: Array) -> None:
        """Look at the rows [n, D], of which the first has the number `start`."""
        step = max(1, SLAB_BYTES // max(1, rows.shape[1] * rows.itemsize))
        hashes = np.empty(len(rows), np.uint64)
        for first in range(0, len(rows), step):
            slab = rows[first : first + step]
            self._digest.hash(slab, hashes[first : first + step])
            self._add_slab(start + first, slab)
        self._digest.add(start, hashes)

    def result(self) -> RowScan:
        """Return what was found."""
        nonfinite, repeated = _joined(self._nonfinite), _joined(self._repeated)
        norms, repeated_norms = _counts(self._norms), _counts(self._repeated_norms)
        return RowScan(nonfinite, repeated, norms, repeated_norms, self._digest.text())

    def _add_slab(self, start: int, rows: Array) -> None:
        shard = self._shard
        x = as_tensor(rows, shard.storage)
        norms = torch.linalg.vector_norm(x.float(), dim=1).numpy()
        exact, is_finite = norms, np.ones(len(rows), bool)
        if not np.isfinite(norms).all():  # or finite numbers whose squares are not
            bad = nonfinite_rows(rows, shard.storage)
            if bad.size and not self._skip_nonfinite:
                raise nonfinite_error(shard, start + int(bad[0]))
            self._nonfinite.append(bad + start)
            is_finite[bad] = False
            exact = torch.linalg.vector_norm(x.double(), dim=1).numpy()
            exact[bad] = 0  # whose bins are not counted
        bins = _bins_of(exact).astype(np.int64) + MAX_BIN
        _count(self._norms, bins if exact is norms else bins[is_finite])
        repeated, is_next = self._note_repeated(start, rows, norms)
        if repeated.any():
            _count(self._repeated_norms, bins[repeated & is_finite])
        if is_next and is_finite[-1]:
            self._repeated_norms[bins[-1]] += 1

    def _note_repeated(
        self, start: int, rows: Array, norms: Array
    ) -> tuple[npt.NDArray[np.bool_], bool]:
        """Note repeated rows; return which of `rows` are, and whether the row after them is."""
        repeated = np.zeros(len(rows), bool)
        # Few rows have the two ends of the row before them, so few are compared whole.
        with np.errstate(invalid="ignore"):  # infinity less infinity
            near = np.abs(norms[1:] - norms[:-1]) <= 1e-3 * norms[:-1]
        ends = (rows[1:, 0] == rows[:-1, 0]) & (rows[1:, -1] == rows[:-1, -1])
        candidates = np.flatnonzero(near & ends)
        if candidates.size:
            same = (rows[candidates] == rows[candidates + 1]).all(axis=1)
            repeated[candidates[same] + 1] = True
        zero = np.flatnonzero(norms == 0)  # of which the squares of some are too small for float32
        magnitude = rows[zero].view(self._shard.storage.bits_dtype) << 1  # without the sign
        repeated[zero[~magnitude.any(axis=1)]] = True
        stop, extra = start + len(rows), list[int]()
        if (before := self._lasts.pop(start, None)) is not None:
            repeated[0] |= np.array_equal(before, rows[0])
        elif start:
            self._firsts[start] = rows[0].copy()
        if (after := self._firsts.pop(stop, None)) is not None:
            extra += [stop] if np.array_equal(after, rows[-1]) else []
        elif stop < self._shard.rows:
            self._lasts[stop] = rows[-1].copy()
        numbers = np.concatenate([np.flatnonzero(repeated) + start, np.array(extra, np.int64)])
        if numbers.size:
            self._repeated.append(numbers)
            self._n_repeated += len(numbers)
            if self._n_repeated > self._limit:
                raise repeated_error(self._shard, _joined(self._repeated))
        return repeated, bool(extra)


def repeated_limit(rows: int) -> int:
    """Return how many rows of a shard of `rows` may be zero or equal to the row before."""
    return max(REPEATED_ROWS, int(rows * REPEATED_SHARE))


def nonfinite_error(shard: Shard, row: int) -> ShardError:
    """Describe the first row at fault."""
    return ShardError(
        f"{shard.path}: row {row}{_of(shard)} holds NaN or Inf (--skip-nonfinite drops such rows)"
    )


def repeated_error(shard: Shard, repeated: RowNumbers) -> ShardError:
    """Describe a shard with too many repeated rows."""
    return ShardError(
        f"{shard.path}: row {repeated[0]}{_of(shard)}, and {len(repeated) - 1:,} rows or more "
        f"after it, are zero or equal to the row before them, as rows that were never written are; "
        f"of {shard.rows:,} rows {repeated_limit(shard.rows):,} may be "
        "(--repeated-rows drop leaves them out, keep takes them)"
    )


def _of(shard: Shard) -> str:
    return "" if shard.key == DEFAULT_KEY else f" of {shard.key!r}"


def _count(counts: RowNumbers, bins: RowNumbers) -> None:
    """Add how often each bin is there."""
    counts += np.bincount(bins, minlength=len(counts))


def _counts(counts: RowNumbers) -> dict[int, int]:
    return {int(place) - MAX_BIN: int(counts[place]) for place in np.flatnonzero(counts)}


def _counts_as_json(norms: Mapping[int, int]) -> dict[str, int]:
    return {str(number): count for number, count in sorted(norms.items())}


def _joined(parts: list[RowNumbers]) -> RowNumbers:
    return np.unique(np.concatenate(parts)) if parts else NO_ROWS


def _runs(numbers: RowNumbers) -> list[list[int]]:
    if not numbers.size:
        return []
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(numbers, cuts)]


def _numbers(runs: Sequence[Sequence[int]], rows: int) -> RowNumbers:
    end = 0
    for start, stop in runs:
        if not (isinstance(start, int) and isinstance(stop, int) and end <= start < stop <= rows):
            raise ValueError(f"rows {start} to {stop} of {rows}")
        end = stop
    return _joined([np.arange(start, stop) for start, stop in runs])
