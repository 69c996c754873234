"""Shards that belong together, checked before anything is trained on them."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from sae_fast.activations.background import Workers
from sae_fast.activations.columns import Column, RowNumbers, ShardColumns, inspect_columns
from sae_fast.activations.errors import ShardError
from sae_fast.activations.files import find_shards
from sae_fast.activations.first_reads import FirstReads, verified_lazily
from sae_fast.activations.kept_rows import KEPT_BYTES, KeptRows, Span
from sae_fast.activations.manifest import Manifest, check_entry, check_listing, read_manifest
from sae_fast.activations.row_scan import (
    MAX_BIN,
    NO_ROWS,
    OUTLIER_RATIO,
    RepeatedRows,
    RowScan,
    norm_limit,
    outliers_of,
)
from sae_fast.activations.scanning import (
    Checks,
    ScanRecord,
    large_rows,
    recalled,
    scan_shard,
    verified_by,
)
from sae_fast.activations.shard import DEFAULT_KEY, Shard, stated_digest
from sae_fast.activations.storage import FLOAT32, Storage
from sae_fast.activations.targets import TARGETS, TargetFiles, check_pair
from sae_fast.activations.tensor_shards import describe_shard, open_shard

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# Chooses rows of a set: numbers of shards, each with a span of its rows.
Sample = Callable[["ShardSet"], Iterable[tuple[int, Span]]]


@dataclass(frozen=True)
class ShardSet:
    """Shards of one width in a fixed order, with the rows to leave out and the columns to serve.

    The targets, if asked for, are a set of as many shards, with as many rows in each, of which the
    same ones are left out.
    """

    shards: tuple[Shard, ...]
    dropped: tuple[RowNumbers, ...]  # per shard, ascending numbers of the rows left out
    shard_columns: tuple[ShardColumns, ...] = ()  # per shard; empty if not asked for
    targets: ShardSet | None = None
    is_zero: bool = False  # whether the scan has found nothing but zeros
    # Per shard the digest of its rows that the scan has taken, or nothing; empty without a scan.
    digests: tuple[str, ...] = field(default=(), compare=False)
    # Per shard the rows that the scan has kept of it; empty where none were asked for.
    kept: tuple[KeptRows, ...] = field(default=(), compare=False)
    # Checks rows when they are first read; None: they were checked before, or are not.
    first_reads: FirstReads | None = field(default=None, compare=False)
    # Dropped rows that another set serves, see cutting.py.
    elsewhere: int = 0
    # The rows that were cut from this set, to evaluate with; None: none were.
    held: ShardSet | None = field(default=None, compare=False)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.shards[0].d_in

    @property
    def rows(self) -> int:
        """Rows that are served: all but the dropped ones."""
        return sum(self.served_rows(number) for number in range(len(self.shards)))

    def served_rows(self, number: int) -> int:
        """Return the number of rows of one shard that are served."""
        return self.shards[number].rows - len(self.dropped[number])

    @property
    def nonfinite_rows(self) -> int:
        """Rows left out: those that hold NaN or Inf and, where asked for, repeated ones."""
        return sum(len(rows) for rows in self.dropped) - self.elsewhere

    @property
    def storage(self) -> Storage:
        """Element type in which rows of all shards fit."""
        kinds = {shard.storage.name for shard in self.shards}
        return self.shards[0].storage if len(kinds) == 1 else FLOAT32

    @property
    def columns(self) -> dict[str, Column]:
        """Name, type and range of the columns beside the rows, over all shards, with STARTS."""
        joined: dict[str, Column] = {}
        for part in self.shard_columns:
            for name, column in part.columns.items():
                joined[name] = joined[name].joined(column) if name in joined else column
        if self.targets is not None:
            place = str(self.targets.shards[0].path)
            joined[TARGETS] = Column(TARGETS, torch.float32, place=place, width=self.targets.d_in)
        return joined

    def starts(self, number: int) -> RowNumbers | None:
        """Return ascending numbers of one shard's rows that begin a sequence, if kept whole."""
        return self.shard_columns[number].starts if self.shard_columns else None

    def forget_kept(self) -> None:
        """Release the rows that were kept."""
        for part in self.kept:
            part.clear()

    def identities(self) -> list[tuple[str, str]]:
        """Return the file name of each shard, and a digest of what a resumed run relies on.

        The first and last rows stand for the content where no scan has read all of it.
        """
        digests = [part.digest for part in self.shard_columns] or [""] * len(self.shards)
        if self.targets is not None:
            beside = [digest for _, digest in self.targets.identities()]
            digests = [own + other for own, other in zip(digests, beside, strict=True)]
        return [
            (shard.path.name, _identity(shard, dropped, digest))
            for shard, dropped, digest in zip(self.shards, self.dropped, digests, strict=True)
        ]

    def contents(self) -> list[str]:
        """Return the digest of all rows of each shard and its targets; empty where unknown."""
        digests = list(self.digests) or [""] * len(self.shards)
        if self.targets is None:
            return digests
        beside = self.targets.contents()
        return [f"{x} {y}" if x and y else "" for x, y in zip(digests, beside, strict=True)]


