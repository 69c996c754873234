"""Swap evaluation: whether moving a slot makes the language model answer another question.

For a prompt that asks a person's relation r, the slot of r is set to 0 and the slot of t to a
strength; the decoded vector takes the place of the activation at the last token. A swap succeeds
when the next word is the same person's answer of t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.ground_truth.biographies.files import label_columns
from sae_fast.ground_truth.biographies.language_model import BATCH, BiographyModel, Prompts
from sae_fast.ground_truth.biographies.text import Sentence


@dataclass(frozen=True)
class Strength:
    """Swaps at one strength, in units of the slot's typical value when its relation is asked.

    Attributes:
        strength: how many of these units.
        success: share of swaps after which the person's answer of t comes.
        relation_success: share after which any answer of t comes, right or wrong.
        unmoved: share after which the person's answer of r still comes.
        by_pair: success of each r (row) and t (column); None on the diagonal.
    """

    strength: float
    success: float
    relation_success: float
    unmoved: float
    by_pair: list[list[float | None]]


@dataclass(frozen=True)
class SwapTable:
    """The results of `swap_success`.

    Attributes:
        layer: whose activations are replaced.
        relations: their names, in the order of the slots.
        prompts: how many there are.
        model_accuracy: share answered right with nothing replaced.
        reconstruction_accuracy: share answered right with the reconstruction in place and
            nothing swapped.
        patch_success: success with the activation of the same person's prompt of t in place, which
            is what a swap can hope for at this layer.
        typical: each slot's mean value over the prompts of its relation; a slot with a mean of
            0 cannot be moved.
        strengths: the swaps.
    """

    layer: int
    relations: list[str]
    prompts: int
    model_accuracy: float
    reconstruction_accuracy: float
    patch_success: float
    typical: list[float]
    strengths: list[Strength]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as a JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"layer {self.layer}, {self.prompts:,} prompts of held-out people: answered right by "
            f"the model {self.model_accuracy:.1%}, with the reconstruction in place "
            f"{self.reconstruction_accuracy:.1%}",
            f"patched with the activation of the other question: {self.patch_success:.1%}",
            f"{'strength':>8}  {'success':>8}  {'any answer of t':>15}  {'unmoved':>8}",
        ]
        lines += [
            f"{row.strength:>8g}  {row.success:>8.1%}  {row.relation_success:>15.1%}  "
            f"{row.unmoved:>8.1%}"
            for row in self.strengths
        ]
        return "\n".join(lines)


@torch.no_grad()
def swap_success(
    sae: SparseAutoencoder,
    model: BiographyModel,
    sentences: Sequence[Sentence],
    layer: int,
    strengths: Sequence[float],
) -> SwapTable:
    """Swap the slot of every sentence's relation with the slot of every other relation.

    The slots are the last latents of the autoencoder, one a relation, in their order.

    Args:
        sae: trained on the layer's activations.
        model: the language model.
        sentences: the prompts; every relation is asked.
        layer: whose activations are replaced, counted from 0.
        strengths: in units of each slot's typical value.

    Raises:
        ValueError: when the autoencoder does not fit the model.
    """
    relations = model.biographies.relations
    _check(sae, model, layer, len(relations), strengths)
    if {item.relation for item in sentences} != set(range(len(relations))):
        raise ValueError("sentences must ask every relation")
    evaluation = _Evaluation(sae, model, sentences, layer)
    return SwapTable(
        layer=layer,
        relations=[relation.name for relation in relations],
        prompts=len(sentences),
        model_accuracy=model.accuracy(evaluation.prompts),
        reconstruction_accuracy=evaluation.unswapped(),
        patch_success=evaluation.patched(),
        typical=evaluation.typical.tolist(),
        strengths=[evaluation.swapped(strength) for strength in strengths],
    )


class _Evaluation:
    """The prompts with their activations, slots and reconstructions."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        model: BiographyModel,
        sentences: Sequence[Sentence],
        layer: int,
    ) -> None:
        self.model, self.layer = model, layer
        self.count = len(model.biographies.relations)
        self.sentences = sentences
        self.prompts: Prompts = model.prompts(sentences)
        self.relation = label_columns(model.biographies, sentences)["relation"]  # [N]
        parts = [rows[layer] for _, rows in model.activations(self.prompts, [layer])]
        self.activations = torch.cat(parts)  # [N, D]
        self.slots, self.reconstructions = _decoded(sae, self.activations, self.count)
        # Decoding is affine in the code, so that a moved slot moves the vector along its row.
        self.directions = sae.W_dec[-self.count :] / sae.activation_scale  # [R, D]
        self.typical = torch.stack(
            [self.slots[self.relation == slot, slot].mean() for slot in range(self.count)]
        )
        people = range(len(model.biographies.entities))
        self.answers = torch.tensor(
            [[model.answer_token(person, slot) for slot in range(self.count)] for person in people]
        )[[item.entity for item in sentences]]  # [N, R], each person's to every question

    def unswapped(self) -> float:
        """Return the share of right answers with the reconstructions in place."""
        words = self.model.next_tokens(self.prompts, self.layer, self.reconstructions)
        return float((words == self.prompts.answers).double().mean())

    def patched(self) -> float:
        """Return the success with activations of the same person's prompts in the same template."""
        place = {item: number for number, item in enumerate(self.sentences)}
        hits, swaps = 0, 0
        for target in range(self.count):
            rows, others = [], []
            for number, item in enumerate(self.sentences):
                other = place.get(Sentence(item.entity, target, item.template))
                if item.relation != target and other is not None:
                    rows.append(number)
                    others.append(other)
            if rows:
                chosen = torch.tensor(rows)
                put = self.activations[torch.tensor(others)]
                words = self.model.next_tokens(self.prompts[chosen], self.layer, put)
                hits += int((words == self.answers[chosen, target]).sum())
                swaps += len(rows)
        return hits / max(swaps, 1)

    def swapped(self, strength: float) -> Strength:
        """Make all swaps at one strength."""
        by_pair: list[list[float | None]] = [[None] * self.count for _ in range(self.count)]
        hits = relation_hits = unmoved = swaps = 0
        for target in range(self.count):
            rows = torch.nonzero(self.relation != target).flatten()
            asked = self.relation[rows]
            words = self.model.next_tokens(
                self.prompts[rows], self.layer, self._moved(rows, asked, target, strength)
            )
            success = words == self.answers[rows, target]
            for source in set(asked.tolist()):
                by_pair[source][target] = float(success[asked == source].double().mean())
            hits += int(success.sum())
            relation_hits += int(torch.isin(words, self.model.answer_tokens(target)).sum())
            unmoved += int((words == self.prompts.answers[rows]).sum())
            swaps += len(rows)
        shares = (hits / swaps, relation_hits / swaps, unmoved / swaps)
        return Strength(strength, *shares, by_pair)

    def _moved(self, rows: Tensor, asked: Tensor, target: int, strength: float) -> Tensor:
        """Return reconstructions [n, D] with the slots asked at 0, the target's at a strength."""
        slots = self.slots[rows]
        change = torch.zeros_like(slots)
        change[torch.arange(len(rows)), asked] = -slots[torch.arange(len(rows)), asked]
        change[:, target] = strength * self.typical[target] - slots[:, target]
        return self.reconstructions[rows] + change @ self.directions


