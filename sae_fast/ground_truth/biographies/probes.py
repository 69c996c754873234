"""Linear probes on activations, tested on people that they were not fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sae_fast.ground_truth.biographies.files import label_columns
from sae_fast.ground_truth.biographies.language_model import BiographyModel

ITERATIONS = 100
WEIGHT_PENALTY = 1e-5  # times the squared norm of the weights, beside the mean cross-entropy


def probe_accuracies(model: BiographyModel, layers: Sequence[int]) -> dict[int, dict[str, float]]:
    """Return the accuracies, by layer, of probes for relation and answer on held-out people.

    The probes are logistic regressions on the activations of the other people.
    """
    sides = []
    for heldout in (False, True):
        sentences = model.biographies.sentences(heldout=heldout)
        parts = [by_layer for _, by_layer in model.activations(model.prompts(sentences), layers)]
        rows = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
        sides.append((rows, label_columns(model.biographies, sentences)))
    (train, labels), (heldout_rows, heldout_labels) = sides
    return {
        layer: {
            name: probe_accuracy(
                train[layer], labels[name], heldout_rows[layer], heldout_labels[name]
            )
            for name in ("relation", "answer")
        }
        for layer in layers
    }


def probe_accuracy(
    x: Tensor,  # [N, D]
    labels: Tensor,  # [N] int64
    x_heldout: Tensor,  # [M, D]
    labels_heldout: Tensor,  # [M] int64
) -> float:
    """Return the share of held-out rows that a logistic regression on the others labels right."""
    mean = x.mean(0)
    scale = (x - mean).square().mean().rsqrt()
    rows = (x - mean) * scale
    classes = int(max(labels.max(), labels_heldout.max())) + 1
    weights = torch.zeros(x.size(1), classes, requires_grad=True)
    biases = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, biases], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        cross_entropy = functional.cross_entropy(rows @ weights + biases, labels)
        total = cross_entropy + WEIGHT_PENALTY * weights.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return float(total.detach())

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    scores = (x_heldout - mean) * scale @ weights.detach() + biases.detach()
    return float((scores.argmax(1) == labels_heldout).double().mean())
