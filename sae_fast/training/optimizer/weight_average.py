"""An exponential moving average of the weights, for evaluation.

The update t has the decay min(decay, (1 + t) / (10 + t)): at the start, when the weights move
fastest, the average follows them, and their first values are soon forgotten.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder

_PREFIX = "average."


class WeightAverage:
    """Average all parameters of a model; buffers, such as a threshold, are the model's own.

    Args:
        sae: the model.
        decay: share of the average that an update keeps, from 0 to below 1.
        step_count: 0-d int64 on the model's device, the updates made so far.
    """

    def __init__(self, sae: SparseAutoencoder, decay: float, step_count: Tensor) -> None:
        self._sae = sae
        self._decay = decay
        self._step_count = step_count
        self._parameters = dict(sae.named_parameters())
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are; never waits for the device."""
        updates = self._step_count.float()
        share = 1 - ((1 + updates) / (10 + updates)).clamp_max(self._decay)
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name], share.to(average.dtype))

    @torch.no_grad()
    def model(self) -> SparseAutoencoder:
        """Return a copy of the model with averaged weights, decoder rows again of unit norm."""
        averaged = copy.deepcopy(self._sae)
        for name, parameter in averaged.named_parameters():
            parameter.copy_(self._averages[name])
        if averaged.architecture.unit_norm:
            ops.normalize_rows_(averaged.W_dec)
        return averaged

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages under names of their own; no copies."""
        return {_PREFIX + name: average for name, average in self._averages.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over the averages among `tensors`; without them the average starts here."""
        for name, average in self._averages.items():
            average.copy_(tensors.get(_PREFIX + name, self._parameters[name].detach()))