def _decoded(sae: SparseAutoencoder, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the values of the last `count` latents [N, count], and reconstructions [N, D]."""
    slots, reconstructions = [], []
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        code = sae.encode(part)
        first = sae.config.d_sae - count
        is_slot = code.indices >= first
        values = torch.where(is_slot, code.values, 0).flatten()
        place = torch.where(is_slot, code.indices - first, 0).flatten().long()
        activations = values.new_zeros(len(part), count)
        slots.append(activations.index_put_((code.entry_rows(), place), values, accumulate=True))
        reconstructions.append(sae.decode(code))
    return torch.cat(slots), torch.cat(reconstructions)


def _check(
    sae: SparseAutoencoder,
    model: BiographyModel,
    layer: int,
    slots: int,
    strengths: Sequence[float],
) -> None:
    if not 0 <= layer < model.layers:
        raise ValueError(f"layer must be from 0 to {model.layers - 1}, got {layer}")
    if sae.config.transcoder:
        raise ValueError("the model must reconstruct what it reads, got a transcoder")
    if sae.config.d_in != model.d_model:
        raise ValueError(
            f"the autoencoder has d_in {sae.config.d_in}, the language model d_model "
            f"{model.d_model}: it was trained on other activations"
        )
    if sae.config.d_sae < slots:
        raise ValueError(f"d_sae must be at least the {slots} slots, got {sae.config.d_sae}")
    if not strengths:
        raise ValueError("strengths must be given, got none")
