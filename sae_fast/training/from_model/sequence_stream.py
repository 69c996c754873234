"""Batches of whole sequences and their activations, for a loss that the model itself computes."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from sae_fast.activations import Column, Rows
from sae_fast.activations.capture import HookedModel, TokenBatches
from sae_fast.activations.capture.sequences import TokenBatch, saved_cursor
from sae_fast.activations.source import check_state, saved_counts
from sae_fast.evaluation.language_model import (
    KEPT,
    LABELS,
    MASK,
    TOKENS,
    masked_tokens,
    read_columns,
)
from sae_fast.training.from_model.model_stream import DocumentStream, HookRows

STATE_VERSION = 1


class SequenceStream(DocumentStream):
    """Batches of whole sequences with their activations, in the order of the documents.

    What `next_rows` gives for each hook point are the activations [n, D] of the tokens that are
    kept, and as columns what the model read: `tokens`, `mask`, `kept` and `labels`, each [B, T]. A
    batch is one forward pass; of an encoder it has fewer rows than B·T. Documents begin again when
    they end. With `masked_token` a share of the tokens is replaced by it, drawn from the seed and
    the number of the batch, before the model reads them; `labels` are what stood there.

    Args:
        model: with the hook points.
        batches: what it reads.
        max_tokens: rows that count as one pass over the data.
        identity: what the rows depend on; a position of another identity is refused.
        seed: of the choice of masked tokens.
        masked_token: of a masked model whose loss is ce; None: nothing is masked.
        rows_per_pass: how many all documents have, at least about; default: `max_tokens`.
    """

    columns: Mapping[str, Column] = {
        name: Column(name, torch.int64) for name in (TOKENS, MASK, KEPT, LABELS)
    }

    def __init__(
        self,
        model: HookedModel,
        batches: TokenBatches,
        *,
        max_tokens: int,
        identity: Mapping[str, Any],
        seed: int,
        masked_token: int | None = None,
        rows_per_pass: int | None = None,
    ) -> None:
        super().__init__(max_tokens, rows_per_pass)
        self._model = model
        self._batches = batches
        self._identity = dict(identity)
        self._seed = seed
        self._masked_token = masked_token
        self._epoch = 0
        self._cursor = batches.start
        self._iterator: Generator[TokenBatch, None, None] | None = None

    @property
    def passes(self) -> float:
        """Passes over the documents."""
        return self._passes(self._epoch, self._cursor.rows)

    def next_rows(self) -> HookRows:
        """Return the next sequences, for every hook point by its name."""
        begin = time.perf_counter()
        batch = self._next_batch()
        rows = self.rows_of(batch)
        self._cursor = batch.following
        self._tokens_served += int(batch.kept.sum())
        self._stall_seconds += time.perf_counter() - begin
        return rows

    def rows_of(self, batch: TokenBatch) -> HookRows:
        """Compute the activations of a batch of tokens; return them with what the model read."""
        seeds = (self._seed, self._epoch)
        special = torch.from_numpy(self._batches.special.excluded)
        tokens, labels = masked_tokens(batch, special, self._masked_token, seeds)
        device = next(self._model.network.parameters()).device
        columns = read_columns(batch, tokens, labels, device)
        found = self._model.activations(
            columns[TOKENS], None if batch.mask is None else columns[MASK]
        )
        return {
            name: Rows(activations[columns[KEPT]].float(), dict(columns))
            for name, activations in found.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch served."""
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "identity": self._identity,
            "epoch": self._epoch,
            "cursor": asdict(self._cursor),
            "tokens": self.tokens_served,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ValueError where model, text or seed are others."""
        check_state(state, STATE_VERSION, {"seed": self._seed}, self._identity)
        epoch, tokens = saved_counts(state, "epoch", "tokens")
        cursor = saved_cursor(state.get("cursor"))
        self.close()
        self._epoch, self._cursor, self._tokens_served = epoch, cursor, tokens

    def close(self) -> None:
        """Release what reads the documents."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _next_batch(self) -> TokenBatch:
        """Return the next batch with a token that is kept."""
        for _ in range(2):
            if self._iterator is None:
                self._iterator = self._batches.iterate(self._cursor)
            for batch in self._iterator:
                if bool(batch.kept.any()):
                    return batch
            self._iterator = None
            self._epoch, self._cursor = self._epoch + 1, self._batches.start
        raise ValueError("dataset: no document has a token that is kept")
