"""A caller's own source of activations: every batch is checked, copied and normalised.

Shards and tensors are checked when they are opened. A source serves rows that were not seen
before, so each batch is checked when it is taken. Rows that are not finite make a loss that is not,
which ends the training with the step named. What the source serves stays as it is: it may keep
views of its own data, or use one buffer for all batches.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_fast.activations.columns import NO_LABEL, Column
from sae_fast.activations.source import Rows, Source, Transform
from sae_fast.activations.storage import storage_of
from sae_fast.activations.targets import TARGETS
from sae_fast.json_files import is_integer, shown

_MEMBERS = (
    *("d_in", "rows_per_epoch", "tokens_served", "stall_seconds"),
    *("next_batch", "state_dict", "load_state_dict", "close"),
)


class ActivationSource(Protocol):
    """The interface of a caller's own source of batches, for training."""

    @property
    def d_in(self) -> int:
        """Width of a row."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the data; rows dropped as non-finite are not counted."""

    @property
    def tokens_served(self) -> int:
        """Rows served since the very beginning, over resumes."""

    @property
    def stall_seconds(self) -> float:
        """Seconds for which `next_batch` has kept its callers waiting."""

    def next_batch(self) -> Tensor:
        """Return the next rows [N, D], N = batch_size."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch served: a small dict that `json` can write."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; raise ValueError if the data has changed."""

    def close(self) -> None:
        """Release files and threads; the source cannot be used afterwards."""


