"""Shuffled batches from a tensor in memory: `TensorStream`, for notebooks and tests."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations.shuffle import random_order
from sae_fast.activations.source import Transform
from sae_fast.activations.storage import as_numpy, nonfinite_rows, storage_of
from sae_fast.activations.stream import check_state, checked_transform

STATE_VERSION = 1
CPU = torch.device("cpu")
SAMPLED_ROWS = 1024
CHECKED_ROWS = 1 << 14  # at a time, on a GPU


class TensorStream:
    """Rows of `activations` [n, D] or [sequences, tokens, D], each exactly once an epoch.

    Batches are made when they are asked for, without a thread. The tensor is not copied, so it
    must not be changed. `device` is what the batches are for: from a tensor on that GPU they are
    made there, from another in memory that a GPU can be copied to from. Raises ValueError for a row
    that is not finite, unless `skip_nonfinite`.
    """

    def __init__(
        self,
        activations: Tensor,
        *,
        batch_size: int,
        seed: int = 0,
        skip_nonfinite: bool = False,
        transform: Transform | None = None,
        device: torch.device = CPU,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        place = device if activations.device == device else CPU
        self._rows = checked_rows(activations, skip_nonfinite, place)
        self._pin_memory = device.type == "cuda" and place == CPU
        self.nonfinite_rows = activations.numel() // self._rows.shape[1] - len(self._rows)
        self.batch_size = batch_size
        self.seed = seed
        self._transform = checked_transform(transform, self.d_in)
        if self._transform is not None:
            self._transform = self._transform._replace(mean=self._transform.mean.to(place))
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
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the tensor, without those dropped as non-finite."""
        return len(self._rows)

    @property
    def tokens_served(self) -> int:
        """Rows served since the very beginning, over resumes."""
        return self._tokens

    @property
    def epoch(self) -> int:
        """Epoch of the next row, from 0."""
        return self._tokens // self.rows_per_epoch

    @property
    def stall_seconds(self) -> float:
        """Seconds spent in `next_batch`: without a reader thread all of it is waiting."""
        return self._stall_seconds

    @property
    def memory_bytes(self) -> int:
        """Memory beside the tensor itself: the order of its rows and one batch."""
        return 8 * self.rows_per_epoch + 4 * self.batch_size * self.d_in

    def next_batch(self) -> Tensor:
        """Return the next rows [N, D] float32."""
        begin = time.perf_counter()
        size = self.batch_size, self.d_in
        batch = torch.empty(size, device=self._rows.device, pin_memory=self._pin_memory)
        have = 0
        while have < self.batch_size:
            epoch, served = divmod(self._tokens, self.rows_per_epoch)
            if epoch != self._order_epoch:
                order = random_order(self.rows_per_epoch, self.seed, epoch, 1)
                self._order = torch.from_numpy(order).to(self._rows.device)
                self._order_epoch = epoch
            count = min(self.batch_size - have, self.rows_per_epoch - served)
            chosen = self._order[served : served + count]
            batch[have : have + count] = torch.index_select(self._rows, 0, chosen)
            have += count
            self._tokens += count
        if self._transform is not None:
            batch.sub_(self._transform.mean).mul_(self._transform.scale)
        self._stall_seconds += time.perf_counter() - begin
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch served."""
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "tokens": self._tokens,
            "content": self._content(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; ValueError if the tensor or the seed is another."""
        check_state(state, STATE_VERSION, seed=self.seed)
        if state.get("content") != self._content():
            raise ValueError("the activations are not those of the checkpoint")
        self._tokens = int(state["tokens"])

    def close(self) -> None:
        """Nothing to release; here because streams from shards have it."""

    def _content(self) -> str:
        """Digest of shape, type and evenly spaced rows."""
        if self._digest is None:
            rows = self._rows[:: max(1, len(self._rows) // SAMPLED_ROWS)].contiguous()
            digest = hashlib.sha256(repr((tuple(self._rows.shape), rows.dtype)).encode())
            digest.update(rows.cpu().view(torch.uint8).numpy().data)
            self._digest = digest.hexdigest()[:16]
        return self._digest


def checked_rows(activations: Tensor, skip_nonfinite: bool, device: torch.device = CPU) -> Tensor:
    """Rows [n, D] of a tensor on the device, contiguous and finite."""
    if activations.ndim not in (2, 3) or activations.numel() == 0:
        raise ValueError(
            "activations must be [n, D] or [sequences, tokens, D] and not empty, "
            f"got shape {tuple(activations.shape)}"
        )
    storage = storage_of(activations.dtype)
    rows = activations.detach().to(device, storage.torch_dtype)
    rows = rows.reshape(-1, rows.shape[-1]).contiguous()
    if rows.is_cuda:
        parts = [~torch.isfinite(part).all(dim=1) for part in torch.split(rows, CHECKED_ROWS)]
        bad = torch.cat(parts).nonzero().flatten()
    else:
        bad = torch.from_numpy(nonfinite_rows(as_numpy(rows, storage), storage))
    if bad.numel() == 0:
        return rows
    if not skip_nonfinite:
        raise ValueError(f"activations: row {int(bad[0])} holds NaN or Inf")
    keep = torch.ones(len(rows), dtype=torch.bool, device=device)
    keep[bad] = False
    if not keep.any():
        raise ValueError("activations: no row is finite")
    return rows[keep]
