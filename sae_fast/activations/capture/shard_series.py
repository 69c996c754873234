"""Rows into shards: one shard of every hook point at a time, all with the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations.capture.directory import (
    HELDOUT,
    CaptureDirectory,
    CaptureProgress,
    completed,
)
from sae_fast.activations.capture.harvest import Harvest
from sae_fast.activations.capture.hooks import HookPoint
from sae_fast.activations.errors import one_line
from sae_fast.activations.storage import STORAGES
from sae_fast.activations.writer import ShardMetadata, ShardWriter

FLOAT16_MAX = 65_504


@dataclass(frozen=True)
class HostRows:
    """A harvest in the stored type, on its way to the host or there.

    Attributes:
        rows: by name of the hook point, [n, D] in the stored type.
        harvest: the harvest that the rows are of.
        ready: waits for the copy from the device; None: there is none.
    """

    rows: dict[str, Tensor]
    harvest: Harvest
    ready: Callable[[], None] | None


def bring_to_host(harvest: Harvest, dtype: str) -> HostRows:
    """Convert rows where they are, and copy them without waiting."""
    kind = STORAGES[dtype].torch_dtype
    rows = {
        name: activations.to(kind).to("cpu", non_blocking=True)
        for name, activations in harvest.activations.items()
    }
    device = next(iter(harvest.activations.values())).device
    if device.type != "cuda":
        return HostRows(rows, harvest, None)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))
    return HostRows(rows, harvest, copied.synchronize)


class ShardSeries:
    """The shards of one part of a capture; used with `with`, which leaves no shard half written.

    Args:
        directory: the directory of the capture.
        hooks: the hook points.
        metadata: attributes of the shards, apart from the hook point.
        progress: where to continue.
        dtype: in which rows are stored.
        compression: of the shards, or None.
        shard_tokens: rows of a shard; the held-out part is one shard.
    """

    def __init__(
        self,
        directory: CaptureDirectory,
        hooks: tuple[HookPoint, ...],
        metadata: ShardMetadata,
        progress: CaptureProgress,
        *,
        dtype: str,
        compression: str | None,
        shard_tokens: int,
    ) -> None:
        self.progress = progress
        self._directory = directory
        self._hooks = hooks
        self._metadata = metadata
        self._options: dict[str, Any] = {"dtype": dtype, "compression": compression}
        self._dtype = dtype
        self._limit = None if progress.part == HELDOUT else shard_tokens
        self._skip = progress.taken  # rows of the first harvest that are in earlier shards
        self._stack = ExitStack()
        self._writers: dict[str, ShardWriter] = {}
        self._rows = 0  # of the shards that are open

    def __enter__(self) -> ShardSeries:
        return self

    def __exit__(self, *details: Any) -> None:
        if self._writers:  # what is not whole goes
            error = details if details[0] is not None else (_Unfinished, _Unfinished(), None)
            self._stack.__exit__(*error)

    def write(self, host_rows: HostRows) -> None:
        """Add the rows of a harvest, over as many shards as they take."""
        if host_rows.ready is not None:
            host_rows.ready()
        begin, self._skip = self._skip, 0
        count = len(host_rows.harvest)
        while begin < count:
            if not self._writers:
                self._open()
            room = count if self._limit is None else self._limit - self._rows
            end = min(count, begin + room)
            self._append(host_rows, slice(begin, end))
            begin = end
            if self._rows == self._limit:
                batch = host_rows.harvest.batch
                at = (batch.following, 0) if end == count else (batch.cursor, end)
                self._close(replace(self.progress, cursor=at[0], taken=at[1]))

    def finish(self) -> None:
        """End the last shard, however long it is; with it the part is complete."""
        if self._writers:
            self._close(completed(self.progress))

    def _open(self) -> None:
        self._rows = 0
        for hook in self._hooks:
            path = self._path(hook.name)
            metadata = replace(self._metadata, hook=hook.name, layer=hook.layer)
            writer = ShardWriter(path, metadata=metadata, **self._options)
            with _disk_errors(self._directory.path):
                self._writers[hook.name] = self._stack.enter_context(writer)

    def _append(self, host_rows: HostRows, part: slice) -> None:
        harvest = host_rows.harvest
        columns: dict[str, Any] = {
            "token_ids": harvest.token_ids[part].numpy(),
            "doc_id": harvest.doc_id[part].numpy(),
            "position": harvest.position[part].numpy(),
        }
        for name, writer in self._writers.items():
            rows = host_rows.rows[name][part]
            try:
                with _disk_errors(self._directory.path):
                    writer.append(rows, **columns)
            except ValueError as error:
                raise ValueError(self._why(name, host_rows, part) or str(error)) from error
        self._rows += part.stop - part.start

    def _why(self, name: str, host_rows: HostRows, part: slice) -> str | None:
        """Return what is wrong with rows that cannot be stored, if it is their numbers."""
        bad = ~torch.isfinite(host_rows.rows[name][part].float()).all(dim=1)
        if not bad.any():
            return None
        row = part.start + int(bad.int().argmax())
        harvest = host_rows.harvest
        source = harvest.activations[name][row].float()
        place = f"document {int(harvest.doc_id[row])}, position {int(harvest.position[row])}"
        if not bool(torch.isfinite(source).all()):
            return f"{name}: the model's activations at {place} are not finite"
        largest = float(source.abs().max())
        return (
            f"{name}: an activation at {place} is {largest:,.0f}, more than {self._dtype} holds "
            f"({FLOAT16_MAX:,}): capture again with --dtype bfloat16 or float32 and another --out; "
            f"the {self.progress.shards} shards of {self._directory.path} are whole and hold the "
            f"{self.progress.rows:,} rows before it"
        )

    def _close(self, progress: CaptureProgress) -> None:
        """Finalize the open shard of every hook point, then record the progress."""
        with _disk_errors(self._directory.path):
            self._stack.close()
        self._writers.clear()
        self.progress = replace(
            progress, shards=progress.shards + 1, rows=progress.rows + self._rows
        )
        if self._limit is not None:  # of the part held out the whole is kept at once
            self._directory.save(self.progress)

    def _path(self, hook: str) -> Path:
        return self._directory.shard_path(hook, self.progress.part, self.progress.shards)


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Add to an error of a full or failing disk what can be done about it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{directory}: cannot be written: {error.strerror or one_line(error)}; whole shards "
            "are kept, and the same command continues after them"
        ) from error


class _Unfinished(Exception):
    """Tells the writers of shards that these do not count."""


def shard_metadata(recipe: dict[str, Any]) -> ShardMetadata:
    """Return the attributes of every shard; the whole recipe is the attribute `capture`."""
    model, dataset = recipe["model"], recipe["dataset"]
    excluded = recipe["settings"]["exclude_special_tokens"]
    return ShardMetadata(
        model=model["name"],
        revision=model["revision"],
        tokenizer=model["tokenizer"],
        dataset=dataset["name"],
        special_tokens="excluded" if excluded else "kept",
        extra={"capture": json.dumps(recipe)},
    )
