"""What a training loop may ask of its supply of activations, be it shards on disk or a tensor.

Rows come for ever, in batches of exactly `batch_size`: a batch that begins at the end of one epoch
is completed with the first rows of the next, so no row is lost and no short batch is served. When
to stop is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae_fast.activations.columns import Column
from sae_fast.activations.targets import TARGETS
from sae_fast.json_files import is_integer, shown
from sae_fast.ops import gather_rows_


class Transform(NamedTuple):
    """x -> (x - mean) * scale, applied to every row before it is served."""

    mean: Tensor  # [D]
    scale: float


class Rows(NamedTuple):
    """A batch with what is known of each of its rows."""

    x: Tensor  # [N, D] float32
    columns: dict[str, Tensor]  # each [N], by name; the targets [N, d_out]

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same with every tensor changed."""
        return Rows(change(self.x), {name: change(column) for name, column in self.columns.items()})


def empty_rows(
    count: int,
    d_in: int,
    columns: Mapping[str, Column],
    device: torch.device | None = None,
    pin_memory: bool = False,
) -> Rows:
    """Room for a batch."""
    return Rows(
        torch.empty(count, d_in, dtype=torch.float32, device=device, pin_memory=pin_memory),
        {
            name: torch.empty(
                count, *column.row_shape, dtype=column.dtype, device=device, pin_memory=pin_memory
            )
            for name, column in columns.items()
        },
    )


def gather(
    memory: Tensor,  # [capacity, D], as stored
    order: Tensor,  # [N] int64
    out: Tensor,  # [M, D] float32
    places: slice | Tensor,  # N rows of `out`
    transform: Transform | None,
) -> None:
    """Put these rows in those places, widened to float32 and transformed."""
    mean, scale = (None, 1.0) if transform is None else transform
    if isinstance(places, slice):
        gather_rows_(out[places], memory, order, mean=mean, scale=scale)
    else:
        gather_rows_(out, memory, order, places=places.to(out.device), mean=mean, scale=scale)


def take(
    stored: Rows,  # as stored: x [capacity, D], the columns [capacity]
    order: Tensor,  # [N] int64
    out: Rows,
    places: slice | Tensor,  # N rows of `out`
    transform: Transform | None,
    target_transform: Transform | None,
) -> None:
    """Put these rows with their columns in those places; targets are widened and transformed."""
    for name, column in out.columns.items():
        if name == TARGETS and column.ndim == 2:
            gather(stored.columns[name], order, column, places, target_transform)
        else:
            column[places] = torch.index_select(stored.columns[name], 0, order)
    gather(stored.x, order, out.x, places, transform)


class ActivationSource(Protocol):
    """An endless, shuffled, resumable supply of batches."""

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
    def epoch(self) -> int:
        """Epoch of the next row, from 0."""

    @property
    def stall_seconds(self) -> float:
        """Seconds for which `next_batch` has kept its callers waiting."""

    def next_batch(self) -> Tensor:
        """Return the next rows [N, D] float32, N = batch_size; the caller owns the tensor."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch served: a small dict that `json` can write."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken; ValueError if the data is not the same."""

    def close(self) -> None:
        """Release files and threads; the source cannot be used afterwards."""


class LabelledSource(ActivationSource, Protocol):
    """A source that has columns to go with its rows; both streams of this package are."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """What is known of each column."""

    def next_rows(self) -> Rows:
        """Return what `next_batch` would, with the columns."""


def check_state(
    state: Mapping[str, Any],
    version: int,
    settings: Mapping[str, int],
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Raise ValueError unless a saved position has this version, these settings and this identity.

    The identity is what the rows depend on besides, where a source knows it by names.
    """
    if state.get("version") != version:
        raise ValueError(f"data position has version {state.get('version')}, expected {version}")
    if not isinstance(state.get("identity", {}), dict):
        raise ValueError("data position: identity must be a JSON object")
    state = {"whole_sequences": False, **state}  # not in positions that are older than the option
    for name, value in settings.items():
        if state.get(name) != value:
            raise ValueError(
                f"{name} is {value}, but the checkpoint was made with {state.get(name)}"
            )
    if identity is None:
        return
    before = state.get("identity", {})
    changed = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
    if changed:
        raise ValueError(
            f"the activations are not those of the checkpoint: {', '.join(changed)} changed"
        )


def saved_counts(values: Any, *names: str) -> list[int]:
    """Return these numbers of a saved position; raise ValueError unless they are counts."""
    if not isinstance(values, dict):
        raise ValueError(f"data position: must have {', '.join(names)}, got {shown(values)}")
    for name in names:
        if not is_integer(values.get(name)):
            raise ValueError(
                f"data position: {name} must be a whole number of at least 0, "
                f"got {shown(values.get(name))}"
            )
    return [values[name] for name in names]


def measure_rows_per_second(source: ActivationSource, rows: int) -> float:
    """Rows a second that `source` sustains over `rows` rows, after one batch of warm-up."""
    source.next_batch()
    first = source.tokens_served
    start = time.perf_counter()
    while source.tokens_served - first < rows:
        source.next_batch()
    return (source.tokens_served - first) / (time.perf_counter() - start)
