"""A conversion: the planned shards of a source written, read again, and resumed after a kill.

conversion.json in the directory says what is converted and how; with it, and without a manifest,
the directory holds a conversion that was interrupted. A shard appears when it is whole, and shards
that are there already are compared with the source like new ones, so nothing else is recorded.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_fast.activations.compression import COMPRESSIONS, dataset_options
from sae_fast.activations.errors import ShardError, one_line
from sae_fast.activations.files import shards_in
from sae_fast.activations.imports.blocks import SourceBlock, read_blocks
from sae_fast.activations.imports.plan import PlannedShard, plan_shards
from sae_fast.activations.imports.saved_activations import SavedActivations
from sae_fast.activations.imports.verification import Comparison, Report, compare
from sae_fast.activations.shard_job import ShardJob
from sae_fast.activations.storage import STORAGES, Storage
from sae_fast.activations.writer import ShardMetadata, ShardWriter, padded_rows
from sae_fast.directory_lock import HeldError

RECORD_NAME = "conversion.json"
RECORD_VERSION = 1
SHARD_BYTES = 1 << 30
FILE_OVERHEAD = 64 << 10  # bytes of a shard beside its rows


@dataclass(frozen=True)
class ConversionOptions:
    """The form in which rows are stored.

    Attributes:
        dtype: "float16", "bfloat16" or "float32"; None: as they are.
        shard_rows: rows of a shard at most; None: as many as make a gigabyte.
        compression: one of COMPRESSIONS.
        heldout_rows: how many of the last rows are held out, in whole sequences.
        skip_nonfinite: whether rows that hold NaN or Inf are dropped.
        metadata: where the activations come from.
    """

    dtype: str | None = None
    shard_rows: int | None = None
    compression: str = "none"
    heldout_rows: int = 0
    skip_nonfinite: bool = False
    metadata: ShardMetadata = field(default_factory=ShardMetadata)

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in STORAGES:
            raise ValueError(f"dtype must be one of {', '.join(STORAGES)}, got {self.dtype!r}")
        if self.shard_rows is not None and self.shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, got {self.shard_rows}")
        if self.heldout_rows < 0:
            raise ValueError(f"heldout_rows must be at least 0, got {self.heldout_rows}")
        if self.compression not in COMPRESSIONS:
            raise ValueError(
                f"compression must be one of {', '.join(COMPRESSIONS)}, got {self.compression!r}"
            )
        dataset_options(self.compression)  # what is missing is better told before hours of work


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to begin or to continue."""

    source: SavedActivations
    options: ConversionOptions
    directory: Path
    storage: Storage
    shards: tuple[PlannedShard, ...]
    record: dict[str, Any]  # what conversion.json says
    done: tuple[str, ...]  # shards that are there
    finished: bool

    @property
    def bytes_at_most(self) -> int:
        """Bytes that are still to be written, without compression and with all padding."""
        row_bytes = self.source.d_in * self.storage.itemsize
        left = [shard.rows for shard in self.shards if shard.name not in self.done]
        stored_rows = sum(padded_rows(rows, row_bytes) for rows in left)
        row_bytes += 4 * len(self.source.columns)
        return stored_rows * row_bytes + FILE_OVERHEAD * len(left)

    @property
    def job(self) -> ShardJob:
        """The directory, as a job that can be killed and resumed."""
        return _job(self.directory)

    def blocks(self, shard: PlannedShard) -> Iterator[SourceBlock]:
        """Yield the rows of a shard as they should be."""
        skip = self.options.skip_nonfinite
        return read_blocks(self.source, shard.spans, self.storage, skip)


@dataclass(frozen=True)
class ConversionResult:
    """Result of a conversion.

    Attributes:
        rows: rows in the training shards.
        heldout_rows: rows in the held-out shards.
        padding: rows that were padding, left out.
        nonfinite: rows that held NaN or Inf, left out.
        change: ‖stored − source‖ / ‖source‖ over all rows; 0: no number was rounded.
    """

    rows: int
    heldout_rows: int
    padding: int
    nonfinite: int
    change: float


