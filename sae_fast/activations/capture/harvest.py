"""From a model and its batches of tokens to rows of activations, without files.

The shards of a capture and a training straight from a model are both made of these rows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from sae_fast.activations.background import prefetch
from sae_fast.activations.capture.images import ImageBatches
from sae_fast.activations.capture.language_model import HookedModel
from sae_fast.activations.capture.loading import device_of
from sae_fast.activations.capture.sequences import TokenBatch, TokenBatches, TokenCursor

AHEAD = 4  # batches that are tokenised ahead of the model


@runtime_checkable
class _HasEmbeddings(Protocol):
    """A PreTrainedModel, as far as it matters here."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of the token embeddings."""


@dataclass(frozen=True)
class Harvest:
    """The rows of one batch.

    Attributes:
        activations: by name of the hook point, [n, D] as the model has them, on its device.
        token_ids: [n] int32.
        doc_id: [n] int32, number of the document in the dataset.
        position: [n] int32, place in the document.
        batch: what the model read; rows are its kept tokens in order.
    """

    activations: dict[str, Tensor]
    token_ids: Tensor
    doc_id: Tensor
    position: Tensor
    batch: TokenBatch

    @classmethod
    def of(
        cls,
        batch: TokenBatch,
        kept: Tensor,  # [B, T] bool, n of them True
        activations: dict[str, Tensor],
    ) -> Harvest:
        """Return the rows [n, D] of a batch with what is known of them."""
        text = batch.tokens[kept].int(), batch.doc_id[kept], batch.position[kept]
        return cls(activations, *text, batch)

    def __len__(self) -> int:
        return len(self.token_ids)


class Harvester:
    """The activations of all batches, one after another.

    Of several ranks each runs the batches whose number, modulo the number of ranks, is its own.
    Together they give the rows that one rank alone gives, to the bit, because the batches are the
    same.

    Args:
        model: with the hook points.
        batches: what it reads.
        max_tokens: rows of all ranks together after which it ends; default: all.
        rank: which rank this is.
        world_size: how many ranks there are.
    """

    def __init__(
        self,
        model: HookedModel,
        batches: TokenBatches | ImageBatches,
        *,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")
        self.model = model
        self.batches = batches
        self.max_tokens = max_tokens
        self._vocabulary = _vocabulary(model.network)
        self._rank = rank
        self._world_size = world_size
        self.reached = batches.start
        """Where the next batch begins, after the last one that was looked at."""

    def close(self) -> None:
        """Release what it keeps, which is nothing here."""

    def __iter__(self) -> Iterator[Harvest]:
        return self.harvest()

    def harvest(self, cursor: TokenCursor | None = None) -> Generator[Harvest, None, None]:
        """Run the model from a cursor on; a batch without a kept token is left out.

        Raises ValueError for a token that the model does not know.
        """
        with closing(self.kept_batches(cursor)) as batches:
            for batch, kept in batches:
                if batch.cursor.batch % self._world_size == self._rank and bool(kept.any()):
                    yield Harvest.of(batch, kept, self.run(batch, kept))

    def kept_batches(
        self, cursor: TokenCursor | None
    ) -> Generator[tuple[TokenBatch, Tensor], None, None]:
        """Yield the batches from a cursor on, each with a mask [B, T] of its tokens to keep."""
        made = prefetch(
            self.batches.iterate(cursor), AHEAD, name="tokens", does="tokenises the documents"
        )
        with closing(made) as batches:
            for batch in batches:
                room = None if self.max_tokens is None else self.max_tokens - batch.cursor.rows
                if room is not None and room <= 0:
                    return
                self.reached = batch.following
                yield batch, _first(batch.kept, room)

    def run(
        self,
        batch: TokenBatch,
        kept: Tensor,  # [B, T] bool
    ) -> dict[str, Tensor]:
        """Run the model on a batch; return the kept rows [n, D] of each hook point by its name."""
        device = device_of(self.model.network)
        source = None if batch.source is None else batch.source.to(device)
        read = [batch.tokens, *([] if batch.source is None else [batch.source.tokens])]
        pixels = None if batch.pixels is None else batch.pixels.to(device)
        highest = max(int(tokens.max()) for tokens in read)
        if self._vocabulary is not None and highest >= self._vocabulary:
            raise ValueError(
                f"model: its vocabulary has {self._vocabulary:,} tokens, the tokenizer gave token "
                f"{highest:,}: is it the tokenizer of another model?"
            )
        mask = None if batch.mask is None else batch.mask.to(device)
        activations = self.model.activations(batch.tokens.to(device), mask, source, pixels)
        # Found on the host: a mask on a GPU would have the host wait for its count.
        places = None if bool(kept.all()) else kept.flatten().nonzero().squeeze(1).to(device)
        flat = {name: rows.flatten(0, 1) for name, rows in activations.items()}
        return {
            name: rows if places is None else rows.index_select(0, places.to(rows.device))
            for name, rows in flat.items()
        }


def _vocabulary(network: nn.Module) -> int | None:
    """Return the number of tokens that a model knows; None: it does not say."""
    table = network.get_input_embeddings() if isinstance(network, _HasEmbeddings) else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _first(kept: Tensor, room: int | None) -> Tensor:
    """Return a mask [B, T] of the first `room` kept places."""
    if room is None or int(kept.sum()) <= room:
        return kept
    return kept & (kept.flatten().cumsum(0).view_as(kept) <= room)