class _Checked(NamedTuple):
    """Findings of the checks of shards."""

    dropped: tuple[RowNumbers, ...]  # per shard, the rows left out
    is_zero: bool
    digests: tuple[str, ...]
    first_reads: FirstReads | None = None


def open_shards(
    shard_dir: str | Path | Sequence[Path],
    *,
    key: str = DEFAULT_KEY,
    verify: bool = True,
    lazy: bool = False,
    skip_nonfinite: bool = False,
    columns: Sequence[str] = (),
    whole_sequences: bool = False,
    targets: TargetFiles | None = None,
    repeated_rows: RepeatedRows = "refuse",
    record: ScanRecord | None = None,
    sample: Sample | None = None,
    max_norm_multiple: float | None = None,
) -> ShardSet:
    """Check the training shards of a directory, or the given files, and describe them.

    Always checked: each file opens, holds the dataset `key`, agrees with its attributes, with the
    others' width and with manifest.json. `verify` also reads all of it once: checksums, and that
    every row is finite. With `skip_nonfinite` rows that are not are dropped and counted instead.
    Rows that are zero or equal to the row before them are what is left of rows that were never
    written: where they are more than a hundredth of a shard, `repeated_rows` says whether they are
    refused, dropped or kept. A shard that `record` knows, and that has not changed, is not read.
    With `lazy` rows are looked at when a stream first reads them instead, and none is dropped.
    With `max_norm_multiple` rows whose norm is more than so many times the median are dropped; it
    needs `verify`, and the shards that have such rows are read once more.
    Rows that `sample` chooses are kept from the reading, if they are not too many.
    `columns` names datasets of labels that are served beside the rows; `whole_sequences` asks for
    the rows of a sequence together, see columns.py. Both are read once here and checked. `targets`
    are served beside the rows too, checked as these are; a row is dropped with its target.
    Raises ShardError, one line naming the file, for the first shard at fault.
    """
    paths = find_shards(shard_dir)[0] if isinstance(shard_dir, str | Path) else list(shard_dir)
    if not paths:
        raise ShardError("no activation shards given")
    if TARGETS in columns and targets is not None:
        raise ValueError(f"columns: {TARGETS!r} is the name of what targets are served as")
    if lazy and (skip_nonfinite or repeated_rows == "drop"):
        raise ValueError("lazy: which rows are dropped must be known before the first is served")
    if max_norm_multiple is not None and (lazy or not verify):
        raise ValueError("max_norm_multiple needs verify, which finds the norms")
    allowed = (verify, lazy, skip_nonfinite, repeated_rows)
    checks = Checks(*allowed, record or ScanRecord(), max_norm_multiple)
    shards = tuple(describe_shard(path, key) for path in paths)
    kept = () if sample is None else _kept_rows(shards, sample)
    dropped, is_zero, digests, first_reads = _check_rows(shards, shards, checks, kept)
    paired = None
    if targets is not None:
        paired = _open_targets(shards, dropped, targets, checks)
        dropped = paired.dropped
    shard_columns: tuple[ShardColumns, ...] = ()
    if columns or whole_sequences:
        shard_columns = _find_columns(shards, dropped, columns, whole_sequences)
    own = (is_zero, digests, kept, first_reads)
    result = ShardSet(shards, dropped, shard_columns, paired, *own)
    if result.rows == 0:
        raise ShardError(f"{shards[0].path}: no finite row in it or in the other shards")
    if result.nonfinite_rows:
        logger.warning("dropping %d rows that %s", result.nonfinite_rows, _what_is_dropped(checks))
    return result


