"""A caller's own source of activations: every batch is checked, copied and normalised.

The engine checks tensors and shards when it opens them. A source serves rows that were not seen
before, so each batch is checked when it is taken. Rows that are not finite make a loss that is not,
which ends the training with the step named. What the source serves stays as it is: it may keep
views of its own data, or use one buffer for all batches.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations import TARGETS, ActivationSource, Column, Rows, Transform
from sae_fast.activations.columns import NO_LABEL
from sae_fast.activations.storage import storage_of
from sae_fast.json_files import is_integer, shown

_MEMBERS = (
    *("d_in", "rows_per_epoch", "tokens_served", "stall_seconds"),
    *("next_batch", "state_dict", "load_state_dict", "close"),
)


class GivenSource:
    """A source with a transform applied to what it serves, and one to the targets.

    Args:
        source: the caller's.
        batch_size: rows that each batch must have.
        transform: of the rows.
        target_transform: of a transcoder's targets.

    Raises:
        ValueError: in one line, for what is no source, and for a batch that is not float [N, D] or
            whose columns do not fit.
    """

    def __init__(
        self,
        source: ActivationSource,
        batch_size: int,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        if missing := [name for name in _MEMBERS if not hasattr(source, name)]:
            raise ValueError(
                f"data: a source of activations has {', '.join(_MEMBERS)}; "
                f"{type(source).__name__} lacks {', '.join(missing)}"
            )
        for name in ("d_in", "rows_per_epoch"):
            value = getattr(source, name)
            if not is_integer(value) or value < 1:
                raise ValueError(f"data: {name} must be a whole number from 1, got {shown(value)}")
        served = getattr(source, "batch_size", batch_size)
        if served != batch_size:
            raise ValueError(
                f"batch_size must be {batch_size}, got a source that serves {shown(served)}"
            )
        self._source: Any = source
        self._batch_size = batch_size
        self._transform = transform
        self._target_transform = target_transform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def next_batch(self) -> Tensor:
        """Return the source's next rows [N, D] float32, normalised, in memory of their own."""
        rows = self._checked("next_batch", self._source.next_batch(), self._source.d_in)
        return _normalized(rows, self._transform)

    def next_rows(self) -> Rows:
        """Return the next rows with their columns, where the source has any."""
        if not hasattr(self._source, "next_rows"):
            return Rows(self.next_batch(), {})
        served = self._source.next_rows()
        if not isinstance(served, tuple) or len(served) != 2 or not isinstance(served[1], dict):
            raise ValueError(
                "data: next_rows must give rows and a dictionary of columns, "
                f"got {type(served).__name__}"
            )
        x = _normalized(self._checked("next_rows", served[0], self._source.d_in), self._transform)
        known: dict[str, Column] = getattr(self._source, "columns", {})
        if missing := [name for name in known if name not in served[1]]:
            raise ValueError(f"data: next_rows has not served the columns {', '.join(missing)}")
        return Rows(x, {name: self._column(column, served[1]) for name, column in known.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the source's position; a copy, as the source may go on before it is saved."""
        state: dict[str, Any] = copy.deepcopy(self._source.state_dict())
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"data: state_dict must give what json can write: {error}") from None
        return state

    def _column(self, column: Column, served: dict[str, Any]) -> Tensor:
        """The numbers of a column, in memory of their own."""
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
        """The rows [N, width] as they were served; raises ValueError for any others."""
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
