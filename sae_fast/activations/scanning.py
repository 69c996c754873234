"""One pass over a shard before training, for its checksum and its rows, and a record of it.

A `ScanRecord` says what was found in which file. It lies in the directory of a run, and where
shards have a manifest also beside that, for all runs. It is trusted only where nothing about the
file has changed since, so that neither a resumed run nor the next one reads a shard twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sae_fast.activations.errors import ShardError
from sae_fast.activations.kept_rows import KeptRows
from sae_fast.activations.manifest import MANIFEST_NAME, file_sha256
from sae_fast.activations.row_scan import (
    NO_ROWS,
    RepeatedRows,
    RowNumbers,
    RowScan,
    RowScanner,
    nonfinite_error,
    norm_bins,
    repeated_error,
    repeated_limit,
)
from sae_fast.activations.shard import OpenShard, Shard, file_state, iterate_stored
from sae_fast.activations.storage import Array, as_tensor
from sae_fast.activations.tensor_shards import open_shard
from sae_fast.atomic_files import replacing
from sae_fast.json_files import read_json

RECORD_NAME = "shards.json"
BESIDE_MANIFEST = ".verified.json"
RECORD_VERSION = 3
# A file that changes twice within a tick of the kernel's clock, 10 ms at most, may keep its times.
TICK_NS = 20_000_000


class ScanRecord:
    """Findings of scans of shards, by file and dataset.

    Attributes:
        is_changed: whether there are findings that `save` has not written yet.
    """

    def __init__(self) -> None:
        self.is_changed = False
        self._known: dict[str, dict[str, Any]] = {}
        self._beside: dict[Path, dict[str, Any]] = {}  # by directory, as they were read
        self._new: dict[Path, dict[str, Any]] = {}  # by directory, to be written there

    @classmethod
    def load(cls, path: Path) -> ScanRecord:
        """Read a record; anything that is not a record counts as an empty one."""
        record = cls()
        record._known = _read_entries(path)
        return record

    def find(self, shard: Shard, *verified: str | None) -> RowScan | None:
        """Return the findings for a shard that has not changed, with one of these checksums."""
        if shard.state is None:
            return None
        for known in (self._known.get(_name(shard)), self._known_beside(shard)):
            try:
                if known is None or not _fits(known, shard, verified):
                    continue
                found = RowScan.from_dict(known, shard.rows)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if self._known.get(_name(shard)) is not known:
                self._known[_name(shard)], self.is_changed = known, True
            return found
        return None

    def _known_beside(self, shard: Shard) -> dict[str, Any] | None:
        """Return the entry of a shard in the record beside its manifest."""
        directory = shard.path.parent
        if directory not in self._beside:
            self._beside[directory] = _read_entries(directory / BESIDE_MANIFEST)
        found: dict[str, Any] | None = self._beside[directory].get(_name_beside(shard))
        return found

    def note(self, shard: Shard, verified: str | None, scanned_at: int, scan: RowScan) -> None:
        """Remember a scan that began at a time [ns], unless the file has changed since."""
        if shard.state is None:
            return
        with suppress(OSError):
            if file_state(shard.path.stat()) != shard.state:
                return
        state, rows, storage = _described(shard)
        about = {"state": state, "rows": rows, "storage": storage, "verified": verified}
        entry = {**about, "scanned_at": scanned_at, **scan.to_dict()}
        self._known[_name(shard)], self.is_changed = entry, True
        self._new.setdefault(shard.path.parent, {})[_name_beside(shard)] = entry

    def save(self, path: Path) -> None:
        """Write the record, if it holds anything, whole or not at all; raise OSError."""
        self.is_changed = False
        if known := dict(self._known):
            _write_entries(path, known)

    def save_beside_manifests(self) -> None:
        """Add the new findings to the records beside manifests, where these can be written."""
        for directory, entries in list(self._new.items()):
            if (directory / MANIFEST_NAME).exists():
                path = directory / BESIDE_MANIFEST
                with suppress(OSError):
                    _write_entries(path, {**_read_entries(path), **entries})
        self._new.clear()


@dataclass(frozen=True)
class Checks:
    """The checks of every shard of a set.

    Attributes:
        verify: whether checksums are compared.
        lazy: whether rows are looked at when they are first read, and not before.
        skip_nonfinite: whether rows with NaN or infinity are dropped instead of refused.
        repeated_rows: what becomes of rows that are zero or equal to the row before them.
        record: findings of earlier scans, where this one is noted too.
        max_norm_multiple: rows with a larger norm, by the median, are dropped; None: none are.
    """

    verify: bool = True
    lazy: bool = False
    skip_nonfinite: bool = False
    repeated_rows: RepeatedRows = "refuse"
    record: ScanRecord = field(default_factory=ScanRecord)
    max_norm_multiple: float | None = None


def scan_shard(
    shard: Shard,
    sha256: str | None,  # of the file, from its manifest
    checksum: str | None,  # of the rows, from the file's attributes
    checks: Checks,
    kept: KeptRows | None = None,
) -> RowScan:
    """Scan a shard once, or recall an earlier scan; raise ShardError for what is refused.

    Of the rows that are read, `kept` keeps the ones that it wants.
    """
    if not checks.verify:
        sha256 = checksum = None
    verified = verified_by(sha256, checksum)
    if (known := recalled(shard, checks, verified)) is not None:
        return known
    scanned_at = time.time_ns()
    scan = _scan(shard, sha256, checksum, checks, kept)
    checks.record.note(shard, verified, scanned_at, scan)
    return scan


def large_rows(shard: Shard, limit: float) -> RowNumbers:
    """Read a shard and return ascending numbers of the rows with norms above a limit, a bin."""
    found, start = [NO_ROWS], 0
    with open_shard(shard) as file:
        for rows in iterate_stored(file):
            found.append(start + np.flatnonzero(norm_bins(as_tensor(rows, shard.storage)) > limit))
            start += len(rows)
    return np.concatenate(found)


def verified_by(sha256: str | None, checksum: str | None) -> str | None:
    """Return what a record says of a shard that was compared with these sums."""
    return checksum if sha256 is None else f"file:{sha256}"


def recalled(shard: Shard, checks: Checks, *verified: str | None) -> RowScan | None:
    """Return what an earlier scan with one of these sums has found, None where there was none.

    Raises ShardError for what is refused now.
    """
    known = checks.record.find(shard, *verified)
    if known is not None:
        _require_allowed(shard, known, checks)
    return known


def _scan(
    shard: Shard,
    sha256: str | None,
    checksum: str | None,
    checks: Checks,
    kept: KeptRows | None,
) -> RowScan:
    """Scan a shard; refuse a row only if the checksum holds: otherwise damage explains it."""
    scanner = RowScanner(
        shard, skip_nonfinite=checks.skip_nonfinite, repeated_rows=checks.repeated_rows
    )
    digest = hashlib.sha256()
    with open_shard(shard) as file:
        pieces = None if sha256 is None else file.walk(digest.update)
        if pieces is None:
            if sha256 is not None:  # only HDF5 finds the rows, and reads no more than these
                _require_sha256(shard, sha256, file_sha256(shard.path))
            sha256, checksum = None, None if sha256 is not None else checksum
            pieces = _in_order(file, digest if checksum is not None else None)
        refused = None
        try:
            for start, rows in pieces:
                refused = refused or _refusal(scanner, start, rows)
                if kept is not None:
                    kept.note(start, rows)
                if refused is not None and sha256 is None and checksum is None:
                    raise refused
        except ShardError:  # rows that cannot be read
            if sha256 is not None:
                _require_sha256(shard, sha256, file_sha256(shard.path))
            raise
    if sha256 is not None:
        _require_sha256(shard, sha256, digest.hexdigest())
    elif checksum is not None and checksum != f"sha256:{digest.hexdigest()}":
        raise ShardError(f"{shard.path}: damaged: its rows do not match its checksum")
    if refused is not None:
        raise refused
    return scanner.result()


def _refusal(scanner: RowScanner, start: int, rows: Array) -> ShardError | None:
    """Return why some rows cannot be trained on, if there is a reason."""
    try:
        scanner.add(start, rows)
    except ShardError as error:
        return error
    return None


def _in_order(file: OpenShard, digest: Any) -> Iterator[tuple[int, Array]]:
    """Yield all rows in order, with the number of the first of each piece, and hash them."""
    start = 0
    for rows in iterate_stored(file):
        if digest is not None:
            digest.update(rows.data)
        yield start, rows
        start += len(rows)


def _require_sha256(shard: Shard, expected: str, actual: str) -> None:
    if actual != expected:
        raise ShardError(f"{shard.path}: damaged: its SHA-256 is not the one in manifest.json")


def _require_allowed(shard: Shard, scan: RowScan, checks: Checks) -> None:
    """Raise as a scan would: an earlier scan may have been allowed more."""
    if scan.nonfinite.size and not checks.skip_nonfinite:
        raise nonfinite_error(shard, int(scan.nonfinite[0]))
    if checks.repeated_rows == "refuse" and len(scan.repeated) > repeated_limit(shard.rows):
        raise repeated_error(shard, scan.repeated)


def _name(shard: Shard) -> str:
    return f"{os.path.realpath(shard.path)}::{shard.key}"


def _name_beside(shard: Shard) -> str:
    return f"{shard.path.name}::{shard.key}"


def _described(shard: Shard) -> list[Any]:
    # Without the device: each machine of a cluster gives a network file system a number.
    return [list((shard.state or ())[1:]), shard.rows, shard.storage.name]


def _fits(known: dict[str, Any], shard: Shard, verified: tuple[str | None, ...]) -> bool:
    """Return whether an entry of a record is of a shard as it is, checked by one of these."""
    is_settled = int(known["scanned_at"]) - max(known["state"][2:]) > TICK_NS
    described = [known["state"], known["rows"], known["storage"]]
    return is_settled and known["verified"] in verified and described == _described(shard)


def _read_entries(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = read_json(path)
        if content["format_version"] == RECORD_VERSION:
            return dict(content["shards"])
    return {}


def _write_entries(path: Path, entries: dict[str, Any]) -> None:
    content = {"format_version": RECORD_VERSION, "shards": entries}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