def _kept_rows(shards: tuple[Shard, ...], sample: Sample) -> tuple[KeptRows, ...]:
    """Make room for the rows of each shard that a sample chooses if no row is dropped."""
    spans: list[list[Span]] = [[] for _ in shards]
    for number, span in sample(ShardSet(shards, tuple(NO_ROWS for _ in shards))):
        spans[number].append(span)
    kept = tuple(KeptRows(*pair) for pair in zip(shards, spans, strict=True))
    return kept if sum(part.bytes for part in kept) <= KEPT_BYTES else ()


def _what_is_dropped(checks: Checks) -> str:
    is_dropped = checks.repeated_rows == "drop"
    also = ", or are zero or equal to the row before them" if is_dropped else ""
    if checks.max_norm_multiple is not None:
        also += f", or have norms above {checks.max_norm_multiple:g} times the median"
    return f"hold NaN or Inf{also}"


def _open_targets(
    shards: tuple[Shard, ...],
    dropped: tuple[RowNumbers, ...],  # per shard
    files: TargetFiles,
    checks: Checks,
) -> ShardSet:
    """Open the targets of shards, without the targets of rows that are left out."""
    option = "--target-key"
    targets = tuple(describe_shard(path, files.key, option) for path in files.paths)
    for pair in zip(shards, targets, strict=True):
        check_pair(*pair)
    elsewhere = tuple(
        target for shard, target in zip(shards, targets, strict=True) if shard.path != target.path
    )
    checked = _check_rows(targets, elsewhere, checks)
    both = (np.union1d(*pair) for pair in zip(dropped, checked.dropped, strict=True))
    return ShardSet(targets, tuple(both), digests=checked.digests, first_reads=checked.first_reads)


def _check_rows(
    shards: tuple[Shard, ...],
    files: tuple[Shard, ...],  # those whose files have not been checked yet
    checks: Checks,
    kept: tuple[KeptRows, ...] = (),
) -> _Checked:
    """Check shards against each other and their manifests, and scan their rows."""
    manifests = _check_manifests(files)
    for shard in shards[1:]:
        if shard.d_in != shards[0].d_in:
            raise ShardError(
                f"{shard.path}: rows are {shard.d_in} wide, "
                f"but {shards[0].d_in} wide in {shards[0].path}"
            )
    if not checks.verify and not checks.skip_nonfinite:
        return _Checked(tuple(NO_ROWS for _ in shards), False, ())
    unchecked = {shard.path for shard in files}

    def sha256_of(shard: Shard) -> str | None:
        manifest = manifests.get(shard.path.parent) if shard.path in unchecked else None
        return None if manifest is None else manifest[shard.path.name].sha256

    if checks.lazy:
        return _check_later(shards, checks, sha256_of)
    if checks.verify:
        _tell(files, checks, sha256_of)
    keeps = {id(shard): part for shard, part in zip(shards, kept, strict=False)}

    def scan(shard: Shard) -> RowScan:
        return scan_shard(shard, sha256_of(shard), shard.checksum, checks, keeps.get(id(shard)))

    scans = _for_each(shards, scan)
    norms = [result.served_norms(checks.repeated_rows) for result in scans]
    limit = math.inf
    if checks.max_norm_multiple is not None:
        limit = norm_limit(norms, checks.max_norm_multiple)
    _warn(shards, scans, checks, limit)
    is_zero = all(result.is_zero for result in scans)
    dropped = tuple(result.nonfinite for result in scans)
    if checks.repeated_rows == "drop":
        dropped = tuple(np.union1d(result.nonfinite, result.repeated) for result in scans)
    if limit < math.inf:
        parts = dict(zip(shards, scans, strict=True))
        large = _for_each(shards, lambda shard: _large_rows(shard, parts[shard], limit))
        dropped = tuple(np.union1d(*pair) for pair in zip(dropped, large, strict=True))
    return _Checked(dropped, is_zero, tuple(result.digest for result in scans))


