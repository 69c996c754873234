"""One pass over a shard before training, for its checksum and its rows, and a record of it.

A `ScanRecord` in the directory of a run says what was found in which file. It is trusted only where
nothing about the file has changed since, so that a resumed run reads no shard twice.
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

from sae_fast.activations.errors import ShardError
from sae_fast.activations.kept_rows import KeptRows
from sae_fast.activations.manifest import file_sha256
from sae_fast.activations.row_scan import (
    RepeatedRows,
    RowScan,
    RowScanner,
    nonfinite_error,
    repeated_error,
    repeated_limit,
)
from sae_fast.activations.shard import OpenShard, Shard, file_state, iterate_stored
from sae_fast.activations.storage import Array
from sae_fast.activations.tensor_shards import open_shard
from sae_fast.atomic_files import replacing
from sae_fast.json_files import read_json

RECORD_NAME = "shards.json"
RECORD_VERSION = 2
# A file that changes twice within a tick of the kernel's clock, 10 ms at most, may keep its times.
TICK_NS = 20_000_000


class ScanRecord:
    """Findings of scans of shards, by file and dataset."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}

    @classmethod
    def load(cls, path: Path) -> ScanRecord:
        """Read a record; anything that is not a record counts as an empty one."""
        record = cls()
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = read_json(path)
            if content["format_version"] == RECORD_VERSION:
                record._known = dict(content["shards"])
        return record

    def find(self, shard: Shard, verified: str | None) -> RowScan | None:
        """Return the findings for a shard that has not changed, with the checksum `verified`."""
        known = self._known.get(_name(shard))
        if known is None or shard.state is None:
            return None
        try:
            is_settled = int(known["scanned_at"]) - max(known["state"][3:]) > TICK_NS
            described = [known["verified"], known["state"], known["rows"], known["storage"]]
            if not is_settled or described != [verified, *_described(shard)]:
                return None
            return RowScan.from_dict(known, shard.rows)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def note(self, shard: Shard, verified: str | None, scanned_at: int, scan: RowScan) -> None:
        """Remember a scan that began at a time [ns], unless the file has changed since."""
        if shard.state is None:
            return
        with suppress(OSError):
            if file_state(shard.path.stat()) != shard.state:
                return
        state, rows, storage = _described(shard)
        about = {"state": state, "rows": rows, "storage": storage, "verified": verified}
        self._known[_name(shard)] = {**about, "scanned_at": scanned_at, **scan.to_dict()}

    def save(self, path: Path) -> None:
        """Write the record, if it holds anything, whole or not at all; raise OSError."""
        if not self._known:
            return
        content = {"format_version": RECORD_VERSION, "shards": self._known}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Checks:
    """The checks of every shard of a set.

    Attributes:
        verify: whether checksums are compared.
        skip_nonfinite: whether rows with NaN or infinity are dropped instead of refused.
        repeated_rows: what becomes of rows that are zero or equal to the row before them.
        record: findings of earlier scans, where this one is noted too.
    """

    verify: bool = True
    skip_nonfinite: bool = False
    repeated_rows: RepeatedRows = "refuse"
    record: ScanRecord = field(default_factory=ScanRecord)


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
    verified = checksum if sha256 is None else f"file:{sha256}"
    known = checks.record.find(shard, verified)
    if known is not None:
        _require_allowed(shard, known, checks)
        return known
    scanned_at = time.time_ns()
    scan = _scan(shard, sha256, checksum, checks, kept)
    checks.record.note(shard, verified, scanned_at, scan)
    return scan


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


def _described(shard: Shard) -> list[Any]:
    return [list(shard.state or ()), shard.rows, shard.storage.name]
