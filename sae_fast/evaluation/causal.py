"""The causal impact of latents: the change of a model's predictions when one alone is ablated.

An ablation subtracts f_j · W_dec[j] from the activations of every token on which latent j is
active. All else stays, the error of the reconstruction too, so that an ablation is compared with
the model as it is. The exact change takes a forward pass for each latent and sequence; its
first-order estimate, attribution patching (arXiv:2310.10348), takes one backward pass for all
latents together. definitions.py has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.activations.capture import HookPoint
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.decoding import decode_rows
from sae_fast.evaluation.language_model import (
    KEPT,
    LABELS,
    MASK,
    TOKENS,
    Columns,
    ModelText,
    SplicedModel,
)

RankedBy = Literal["mass", "frequency", "attribution"]


@dataclass(frozen=True)
class FirstOrder:
    """Numbers of all latents on a text, [F] float64 each.

    Attributes:
        attribution: estimate of the change of the loss, in nats a predicted token.
        mass: norm of what the latent adds to the activations, averaged over tokens.
        frequency: share of the tokens on which it is active.
    """

    attribution: Tensor
    mass: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class CausalImpact:
    """The impact of the latents that were ablated, in descending order of the loss.

    Attributes:
        latents: their numbers.
        columns: by name, a number for each of them.
        all_latents: the first-order estimate for all latents.
    """

    latents: list[int]
    columns: dict[str, list[float]]
    all_latents: FirstOrder

    def rows(self) -> Iterator[dict[str, float]]:
        """Yield the latent and its numbers, by name."""
        for number, latent in enumerate(self.latents):
            yield {"latent": latent, **{name: c[number] for name, c in self.columns.items()}}


def causal_impact(
    sae: SparseAutoencoder,
    text: ModelText,
    *,
    top: int = 10,
    by: RankedBy = "mass",
    latents: Sequence[int] = (),
    report: Callable[[int], object] | None = None,
) -> CausalImpact:
    """Return how predictions change when latents are ablated, one at a time.

    The text is read twice: for the estimate of all latents, and for the ablations.

    Args:
        sae: the dictionary, in evaluation mode.
        text: the model and what it reads.
        top: how many latents are ablated, the first ones by `by`.
        by: mass, frequency or the size of the attribution, see `FirstOrder`.
        latents: further ones to ablate.
        report: called with the tokens of each batch that was read.

    Raises ValueError for a number that is no latent, and where the text has no token to predict.
    """
    check_latents(latents, sae.d_sae)
    estimate = first_order(sae, text, report)
    size = {
        "mass": estimate.mass,
        "frequency": estimate.frequency,
        "attribution": estimate.attribution.abs(),
    }[by]
    largest = size.topk(min(top, sae.d_sae)).indices.tolist()
    chosen = list(dict.fromkeys([*latents, *largest]))
    exact = _ablated(sae, text, chosen, report)
    order = sorted(range(len(chosen)), key=lambda n: (-exact["loss_change"][n], chosen[n]))
    ranked = [chosen[n] for n in order]
    columns = {name: [float(numbers[n]) for n in order] for name, numbers in exact.items()}
    for name, numbers in vars(estimate).items():
        columns[name] = numbers[ranked].tolist()
    return CausalImpact(ranked, columns, estimate)


def check_latents(latents: Sequence[int], d_sae: int) -> None:
    """Raise ValueError for a number that is no latent of a dictionary."""
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise ValueError(
                f"ablate_latents must be from 0 to {d_sae - 1}, the latents of the dictionary, "
                f"got {latent}"
            )


@torch.no_grad()
def first_order(
    sae: SparseAutoencoder, text: ModelText, report: Callable[[int], object] | None = None
) -> FirstOrder:
    """Return the estimate of every latent's impact, from one backward pass for each batch.

    Raises ValueError where the text has no token to predict.
    """
    sums = torch.zeros(3, sae.d_sae, dtype=torch.float64, device=sae.device)
    norms = sae.W_dec.detach().float().norm(dim=1)
    tokens = predicted = 0
    with sae.kept_copies():
        for columns in text.batches():
            x, gradient, count = _loss_gradient(text, columns)
            code = sae.encode(x.to(sae.device), units=ops.RAW).flatten()
            slopes = _slopes(sae, code, gradient.to(sae.device))
            latents, values = code.indices.flatten().long(), code.values.flatten()
            sums[0].index_add_(0, latents, -(values * slopes).double())
            sums[1].index_add_(0, latents, (values.abs() * norms[latents]).double())
            sums[2].index_add_(0, latents, code.fires().flatten().double())
            tokens, predicted = tokens + len(x), predicted + count
            if report is not None:
                report(columns[TOKENS].numel())
    if predicted == 0:
        raise ValueError("the text has no token that the model predicts")
    attribution, mass, frequency = sums.cpu()
    return FirstOrder(attribution / predicted, mass / tokens, frequency / tokens)


def _target(text: ModelText) -> HookPoint:
    """Return the hook point at which a dictionary acts."""
    return text.source if text.target is None else text.target


def _loss_gradient(text: ModelText, columns: Columns) -> tuple[Tensor, Tensor, int]:
    """Return the rows that are encoded, the loss's gradient where they act, and predicted tokens.

    Rows and gradients are [n, D] float32, of the tokens that are kept; the loss is a sum.
    """
    model = SplicedModel(text.network, _target(text), causal=text.causal)
    kept = columns[KEPT]
    rows: list[Tensor] = []
    leaves: list[Tensor] = []

    def keep(activations: Tensor) -> None:
        rows.append(activations.detach()[kept.view(activations.shape[:-1])].float())

    def add(activations: Tensor) -> Tensor:
        leaves.append(torch.zeros_like(activations, requires_grad=True))
        return activations.detach() + leaves[0]

    with torch.enable_grad():
        logits = model.run(columns, (text.source, keep), (_target(text), add))
        total, count = model.summed_cross_entropy(logits, columns)
        (gradient,) = torch.autograd.grad(total, leaves[0])
    return rows[0], gradient[kept.view(gradient.shape[:-1])].float(), int(count)


def _slopes(
    sae: SparseAutoencoder,
    code: ops.SparseCode,
    gradient: Tensor,  # [n, D]
) -> Tensor:
    """Return gradient · W_dec[j] of every entry of a code, [nnz]."""
    with torch.enable_grad():
        values = code.values.detach().clone().requires_grad_()
        added = decode_rows(code.with_values(values), sae.W_dec.detach(), None)
        (slopes,) = torch.autograd.grad(added, values, gradient)
    return slopes.flatten()


@torch.no_grad()
def _ablated(
    sae: SparseAutoencoder,
    text: ModelText,
    chosen: list[int],
    report: Callable[[int], object] | None,
) -> dict[str, Tensor]:
    """Return the exact changes when each of the chosen latents is ablated, [n] float64 each."""
    model = SplicedModel(text.network, _target(text), causal=text.causal)
    rows = sae.W_dec[chosen].detach().float()
    names = ("loss_change", "kl_div", "logit_change")
    sums = {name: torch.zeros(len(chosen), dtype=torch.float64) for name in names}
    tokens = predicted = 0
    with sae.kept_copies():
        for columns in text.batches():
            own, (x,) = model.observed(columns, text.source)
            _, count = model.summed_cross_entropy(own, columns)
            tokens, predicted = tokens + int(columns[MASK].sum()), predicted + int(count)
            codes = sae.encode(x.to(sae.device), units=ops.RAW).flatten().latent(chosen)
            batch = _Batch(model, _target(text), columns, own, codes.float().to(x.device))
            for which, found in batch.changes(rows.to(x.device)):
                for name, numbers in zip(names, found, strict=True):
                    sums[name].index_add_(0, which.cpu(), numbers.cpu())
            if report is not None:
                report(columns[TOKENS].numel())
    return {
        "loss_change": sums["loss_change"] / predicted,
        "kl_div": sums["kl_div"] / tokens,
        "logit_change": sums["logit_change"] / tokens,
    }


class _Batch:
    """A batch of sequences, whose sequences are run again for each latent that is active in them.

    Args:
        model: runs them.
        hook: where the latents act.
        columns: what the model reads.
        own: the model's own logits [B, T, words].
        codes: values of the chosen latents [n, L], of the tokens that are kept.
    """

    def __init__(
        self, model: SplicedModel, hook: HookPoint, columns: Columns, own: Tensor, codes: Tensor
    ) -> None:
        self._model = model
        self._hook = hook
        self._columns = columns
        self._own = own
        self._entropies = model.sequence_cross_entropies(own, columns)
        kept = columns[KEPT]
        placed = codes.new_zeros(*kept.shape, codes.shape[1])
        placed[kept] = codes
        self._codes = placed.permute(2, 0, 1)  # [L, B, T]

    def changes(
        self,
        rows: Tensor,  # [L, D]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
        """Yield latents [p], and the sums of what changes in one sequence of each, [p] float64.

        These are the loss, KL(p ‖ q) and the mean over the vocabulary of |change of the logit|.
        """
        latents, sequences = self._codes.ne(0).any(2).nonzero(as_tuple=True)
        if not len(latents):
            return
        size = len(self._own)
        for which, sequence in zip(
            *(torch.split(part, size) for part in (latents, sequences)), strict=True
        ):
            taken = self._codes[which, sequence]  # [p, T]
            columns = {
                name: column[sequence] for name, column in self._columns.items() if name in _READ
            }
            change = -taken[..., None] * rows[which, None]
            logits = self._model.run(columns, (self._hook, _adding(change)))
            own, mask = self._own[sequence], columns[MASK].double()
            loss = self._model.sequence_cross_entropies(logits, columns) - self._entropies[sequence]
            logs = own.log_softmax(-1)
            kl = (logs.exp() * (logs - logits.log_softmax(-1))).sum(-1, dtype=torch.float64)
            apart = (logits - own).abs().mean(-1, dtype=torch.float64)
            yield which, (loss, (kl * mask).sum(1), (apart * mask).sum(1))


_READ = (TOKENS, MASK, KEPT, LABELS)


def _adding(
    change: Tensor,  # [B, T, D]
) -> Callable[[Tensor], Tensor]:
    def add(activations: Tensor) -> Tensor:
        wide = activations.to(torch.promote_types(activations.dtype, change.dtype))
        return (wide + change.view(activations.shape)).to(activations.dtype)

    return add
