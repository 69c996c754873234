"""Shuffled batches from a tensor in memory: `TensorStream`, for notebooks and tests."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_fast.activations.columns import STARTS, Column, RowNumbers, tensor_columns
from sae_fast.activations.order import shuffled_rows
from sae_fast.activations.row_scan import count_bins, norm_bins, norm_limit
from sae_fast.activations.source import (
    Rows,
    Source,
    StoredRows,
    Transform,
    check_state,
    checked_transform,
    empty_rows,
    placed,
    saved_counts,
    take,
)
from sae_fast.activations.storage import Storage, as_numpy, nonfinite_rows, storage_of
from sae_fast.activations.targets import TARGETS

logger = logging.getLogger(__name__)

STATE_VERSION = 1
CPU = torch.device("cpu")
SAMPLED_ROWS = 1024
CHECKED_ROWS = 1 << 14  # at a time, on a GPU


class TensorStream(Source):
    """Rows of `activations` [n, D] or [sequences, tokens, D], each exactly once an epoch.

    Batches are made when they are asked for, without a thread. The tensor is not copied, so it must
    not be changed. `device` is what the batches are for: from a tensor on that GPU they are made
    there, from another in memory that a GPU can be copied to from. Raises ValueError for a row that
    is not finite, unless `skip_nonfinite`. With `max_norm_multiple` rows and targets whose norm is
    more than so many times the median are left out.

    `columns` are labels, one number a row, that `next_rows` serves with the rows. With
    `whole_sequences` sequences are shuffled, not rows: the sequences of a 3-D tensor, or what
    `columns` "doc_id" and "position" say, see columns.py. `targets` [n, d_out], in as many
    dimensions, are served as the column TARGETS after `target_transform`; a row goes with its own.
    """

    counts_rows = True  # in tokens_served, every row that a batch has

    def __init__(
        self,
        activations: Tensor,
        *,
        batch_size: int,
        seed: int = 0,
        skip_nonfinite: bool = False,
        transform: Transform | None = None,
        device: torch.device = CPU,
        columns: Mapping[str, Tensor] | None = None,
        whole_sequences: bool = False,
        targets: Tensor | None = None,
        target_transform: Transform | None = None,
        max_norm_multiple: float | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        place = device if activations.device == device else CPU
        parts = {"activations": activations}
        if targets is not None:
            _check_pairs(activations, targets)
            parts[TARGETS] = targets
        (self._rows, *paired), dropped = finite_rows(
            parts, skip_nonfinite, place, max_norm_multiple
        )
        tokens = activations.shape[1] if activations.ndim == 3 else 1
        beside = tensor_columns(columns or {}, len(self._rows), tokens, dropped, whole_sequences)
        self._column_info, self._starts = beside.info, beside.starts
        self._columns = {name: column.to(place) for name, column in beside.tensors.items()}
        if paired:
            width = paired[0].shape[1]
            self._columns[TARGETS] = paired[0]
            self._column_info[TARGETS] = Column(TARGETS, torch.float32, width=width)
        self._pin_memory = device.type == "cuda" and place == CPU
        self._nonfinite_rows = len(dropped)
        self.batch_size = batch_size
        self.seed = seed
        self.set_transform(transform, target_transform)
        self._tokens = 0
        self._order_epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self._stall_seconds = 0.0
        self._digest: str | None = None

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self._rows.shape[1]

    @property
    def columns(self) -> dict[str, Column]:
        """Name, type and range of each column that `next_rows` serves."""
        return self._column_info

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the tensor, without those dropped as non-finite."""
        return len(self._rows)

    @property
    def tokens_served(self) -> int:
        """Rows served since the very beginning, over resumes."""
        return self._tokens

    @property
    def nonfinite_rows(self) -> int:
        """Rows of the tensor that are left out: those with NaN or Inf, or with too large a norm."""
        return self._nonfinite_rows

    @property
    def kept(self) -> Tensor:
        """The rows [n, D] that are served, as they are stored."""
        return self._rows

    @property
    def kept_targets(self) -> Tensor | None:
        """The targets [n, d_out] that are served, as they are stored; None: there are none."""
        return self._columns.get(TARGETS)

    @property
    def stored(self) -> Rows:
        """The rows [n, D] that are served and the columns beside them, as they are stored."""
        return Rows(self._rows, self._columns)

    @property
    def stall_seconds(self) -> float:
        """Seconds spent in `next_batch`: without a reader thread all of it is waiting."""
        return self._stall_seconds

    @property
    def memory_bytes(self) -> int:
        """Memory beside the tensor itself: the order of its rows and one batch."""
        width = self.d_in + sum(column.width for column in self._column_info.values())
        return 8 * self.rows_per_epoch + 4 * self.batch_size * width

    def set_transform(
        self, transform: Transform | None, target_transform: Transform | None = None
    ) -> None:
        """Serve rows and targets transformed from the next batch on; None: as they are."""
        place = self._rows.device
        self._transform = placed(checked_transform(transform, self.d_in), place)
        self._target_transform: Transform | None = None
        if TARGETS in self._column_info and (width := self._column_info[TARGETS].width):
            self._target_transform = placed(checked_transform(target_transform, width), place)

    def next_rows(self) -> Rows:
        """Return the next rows with their columns."""
        transforms = self._transform, self._target_transform
        return self._next_built(None, *transforms)

    def _next_built(
        self,
        stored: Mapping[str, torch.dtype] | None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> Rows:
        """Return the next rows; `stored` has the types of what is not widened, see empty_rows."""
        begin = time.perf_counter()
        size, device = (self.batch_size, self.d_in), self._rows.device
        batch = empty_rows(*size, self._column_info, device, self._pin_memory, stored)
        have = 0
        while have < self.batch_size:
            chosen = self._served(self._tokens, self.batch_size - have)
            count = len(chosen)
            place = slice(have, have + count)
            take(self.stored, chosen, batch, place, transform, target_transform)
            have += count
            self._tokens += count
        if STARTS in batch.columns:
            batch.columns[STARTS][0] = True  # the row before it is in another batch
        self._stall_seconds += time.perf_counter() - begin
        return batch

    def next_share(self, rank: int, size: int) -> Rows:
        """Return the batch of one rank among the next `size` batches; no other is gathered."""
        return self._share(rank, size, self.next_rows)

    def next_stored(self, rank: int, size: int) -> StoredRows:
        """Return what `next_share` does, for a GPU as it is stored in the memory of the host."""
        if not self._pin_memory:
            return super().next_stored(rank, size)
        stored = {name: rows.dtype for name, rows in self._wide().items()}
        batch = self._share(rank, size, lambda: self._next_built(stored))
        return StoredRows(batch, self._transform, self._target_transform)

    def _wide(self) -> dict[str, Tensor]:
        """Return what is widened to float32: the rows, and the targets, if there are any."""
        targets = self.kept_targets
        return {"x": self._rows} | ({} if targets is None else {TARGETS: targets})

    def _share(self, rank: int, size: int, make: Callable[[], Rows]) -> Rows:
        self._tokens += rank * self.batch_size
        batch = make()
        self._tokens += (size - rank - 1) * self.batch_size
        return batch

    def batch_rows(self, first: int) -> RowNumbers:
        """Return the number, in `stored`, of each row of a batch.

        Args:
            first: how many rows were served before the batch, since the very beginning.
        """
        parts: list[Tensor] = []
        while (have := sum(map(len, parts))) < self.batch_size:
            parts.append(self._served(first + have, self.batch_size - have))
        rows: RowNumbers = torch.cat(parts).cpu().numpy()
        return rows

    def _served(self, first: int, most: int) -> Tensor:
        """Return the numbers of the rows from the first-th served one on, within its epoch."""
        epoch, served = divmod(first, self.rows_per_epoch)
        if epoch != self._order_epoch:
            order = shuffled_rows(self.rows_per_epoch, self._starts, self.seed, epoch, 1)
            self._order = torch.from_numpy(order).to(self._rows.device)
            self._order_epoch = epoch
        return self._order[served : served + most]

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch served."""
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "whole_sequences": self._starts is not None,
            "tokens": self._tokens,
            "content": self._content(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; raise ValueError if tensor or seed have changed."""
        expected = {"seed": self.seed, "whole_sequences": self._starts is not None}
        check_state(state, STATE_VERSION, expected)
        if state.get("content") != self._content():
            raise ValueError(
                "the activations differ from the ones that the checkpoint was made with"
            )
        self._tokens = saved_counts(state, "tokens")[0]

    def close(self) -> None:
        """Do nothing: the tensor is the caller's, and there are no files."""

    def _content(self) -> str:
        """Return a digest of shape, type and evenly spaced rows, and of the columns."""
        if self._digest is None:
            self._digest = digest_of({"": self._rows, **self._columns})
        return self._digest


def digest_of(parts: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors by name: of matrices shape, type and evenly spaced rows."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(name.encode())
        if part.ndim == 2:
            _add_sampled_rows(digest, part)
        else:
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def checked_rows(activations: Tensor, skip_nonfinite: bool, device: torch.device = CPU) -> Tensor:
    """Return the rows [n, D] of a tensor on the device, contiguous and finite."""
    return finite_rows({"activations": activations}, skip_nonfinite, device)[0][0]


def finite_rows(
    parts: Mapping[str, Tensor],
    skip_nonfinite: bool,
    device: torch.device,
    max_norm_multiple: float | None = None,
) -> tuple[list[Tensor], RowNumbers]:
    """Return rows [n, D] of tensors on the device, and ascending numbers of dropped rows.

    Rows whose norm is more than `max_norm_multiple` times the median are dropped too.
    """
    wholes = [_rows_on(device, name, part) for name, part in parts.items()]
    bad = [_nonfinite(rows, storage_of(rows.dtype)) for rows in wholes]
    if any(numbers.size for numbers in bad) and not skip_nonfinite:
        name, numbers = next(pair for pair in zip(parts, bad, strict=True) if pair[1].size)
        raise ValueError(f"{name}: row {int(numbers[0])} holds NaN or Inf")
    if max_norm_multiple is not None:
        bad += [
            _large(name, rows, max_norm_multiple) for name, rows in zip(parts, wholes, strict=True)
        ]
    dropped = np.unique(np.concatenate(bad))
    if not dropped.size:
        return wholes, dropped
    keep = torch.ones(len(wholes[0]), dtype=torch.bool, device=device)
    keep[torch.from_numpy(dropped).to(device)] = False
    if not keep.any():
        raise ValueError(f"{' and '.join(parts)}: no row is finite")
    return [rows[keep] for rows in wholes], dropped


def _large(name: str, rows: Tensor, multiple: float) -> RowNumbers:
    """Return ascending numbers of the rows whose norm is so many times the median, and tell."""
    bins = np.concatenate([norm_bins(part) for part in torch.split(rows, CHECKED_ROWS)])
    found: RowNumbers = np.flatnonzero(bins > norm_limit([count_bins(bins)], multiple))
    if found.size:
        logger.warning(
            "%s: dropping %d of %d rows, whose norms are above %g times the median",
            *(name, len(found), len(rows), multiple),
        )
    return found


def _rows_on(device: torch.device, name: str, part: Tensor) -> Tensor:
    if part.ndim not in (2, 3) or part.numel() == 0:
        raise ValueError(
            f"{name} must be [n, D] or [sequences, tokens, D] and not empty, "
            f"got shape {tuple(part.shape)}"
        )
    rows = part.detach().to(device, storage_of(part.dtype).torch_dtype)
    return rows.reshape(-1, rows.shape[-1]).contiguous()


def _check_pairs(activations: Tensor, targets: Tensor) -> None:
    rows = tuple(activations.shape[:-1])
    if targets.shape[:-1] != rows:
        raise ValueError(
            f"targets must have one row for each of the activations, shape {(*rows, 'd_out')}, "
            f"got {tuple(targets.shape)}"
        )


def _add_sampled_rows(digest: hashlib._Hash, rows: Tensor) -> None:
    """Hash shape, type and evenly spaced rows."""
    sampled = rows[:: max(1, len(rows) // SAMPLED_ROWS)].contiguous()
    digest.update(repr((tuple(rows.shape), rows.dtype)).encode())
    digest.update(sampled.cpu().view(torch.uint8).numpy().data)


def _nonfinite(rows: Tensor, storage: Storage) -> RowNumbers:
    """Return ascending numbers of the rows that hold a NaN or an infinity."""
    if not rows.is_cuda:
        return nonfinite_rows(as_numpy(rows, storage), storage)
    parts = [~torch.isfinite(part).all(dim=1) for part in torch.split(rows, CHECKED_ROWS)]
    numbers: RowNumbers = torch.cat(parts).nonzero().flatten().cpu().numpy()
    return numbers