class LabelledSource(ActivationSource, Protocol):
    """A caller's own supply of batches that has columns to go with its rows."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """Name, type and range of each column."""

    def next_rows(self) -> Rows:
        """Return the rows that `next_batch` would return, with the columns."""


class GivenSource(Source):
    """A caller's own source as a `Source`: members that it lacks have the defaults of that class.

    Args:
        given: an `ActivationSource` or a `LabelledSource`.
        batch_size: rows that each batch must have.

    Raises:
        ValueError: in one line, for what is no source, and for a batch that is not float [N, D] or
            whose columns do not fit.
    """

    def __init__(self, given: ActivationSource, batch_size: int) -> None:
        if missing := [name for name in _MEMBERS if not hasattr(given, name)]:
            raise ValueError(
                f"data: a source of activations has {', '.join(_MEMBERS)}; "
                f"{type(given).__name__} lacks {', '.join(missing)}"
            )
        for name in ("d_in", "rows_per_epoch"):
            value = getattr(given, name)
            if not is_integer(value) or value < 1:
                raise ValueError(f"data: {name} must be a whole number from 1, got {shown(value)}")
        self._given: Any = given
        served = self._known("batch_size", batch_size)
        if served != batch_size:
            raise ValueError(
                f"batch_size must be {batch_size}, got a source that serves {shown(served)}"
            )
        self._batch_size = batch_size
        self._transform: Transform | None = None
        self._target_transform: Transform | None = None

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return int(self._given.d_in)

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the data."""
        return int(self._given.rows_per_epoch)

    @property
    def tokens_served(self) -> int:
        """Rows served since the very beginning, as the caller's source counts them."""
        return int(self._given.tokens_served)

    @property
    def stall_seconds(self) -> float:
        """Seconds for which the caller's source says that it has kept its callers waiting."""
        return float(self._given.stall_seconds)

    @property
    def counts_rows(self) -> bool:
        """Whether the caller's source says that `tokens_served` counts every row of a step."""
        return bool(self._known("counts_rows", False))

    @property
    def columns(self) -> Mapping[str, Column]:
        """Name, type and range of each column that `next_rows` serves beside the rows."""
        known: Mapping[str, Column] = self._known("columns", {})
        return known

    @property
    def nonfinite_rows(self) -> int:
        """Rows that the caller's source says that it has left out."""
        return int(self._known("nonfinite_rows", 0))

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the caller's source says that it takes."""
        return int(self._known("memory_bytes", 0))

    @property
    def device_bytes(self) -> int:
        """Bytes on the GPU that the caller's source says that it takes."""
        return int(self._known("device_bytes", 0))

    def start(self, rank: int = 0, size: int = 1) -> None:
        """Begin to read ahead, where the caller's source can be told to."""
        self._known("start", lambda: None)()

    def current_shards(self) -> list[Path]:
        """Return the shards of the last batch, where the caller's source knows them."""
        shards: list[Path] = self._known("current_shards", list)()
        return shards

    def set_transform(
        self, transform: Transform | None, target_transform: Transform | None = None
    ) -> None:
        """Serve rows and targets transformed from the next batch on; None: as they are."""
        self._transform, self._target_transform = transform, target_transform

    def next_rows(self) -> Rows:
        """Return the next rows [N, D] float32 with their columns, in memory of their own."""
        known, serve = self.columns, self._known("next_rows", None)
        if not known or serve is None:
            rows = self._checked("next_batch", self._given.next_batch(), self.d_in)
            return Rows(_normalized(rows, self._transform), {})
        served = serve()
        if not isinstance(served, tuple) or len(served) != 2 or not isinstance(served[1], dict):
            raise ValueError(
                "data: next_rows must give rows and a dictionary of columns, "
                f"got {type(served).__name__}"
            )
        x = _normalized(self._checked("next_rows", served[0], self.d_in), self._transform)
        if missing := [name for name in known if name not in served[1]]:
            raise ValueError(f"data: next_rows has not served the columns {', '.join(missing)}")
        return Rows(x, {name: self._column(column, served[1]) for name, column in known.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the source's position; a copy, as the source may advance before it is saved."""
        state: dict[str, Any] = copy.deepcopy(self._given.state_dict())
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"data: state_dict must give what json can write: {error}") from None
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the caller's source continue where `state` was taken."""
        self._given.load_state_dict(state)

    def close(self) -> None:
        """Close the caller's source."""
        self._given.close()

    def _known(self, name: str, default: Any) -> Any:
        """Return a member that the caller's source need not have."""
        return getattr(self._given, name, default)

    def _column(self, column: Column, served: dict[str, Any]) -> Tensor:
        """Return the numbers of a column, checked, in memory of their own."""
        numbers = served[column.name]
        if column.name == TARGETS and column.width:
            what = f"next_rows: {TARGETS}"
            return _normalized(self._checked(what, numbers, column.width), self._target_transform)
        shape = (self._batch_size, *column.row_shape)
        if not isinstance(numbers, Tensor) or tuple(numbers.shape) != shape:
            raise ValueError(
                f"data: next_rows: {column.name} must be a tensor {list(shape)}, got {_of(numbers)}"
            )
        if numbers.dtype != column.dtype:
            raise ValueError(
                f"data: next_rows: {column.name} must be {column.dtype}, got {numbers.dtype}"
            )
        if numbers.device.type == "cpu" and not numbers.dtype.is_floating_point:
            least, most = int(numbers.min()), int(numbers.max())
            if most > column.maximum or least < NO_LABEL:
                wrong = least if least < NO_LABEL else most
                raise ValueError(
                    f"data: next_rows: {column.name} holds {wrong}, labels are -1 for none or "
                    f"0 to {column.maximum:g}, as its column says"
                )
        return numbers.detach().clone()

    def _checked(self, what: str, rows: Any, width: int) -> Tensor:
        """Return the rows [N, width] as they were served; raise ValueError for any others."""
        shape = (self._batch_size, width)
        if not isinstance(rows, Tensor) or tuple(rows.shape) != shape:
            raise ValueError(f"data: {what} must give a tensor {list(shape)}, got {_of(rows)}")
        try:
            storage_of(rows.dtype)
        except ValueError as error:
            raise ValueError(f"data: {what}: {error}") from None
        return rows.detach()


def _of(given: object) -> str:
    return f"shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def _normalized(
    rows: Tensor,  # [N, D], the caller's, which stay as they are
    transform: Transform | None,
) -> Tensor:
    if transform is None:
        return rows.to(torch.float32, copy=True)
    wide = rows.to(torch.float32)
    return (wide - transform.mean.to(rows.device)).mul_(transform.scale)