def _tell(
    files: tuple[Shard, ...], checks: Checks, sha256_of: Callable[[Shard], str | None]
) -> None:
    """Log how many shards are read to check them, and how many were checked before."""
    unread = [
        shard
        for shard in files
        if recalled(shard, checks, verified_by(sha256_of(shard), shard.checksum)) is None
    ]
    if unread:
        total = sum(shard.file_bytes for shard in unread)
        noun = "shard" if len(unread) == 1 else "shards"
        logger.info("verifying %d %s, %.2f GB", len(unread), noun, total / 1e9)
    if len(unread) < len(files):
        known = len(files) - len(unread)
        verb = "shard is" if known == 1 else "shards are"
        logger.info("%d %s unchanged since verification", known, verb)


def _large_rows(shard: Shard, scan: RowScan, limit: float) -> RowNumbers:
    """Return the rows of a shard with norms above a limit; it is read only where there are some."""
    return large_rows(shard, limit) if max(scan.norms, default=-MAX_BIN) > limit else NO_ROWS


def _check_later(
    shards: tuple[Shard, ...], checks: Checks, sha256_of: Callable[[Shard], str | None]
) -> _Checked:
    """Take what is known of shards, and let the others be checked when they are first read."""
    found = [
        recalled(
            shard, checks, verified_by(sha256_of(shard), shard.checksum), verified_lazily(shard)
        )
        for shard in shards
    ]
    unknown = [number for number, scan in enumerate(found) if scan is None]
    undated = sum(stated_digest(shards[number]) is None for number in unknown)
    if undated:
        logger.warning(
            "verify lazy: %d of %d shards state no digest of their rows: NaN and repeated rows are "
            "noticed, other damage is not (--verify full reads them first)",
            undated,
            len(shards),
        )
    return _Checked(
        tuple(NO_ROWS for _ in shards),
        False,
        tuple("" if scan is None else scan.digest for scan in found),
        FirstReads(shards, unknown, checks) if unknown else None,
    )


def _warn(
    shards: tuple[Shard, ...], scans: Sequence[RowScan], checks: Checks, limit: float
) -> None:
    """Tell of rows that can be trained on, but may not be what they should be."""
    repeated = sum(len(result.repeated) for result in scans)
    if repeated and checks.repeated_rows != "drop":
        worst = max(range(len(scans)), key=lambda number: len(scans[number].repeated))
        logger.warning(
            "%s: %d of %d rows are zero or equal to the row before them, %d of these in %s "
            "(--repeated-rows drop leaves them out)",
            shards[0].path.parent,
            repeated,
            sum(shard.rows for shard in shards),
            len(scans[worst].repeated),
            shards[worst].path.name,
        )
    norms = [
        {number: count for number, count in part.items() if number <= limit}
        for part in (result.served_norms(checks.repeated_rows) for result in scans)
    ]
    if (outliers := outliers_of(norms)) is not None:
        worst = max(range(len(norms)), key=lambda number: max(norms[number], default=-MAX_BIN))
        logger.warning(
            "%s: %.2g %% of the rows have norms above %d times the median, up to %s times, and "
            "hold %.3g %% of the sum of squares: they decide mean, scale, loss and FVU. The "
            "largest is in %s. Capture without the tokens that they belong to, such as the first "
            "of each text, for figures of ordinary rows (--max-norm-multiple %d leaves them out)",
            shards[0].path.parent,
            100 * outliers.share,
            OUTLIER_RATIO,
            f"{outliers.ratio:.0f}" if outliers.ratio < 1e6 else f"{outliers.ratio:.1e}",
            100 * outliers.energy,
            shards[worst].path.name,
            OUTLIER_RATIO,
        )


