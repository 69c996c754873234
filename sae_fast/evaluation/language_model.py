"""Losses of a language model with reconstructions in the place of its activations.

definitions.py has the formula of each metric. A causal model predicts each next token; a masked one
predicts tokens that were replaced by its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sae_fast.activations.capture import HookedModel, HookPoint
from sae_fast.activations.capture.sequences import TokenBatch, TokenBatches
from sae_fast.activations.capture.splicing import Change, hooked
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.evaluation.core import CorePass, Section
from sae_fast.evaluation.text_rows import DOCUMENT

# Columns of a batch of sequences: what the model read, each [B, T].
TOKENS, MASK, KEPT, LABELS = "tokens", "mask", "kept", "labels"
NO_LABEL = -100
MASKED_SHARE = 0.15  # of the tokens, for a masked model to predict, as BERT was trained

Columns = Mapping[str, Tensor]


class SplicedModel:
    """A model whose activations at one hook point others can take the place of.

    Args:
        network: a model with its head.
        hook: where.
        causal: whether it predicts the next token, or `labels`.
    """

    def __init__(self, network: Any, hook: HookPoint, *, causal: bool) -> None:
        self._network = network
        self._hook = hook
        self._causal = causal

    def logits(
        self,
        columns: Columns,
        x_hat: Tensor | None,  # [n, D], for the tokens that are kept
    ) -> Tensor:
        """Return the logits [B, T, words] float32, with x̂ in place of the activations if given."""
        kept = columns[KEPT]

        def replace(activations: Tensor) -> Tensor:
            changed = activations.detach().clone()
            assert x_hat is not None
            changed[kept.view(activations.shape[:-1])] = x_hat.to(activations.dtype)
            return changed

        return self.run(columns, *([] if x_hat is None else [(self._hook, replace)]))

    def observed(self, columns: Columns, *hooks: HookPoint) -> tuple[Tensor, list[Tensor]]:
        """Return the model's own logits [B, T, words], and its activations [n, D] at hook points.

        The activations are of the tokens that are kept, float32.
        """
        kept, found = columns[KEPT], {}

        def keeper(hook: HookPoint) -> Change:
            def keep(activations: Tensor) -> None:
                rows = activations.detach()[kept.view(activations.shape[:-1])]
                found[hook.name] = rows.float()

            return keep

        logits = self.run(columns, *((hook, keeper(hook)) for hook in hooks))
        return logits, [found[hook.name] for hook in hooks]

    def run(self, columns: Columns, *changes: tuple[HookPoint, Change]) -> Tensor:
        """Return the logits [B, T, words] float32 with activations changed at hook points."""
        mask = columns[MASK]
        with ExitStack() as stack:
            for hook, change in changes:
                stack.enter_context(hooked(self._network, hook, change))
            logits: Tensor = self._network(
                input_ids=columns[TOKENS],
                attention_mask=None if bool(mask.all()) else mask.to(torch.int64),
                **({"use_cache": False} if hasattr(self._network.config, "use_cache") else {}),
            ).logits
        return logits.float()

    def summed_cross_entropy(
        self,
        logits: Tensor,  # [B, T, words]
        columns: Columns,
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the predicted tokens, a sum, and their number, 0-d both."""
        logits, labels = self._predictions(logits, columns)
        flat = labels.flatten()
        total = functional.cross_entropy(
            logits.flatten(0, 1), flat, ignore_index=NO_LABEL, reduction="sum"
        )
        return total, (flat != NO_LABEL).sum()

    def sequence_cross_entropies(
        self,
        logits: Tensor,  # [B, T, words]
        columns: Columns,
    ) -> Tensor:
        """Return the cross-entropy of the predicted tokens of each sequence, sums, [B] float64."""
        logits, labels = self._predictions(logits, columns)
        each = functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=NO_LABEL, reduction="none"
        )
        return each.sum(1, dtype=torch.float64)

    def _predictions(
        self,
        logits: Tensor,  # [B, T, words]
        columns: Columns,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of predictions, and the tokens that they are to predict."""
        if not self._causal:
            return logits, columns[LABELS]
        tokens, mask = columns[TOKENS], columns[MASK]
        return logits[:, :-1], tokens[:, 1:].masked_fill(~mask[:, 1:], NO_LABEL)


def masked_tokens(
    batch: TokenBatch,
    special: Tensor,  # [n], tokens that are not text
    masked_token: int | None,
    seeds: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Return the tokens [B, T] as a model reads them, and its labels, -100: none.

    Args:
        batch: of sequences.
        special: never masked.
        masked_token: takes the place of a share of the tokens; None: of none.
        seeds: of the choice.
    """
    nothing = torch.full_like(batch.tokens, NO_LABEL)
    if masked_token is None:
        return batch.tokens, nothing
    text = ~torch.isin(batch.tokens, special)
    if batch.mask is not None:
        text &= batch.mask
    entropy = np.random.SeedSequence([*seeds, batch.cursor.batch])
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
    chosen = text & (torch.rand(batch.tokens.shape, generator=generator) < MASKED_SHARE)
    tokens = torch.where(chosen, masked_token, batch.tokens)
    return tokens, torch.where(chosen, batch.tokens, nothing)


def read_columns(
    batch: TokenBatch, tokens: Tensor, labels: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """Return what a model reads of a batch: tokens, mask, kept and labels, [B, T] each."""
    mask = torch.ones_like(batch.kept) if batch.mask is None else batch.mask
    read = {TOKENS: tokens, MASK: mask, KEPT: batch.kept, LABELS: labels}
    return {name: column.to(device) for name, column in read.items()}


class ModelText(NamedTuple):
    """A model, where a dictionary is in it, and what it reads.

    Attributes:
        network: a model with its head, in evaluation mode.
        source: the hook point that the dictionary reads.
        target: the hook point that a transcoder writes; None: the source.
        causal: whether the model predicts the next token, or `labels`.
        batches: gives the columns of each batch anew whenever it is called; with DOCUMENT, the
            numbers of the tokens' documents [B, T], documents follow one another.
        name: of the model.
        ctx_len: tokens of a sequence, at most.
    """

    network: Any
    source: HookPoint
    target: HookPoint | None
    causal: bool
    batches: Callable[[], Iterable[Columns]]
    name: str = ""
    ctx_len: int = 0


def token_columns(
    batches: TokenBatches,
    masked_token: int | None,
    seed: int,
    max_tokens: int,
    device: torch.device,
) -> Iterator[Columns]:
    """Yield the columns of batches, until `max_tokens` tokens or more are kept.

    Args:
        batches: of tokens.
        masked_token: of a masked model; None: of a causal one.
        seed: of the choice of masked tokens.
        max_tokens: after which the next batch is left out.
        device: of the columns.
    """
    special = torch.from_numpy(batches.special.excluded)
    kept = 0
    for batch in batches.iterate():
        if kept >= max_tokens:
            return
        kept += int(batch.kept.sum())
        tokens, labels = masked_tokens(batch, special, masked_token, (seed, 0))
        columns = read_columns(batch, tokens, labels, device)
        yield {**columns, DOCUMENT: batch.doc_id}


@torch.no_grad()
def language_model_metrics(
    sae: SparseAutoencoder,
    text: ModelText,
    core: CorePass | None = None,
    report: Callable[[int], object] | None = None,
) -> dict[str, Section]:
    """Return what a model loses with a dictionary's reconstructions, by group and name.

    The text is read twice: for the mean of the activations, and for the losses.

    Args:
        sae: the dictionary, in evaluation mode.
        text: the model and what it reads.
        core: is given the activations of the first reading.
        report: called with the tokens of each batch that was read.

    Raises ValueError where the text has no token to predict.
    """
    mean, n_rows = torch.zeros(sae.config.target_width, dtype=torch.float64), 0
    with sae.kept_copies():
        for columns in text.batches():
            x, y = _rows_of(text, columns)
            if len(x) and core is not None:
                document = columns.get(DOCUMENT)
                core.add(x, y, None if document is None else document[columns[KEPT]])
            outputs = x if y is None else y
            mean += outputs.sum(0, dtype=torch.float64).cpu()
            n_rows += len(x)
            if report is not None:
                report(columns[TOKENS].numel())
        if n_rows == 0:
            raise ValueError("the text has no token whose activations are kept")
        return _losses(sae, text, (mean / n_rows).float(), report)


def _rows_of(text: ModelText, columns: Columns) -> tuple[Tensor, Tensor | None]:
    """Return the activations [n, D] of the tokens that are kept, and a transcoder's targets."""
    hooks = [text.source, *([] if text.target is None else [text.target])]
    mask = columns[MASK]
    found = HookedModel(text.network, hooks).activations(
        columns[TOKENS], None if bool(mask.all()) else mask
    )
    sides = [found[hook.name][columns[KEPT]].float() for hook in hooks]
    return sides[0], None if text.target is None else sides[1]


class _Sums(NamedTuple):
    """Sums over tokens with one kind of activations."""

    cross_entropy: Tensor  # 0-d float64
    divergence: Tensor  # 0-d float64


def _losses(
    sae: SparseAutoencoder,
    text: ModelText,
    mean: Tensor,  # [D]
    report: Callable[[int], object] | None,
) -> dict[str, Section]:
    model = SplicedModel(text.network, text.target or text.source, causal=text.causal)
    names = ("without", "sae", "ablation", "mean_ablation")
    sums = {name: _Sums(*torch.zeros(2, dtype=torch.float64)) for name in names}
    predicted = tokens = 0
    for columns in text.batches():
        own, (x,) = model.observed(columns, text.source)
        x_hat = sae(x)
        mask = columns[MASK]
        log_own = own[mask].log_softmax(-1)
        for name in names:
            if name == "without":
                logits = own
            else:
                instead = {
                    "sae": x_hat,
                    "ablation": torch.zeros_like(x_hat),
                    "mean_ablation": mean.to(x_hat.device).expand_as(x_hat),
                }[name]
                logits = model.logits(columns, instead)
                log_other = logits[mask].log_softmax(-1)
                apart = (log_own.exp() * (log_own - log_other)).sum(-1)
                sums[name].divergence.add_(apart.sum(dtype=torch.float64).cpu())
            total, count = model.summed_cross_entropy(logits, columns)
            sums[name].cross_entropy.add_(total.double().cpu())
        predicted += int(count)
        tokens += int(mask.sum())
        if report is not None:
            report(mask.numel())
    if predicted == 0:
        raise ValueError("the text has no token that the model predicts")
    return _sections(sums, predicted, tokens)


def _sections(sums: Mapping[str, _Sums], predicted: int, tokens: int) -> dict[str, Section]:
    ce = {name: float(value.cross_entropy) / predicted for name, value in sums.items()}
    kl = {name: float(value.divergence) / tokens for name, value in sums.items()}
    performance = {
        "ce_loss_without_sae": ce["without"],
        "ce_loss_with_sae": ce["sae"],
        "ce_loss_increase": ce["sae"] - ce["without"],
    }
    behavior = {"kl_div_with_sae": kl["sae"]}
    for name in ("ablation", "mean_ablation"):
        ending = "" if name == "ablation" else f"_{name}"
        performance[f"ce_loss_with_{name}"] = ce[name]
        lost = ce[name] - ce["without"]
        performance[f"ce_loss_score{ending}"] = _ratio(ce[name] - ce["sae"], lost)
        behavior[f"kl_div_with_{name}"] = kl[name]
        behavior[f"kl_div_score{ending}"] = _ratio(kl[name] - kl["sae"], kl[name])
    return {
        "model_behavior_preservation": behavior,
        "model_performance_preservation": performance,
        "token_stats": {
            "total_tokens_eval_reconstruction": tokens,
            "predicted_tokens": predicted,
        },
    }


def _ratio(part: float, whole: float) -> float:
    """Return a quotient; NaN where the whole is 0, as of an ablation that changes nothing."""
    return part / whole if whole else float("nan")


class SplicedLosses:
    """Losses of a model with reconstructions in it, of a dictionary that is being trained.

    The activations and the losses that do not depend on the dictionary are computed once.

    Args:
        text: the model and what it reads; both are kept, with the activations, in memory.
    """

    def __init__(self, text: ModelText) -> None:
        self._text = text
        self._model = SplicedModel(text.network, text.target or text.source, causal=text.causal)
        self._batches: list[tuple[Columns, Tensor]] = []  # with the activations [n, D]
        self._own = self._ablated = 0.0  # cross-entropies of a token
        self._predicted = 0

    @torch.no_grad()
    def evaluate(self, sae: SparseAutoencoder) -> dict[str, float]:
        """Return the model's losses by their names in metrics, but for `heldout_`.

        ce, ce_model, ce_increase and ce_score are ce_loss_with_sae, ce_loss_without_sae,
        ce_loss_increase and ce_loss_score of definitions.py.

        Raises ValueError where the text has no token to predict.
        """
        if not self._predicted:
            self._read()
        spliced = 0.0
        with sae.kept_copies():
            for columns, x in self._batches:
                spliced += self._sum(self._model.logits(columns, sae(x)), columns)
        ce = spliced / self._predicted
        return {
            "ce": ce,
            "ce_model": self._own,
            "ce_increase": ce - self._own,
            "ce_score": _ratio(self._ablated - ce, self._ablated - self._own),
        }

    def _read(self) -> None:
        own = ablated = 0.0
        predicted = 0
        batches: list[tuple[Columns, Tensor]] = []
        for columns in self._text.batches():
            places = [self._text.source, *filter(None, [self._text.target])]
            logits, (x, *others) = self._model.observed(columns, *places)
            batches.append((columns, x))
            own += self._sum(logits, columns)
            nothing = torch.zeros_like(others[0] if others else x)
            ablated += self._sum(self._model.logits(columns, nothing), columns)
            predicted += int(self._model.summed_cross_entropy(logits, columns)[1])
        if not predicted:
            raise ValueError("the text has no token that the model predicts")
        self._own, self._ablated = own / predicted, ablated / predicted
        self._batches, self._predicted = batches, predicted

    def _sum(self, logits: Tensor, columns: Columns) -> float:
        return float(self._model.summed_cross_entropy(logits, columns)[0].double())
