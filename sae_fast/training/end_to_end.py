"""Training through the rest of the model: loss_fn ce and kl, and the batches that they need.

The reconstruction takes the place of the activations at the hook point, the model continues from
there, and its loss is the autoencoder's (arXiv:2405.12241). The model itself is not trained.

    ce  the cross-entropy of the text: of the next token, or with a masked model of masked tokens
    kl  KL(p ‖ q), p the model's own prediction, q that with the reconstruction; mean over tokens
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sae_fast.activations import Column, Rows
from sae_fast.activations.capture import HookedModel, HookPoint, TokenBatches
from sae_fast.activations.capture.sequences import TokenBatch, saved_cursor
from sae_fast.activations.source import BatchSource, check_state, saved_counts
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.training.model_stream import HookRows

TOKENS, MASK, KEPT, LABELS = "tokens", "mask", "kept", "labels"
MASKED_SHARE = 0.15  # of the tokens that a masked model is to predict, as BERT was trained
STATE_VERSION = 1
_NO_LABEL = -100


class SequenceStream(BatchSource[HookRows]):
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
        identity: what the rows depend on, told apart when a position is loaded.
        seed: of what is masked.
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
        self._max_tokens = max_tokens
        self._rows_per_pass = rows_per_pass or max_tokens
        self._tokens_served = 0
        self._stall_seconds = 0.0
        self._model = model
        self._batches = batches
        self._identity = dict(identity)
        self._seed = seed
        self._masked_token = masked_token
        self._epoch = 0
        self._cursor = batches.start
        self._iterator: Generator[TokenBatch, None, None] | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Rows that are taken, which count as one pass over the data."""
        return self._max_tokens

    @property
    def tokens_served(self) -> int:
        """Rows of each hook point served since the very beginning, over resumes."""
        return self._tokens_served

    @property
    def stall_seconds(self) -> float:
        """Seconds that `next_rows` has taken: rows are made in the thread that asks for them."""
        return self._stall_seconds

    @property
    def passes(self) -> float:
        """Passes over the documents."""
        return float(self._epoch) + min(1.0, self._cursor.rows / self._rows_per_pass)

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
        tokens, labels = self._masked(batch)
        mask = torch.ones_like(batch.kept) if batch.mask is None else batch.mask
        device = next(self._model.network.parameters()).device
        read = {TOKENS: tokens, MASK: mask, KEPT: batch.kept, LABELS: labels}
        columns = {name: column.to(device) for name, column in read.items()}
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

    def _masked(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, T] as the model reads them, and its labels, -100: none."""
        nothing = torch.full_like(batch.tokens, _NO_LABEL)
        if self._masked_token is None:
            return batch.tokens, nothing
        special = torch.from_numpy(self._batches.special.excluded)
        text = ~torch.isin(batch.tokens, special)
        if batch.mask is not None:
            text &= batch.mask
        entropy = np.random.SeedSequence([self._seed, self._epoch, batch.cursor.batch])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        chosen = text & (torch.rand(batch.tokens.shape, generator=generator) < MASKED_SHARE)
        tokens = torch.where(chosen, self._masked_token, batch.tokens)
        return tokens, torch.where(chosen, batch.tokens, nothing)


class DownstreamModel:
    """The loss of a model with a reconstruction at one of its hook points.

    Args:
        network: a model with its head.
        hook: where.
        loss_fn: ce or kl.
        causal: whether ce is of the next token, or of `labels`.
    """

    def __init__(self, network: Any, hook: HookPoint, loss_fn: str, *, causal: bool) -> None:
        self._network = network
        self._module = network.get_submodule(hook.module)
        self._loss_fn = loss_fn
        self._causal = causal

    def loss(
        self,
        x_hat: Tensor,  # [n, D], in the units of the activations
        columns: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the loss, 0-d, with a gradient to x̂."""
        logits = self._logits(columns, x_hat)
        if self._loss_fn == "ce":
            return self._cross_entropy(logits, columns)
        with torch.no_grad():
            wanted = self._logits(columns, None)
        kept = columns[MASK]
        return functional.kl_div(
            logits[kept].log_softmax(-1),
            wanted[kept].log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )

    @torch.no_grad()
    def evaluate(self, sae: SparseAutoencoder, batches: Sequence[Rows]) -> dict[str, float]:
        """Return the mean loss over batches with the reconstruction, and of ce also without it."""
        spliced = own = 0.0
        for rows in batches:
            spliced += float(self.loss(sae(rows.x), rows.columns))
            if self._loss_fn == "ce":
                own += float(self._cross_entropy(self._logits(rows.columns, None), rows.columns))
        found = {f"heldout_{self._loss_fn}": spliced / len(batches)}
        return found | ({"heldout_ce_model": own / len(batches)} if self._loss_fn == "ce" else {})

    def _logits(self, columns: Mapping[str, Tensor], x_hat: Tensor | None) -> Tensor:
        """Return the model's logits [B, T, words] float32, with x̂ in place of the activations."""
        handle = None
        if x_hat is not None:
            kept, rows = columns[KEPT], x_hat

            def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                is_tuple = isinstance(output, tuple)
                own = output[0] if is_tuple else output
                places = kept.view(own.shape[:-1])
                changed = own.detach().clone()
                changed[places] = rows.to(own.dtype)
                return (changed, *output[1:]) if is_tuple else changed

            handle = self._module.register_forward_hook(replace)
        try:
            mask = columns[MASK]
            logits: Tensor = self._network(
                input_ids=columns[TOKENS],
                attention_mask=None if bool(mask.all()) else mask.to(torch.int64),
                **({"use_cache": False} if hasattr(self._network.config, "use_cache") else {}),
            ).logits
        finally:
            if handle is not None:
                handle.remove()
        return logits.float()

    def _cross_entropy(self, logits: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        tokens, mask, labels = columns[TOKENS], columns[MASK], columns[LABELS]
        if self._causal:
            labels = tokens[:, 1:].masked_fill(~mask[:, 1:], _NO_LABEL)
            logits = logits[:, :-1]
        flat = labels.flatten()
        # Of a batch in which nothing is masked the mean would be 0 / 0.
        total = functional.cross_entropy(
            logits.flatten(0, 1), flat, ignore_index=_NO_LABEL, reduction="sum"
        )
        return total / (flat != _NO_LABEL).sum().clamp_min(1)


@dataclass(frozen=True)
class Downstream:
    """The model that continues from the reconstruction, for loss_fn ce and kl.

    Attributes:
        model: from the hook point on; None: the loss is computed on the activations.
        heldout: batches that its loss is measured on.
    """

    model: DownstreamModel | None = None
    heldout: Sequence[Rows] = ()

    def evaluate(self, sae: SparseAutoencoder) -> dict[str, float]:
        """Return the model's loss with the reconstructions of the held-out batches, if any."""
        if self.model is None or not self.heldout:
            return {}
        return self.model.evaluate(sae, self.heldout)


def checked_downstream(downstream: Downstream | None, sae: SAEConfig) -> Downstream:
    """Return `downstream`, or a no-op if None; raise ValueError if loss_fn needs one."""
    if sae.is_end_to_end and downstream is None:
        raise ValueError(
            f"loss_fn {sae.loss_fn} needs the model itself, not its activations alone: "
            "python -m sae_fast.train MODEL DATASET"
        )
    return Downstream() if downstream is None else downstream
