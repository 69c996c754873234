"""A linear probe on the code, trained with the model, so that labels can be read off the latents.

Its rows are latents, as the decoder's are: predictions = f W_probe + b_probe. Of whole numbers the
label -1 says that a token has none; of real numbers every one is a label.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae_fast import ops
from sae_fast.autoencoder.losses import deterministic_sum, ratio
from sae_fast.config import SAEConfig
from sae_fast.ops.full_precision import addmm

NO_LABEL = -1


class ProbeLoss(NamedTuple):
    """The mean loss over the labelled tokens, 0 without any, and how well they are predicted.

    `quality`, detached, is the accuracy, or R² in a regression; NaN where no token is labelled.
    """

    loss: Tensor
    quality: Tensor


class Probe:
    """The probe that a configuration asks for; the model holds its parameters.

    Raises ValueError where the number of classes is left open.
    """

    def __init__(self, config: SAEConfig):
        if not config.probe_outputs:
            raise ValueError(
                "probe_classes must be given, directly or by the labels, to make a model, got null"
            )
        self.config = config
        self.is_regression = config.probe_task == "regression"
        self.quality_name = "probe_r2" if self.is_regression else "probe_accuracy"

    def parameters(self) -> dict[str, Tensor]:
        """Return start values with which all predictions are equal."""
        outputs = self.config.probe_outputs
        return {
            "W_probe": torch.zeros(self.config.d_sae, outputs, dtype=torch.float32),
            "b_probe": torch.zeros(outputs, dtype=torch.float32),
        }

    def loss(
        self,
        own: dict[str, Tensor],  # the parameters, by name
        code: ops.Code,
        labels: Tensor,  # [N], int64 or float
    ) -> ProbeLoss:
        """Return cross-entropy, or squared error, with a gradient for the probe and the code."""
        predicted = predictions(own, code)
        labelled = labels != NO_LABEL
        if labels.is_floating_point():
            labelled = torch.ones_like(labelled)
        if self.is_regression:
            return _regression(predicted[:, 0], labels.to(predicted.dtype), labelled)
        return _classification(predicted, labels, labelled)

    def rescale_(self, own: dict[str, Tensor], factor: Tensor) -> None:
        """Keep the predictions for codes whose values were multiplied by `factor`, 0-d or [F]."""
        own["W_probe"].div_(factor.reshape(-1, 1))


def predictions(
    own: dict[str, Tensor],  # the parameters, by name
    code: ops.Code,
) -> Tensor:
    """Return the logits [N, C] of the classes, or the predicted numbers [N, 1]."""
    if isinstance(code, ops.DenseCode):
        return addmm(own["b_probe"], code.values, own["W_probe"])
    return ops.decode(code, own["W_probe"], own["b_probe"], precision="fp32")


def _classification(
    logits: Tensor,  # [N, C]
    labels: Tensor,  # [N] int64
    labelled: Tensor,  # [N] bool
) -> ProbeLoss:
    surprise = functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
    n_labelled = labelled.sum()
    right = ((logits.argmax(1) == labels) & labelled).sum()
    return ProbeLoss(
        deterministic_sum(surprise) / n_labelled.clamp_min(1), ratio(right, n_labelled)
    )


def _regression(
    predicted: Tensor,  # [N]
    targets: Tensor,  # [N]
    labelled: Tensor,  # [N] bool
) -> ProbeLoss:
    n_labelled = labelled.sum()
    squared = deterministic_sum(torch.where(labelled, predicted - targets, 0.0).square())
    mean = deterministic_sum(torch.where(labelled, targets, 0.0)) / n_labelled
    variance = deterministic_sum(torch.where(labelled, targets - mean, 0.0).square())
    return ProbeLoss(squared / n_labelled.clamp_min(1), 1 - squared.detach() / variance)