def check_same_width(train: ShardSet, heldout: ShardSet) -> None:
    """Raise unless the held-out rows, and their targets, are as wide as those trained on."""
    if train.targets is not None and heldout.targets is not None:
        check_same_width(train.targets, heldout.targets)
    if train.d_in != heldout.d_in:
        first, other = heldout.shards[0], train.shards[0]
        raise ShardError(
            f"{first.path}: rows are {first.d_in} wide, but {other.d_in} wide in {other.path}"
        )


def _check_manifests(shards: tuple[Shard, ...]) -> dict[Path, Manifest | None]:
    """Check every shard against the manifest beside it; return the manifests by directory."""
    manifests: dict[Path, Manifest | None] = {}
    for shard in shards:
        directory = shard.path.parent
        if directory not in manifests:
            manifests[directory] = read_manifest(directory)
            manifest = manifests[directory]
            if manifest is not None:
                check_listing(directory, manifest)
        manifest = manifests[directory]
        if manifest is not None:
            check_entry(shard, manifest)
    return manifests


def _find_columns(
    shards: tuple[Shard, ...],
    dropped: tuple[RowNumbers, ...],
    names: Sequence[str],
    whole_sequences: bool,
) -> tuple[ShardColumns, ...]:
    """Read the columns of every shard; raise where kinds differ or no sequence has two rows."""
    left_out = dict(zip(shards, dropped, strict=True))
    parts = _for_each(
        shards, lambda shard: inspect_columns(shard, left_out[shard], names, whole_sequences)
    )
    for shard, part in zip(shards[1:], parts[1:], strict=True):
        for name, column in part.columns.items():
            if column.dtype != (first := parts[0].columns[name].dtype):
                raise ShardError(
                    f"{shard.path}: {name} is read as {column.dtype}, "
                    f"in {shards[0].path} as {first}"
                )
    if whole_sequences:
        sequences = sum(len(part.starts) for part in parts if part.starts is not None)
        if sequences == sum(shard.rows for shard in shards) - sum(map(len, dropped)):
            raise ShardError(
                f"{shards[0].path}: no row continues the sequence of the row before it, in this "
                "shard or in another: by doc_id or position every row is a sequence of its own"
            )
    return tuple(parts)


def _for_each(shards: Sequence[Shard], check: Callable[[Shard], Result]) -> list[Result]:
    """Run a check on all shards in parallel; raise for the first shard at fault, in their order."""
    with Workers(min(4, os.cpu_count() or 1), name="checks", does="checks shards") as workers:
        futures = [workers.submit(partial(check, shard)) for shard in shards]
        return [workers.wait(future) for future in futures]


def _identity(shard: Shard, dropped: RowNumbers, columns: str) -> str:
    described = (shard.key, shard.rows, shard.d_in, shard.storage.name, shard.chunk_rows)
    digest = hashlib.sha256(repr((described, shard.checksum)).encode())
    digest.update(columns.encode())
    digest.update(np.ascontiguousarray(dropped, "<i8").tobytes())
    row = np.empty((1, shard.d_in), shard.storage.numpy_dtype)
    with open_shard(shard) as file:
        for number in (0, shard.rows - 1):
            file.read(number, number + 1, row)
            digest.update(row.tobytes())
    return digest.hexdigest()[:16]