def prepare(source: SavedActivations, directory: Path, options: ConversionOptions) -> Conversion:
    """Plan a conversion and write nothing; raise ShardError where the directory is in use."""
    storage = source.storage if options.dtype is None else STORAGES[options.dtype]
    row_bytes = source.d_in * storage.itemsize
    shard_rows = options.shard_rows or max(1, SHARD_BYTES // row_bytes)
    shards = tuple(plan_shards(source, shard_rows, options.heldout_rows))
    record = _record(source, options, storage, shard_rows)
    done, finished = _state(_job(directory), record, {shard.name for shard in shards})
    return Conversion(source, options, directory, storage, shards, record, done, finished)


def check_space(conversions: list[Conversion]) -> int:
    """Return the bytes free where the shards go; raise ShardError if they might not fit."""
    free = conversions[0].job.free_bytes
    needed = sum(conversion.bytes_at_most for conversion in conversions)
    if needed > free:
        raise ShardError(
            f"{conversions[0].directory}: up to {needed / 1e9:.2f} GB are needed, "
            f"{free / 1e9:.2f} GB are free on the disk"
        )
    return free


def convert(conversion: Conversion, report: Report = lambda rows: None) -> ConversionResult:
    """Write the shards and their manifest; each is read again and compared with the source.

    Raises ShardError for what cannot be stored; the shards written before it stay, and converting
    again continues after them.
    """
    directory = conversion.directory
    total = Comparison()
    rows = {"train": 0, "heldout": 0}
    with _locked(conversion.job) as job:
        job.begin(conversion.record)
        for shard in conversion.shards:
            path = directory / shard.name
            if not path.exists():
                _write(conversion, shard, path, report)
            there = compare(path, conversion.blocks(shard), report)
            rows[shard.name.partition("_")[0]] += there.rows
            total = total.joined(there)
        if not rows["train"]:
            raise ShardError(
                f"{conversion.source.files[0].path}: no row is left to train on: "
                f"{total.padding} were padding, {total.nonfinite} not finite"
            )
        job.finish()
    return ConversionResult(
        rows["train"], rows["heldout"], total.padding, total.nonfinite, total.change
    )


def _write(conversion: Conversion, shard: PlannedShard, path: Path, report: Report) -> None:
    """Write one shard; none where every row of it was left out."""
    blocks = (block for block in _told(conversion.blocks(shard), report) if len(block.rows))
    first = next(blocks, None)
    if first is None:
        return
    writer = ShardWriter(
        path,
        dtype=conversion.storage.name,
        metadata=conversion.options.metadata,
        compression=conversion.options.compression,
    )
    try:
        with writer:
            writer.append(first.rows, **first.columns)
            for block in blocks:
                writer.append(block.rows, **block.columns)
    except RuntimeError as error:  # what HDF5 makes of a full disk when it closes the file
        raise ShardError(f"{path}: cannot be written: {one_line(error)}") from error


def _told(blocks: Iterator[SourceBlock], report: Report) -> Iterator[SourceBlock]:
    for block in blocks:
        yield block
        report(block.source_rows)


@contextlib.contextmanager
def _locked(job: ShardJob) -> Iterator[ShardJob]:
    """Keep a second conversion out of the directory of a job."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(job)
        except HeldError as error:
            raise ShardError(
                f"{job.path}: another conversion is writing there ({error.holder})"
            ) from None
        yield job


def _record(
    source: SavedActivations, options: ConversionOptions, storage: Storage, shard_rows: int
) -> dict[str, Any]:
    """Return what conversion.json says, in plain values."""
    metadata = asdict(options.metadata)
    record = {
        "format_version": RECORD_VERSION,
        "key": source.key,
        "d_in": source.d_in,
        "files": [{"file": file.path.name, "bytes": file.bytes} for file in source.files],
        "dtype": storage.name,
        "shard_rows": shard_rows,
        "compression": options.compression,
        "heldout_rows": options.heldout_rows,
        "skip_nonfinite": options.skip_nonfinite,
        "metadata": {name: value for name, value in metadata.items() if value not in (None, {})},
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def _job(directory: Path) -> ShardJob:
    return ShardJob(directory, RECORD_NAME, ".conversion.lock")


def _state(job: ShardJob, record: dict[str, Any], names: set[str]) -> tuple[tuple[str, ...], bool]:
    """Return the shards of this conversion that are there, and whether it is finished."""
    directory = job.path
    if not directory.exists():
        return (), False
    if not directory.is_dir():
        raise ShardError(f"{directory}: is no directory")
    try:
        before = job.read_record()
    except FileNotFoundError:
        if there := job.names():
            raise ShardError(
                f"{directory}: must be empty or not there yet, it holds {there[0]}"
            ) from None
        return (), False
    except (OSError, ValueError) as error:
        raise ShardError(f"{job.record}: cannot be read: {one_line(error)}") from error
    for name, value in record.items():
        if not isinstance(before, dict) or before.get(name) != value:
            old = before.get(name) if isinstance(before, dict) else before
            raise ShardError(
                f"{directory}: holds another conversion, its {name}: {_short(old)}, "
                f"now {_short(value)}; give another directory"
            )
    shards = [path.name for path in shards_in(directory)]
    for name in shards:
        if name not in names:
            raise ShardError(f"{directory / name}: is not of this conversion")
    return tuple(shards), job.is_finished


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
