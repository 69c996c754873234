"""The two sets of weights of a schedule-free optimiser: those trained, and their average.

The model's parameters are y, where gradients are taken. Evaluated and saved is the average x of the
walk z (signum.py has the formulas). Both y and z are in a checkpoint, because x and z − y give y to
rounding only.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.training.optimizer.row_optimizer import SparseOptimizer

_PREFIX = "trained."


class ScheduleFreeWeights:
    """The averaged weights of a model that `schedule_free_signum` trains.

    Args:
        optimizer: of that rule.
    """

    def __init__(self, optimizer: SparseOptimizer) -> None:
        self._optimizer = optimizer
        self._trained = {name: optimizer.sae.get_parameter(name) for name in optimizer.names}

    @torch.no_grad()
    def model(self) -> SparseAutoencoder:
        """Return a copy of the model with x for its weights; decoder rows again of unit norm.

        Buffers, such as a threshold, are the training's, and so of y.
        """
        optimizer = self._optimizer
        averaged = copy.deepcopy(optimizer.sae)
        share = (1 - optimizer.momentum) / optimizer.momentum
        for name in optimizer.names:
            ahead = optimizer.exp_avg[name].float()  # z − y
            averaged.get_parameter(name).sub_(ahead, alpha=share)
        if averaged.architecture.unit_norm and "W_dec" in optimizer.names:
            ops.normalize_rows_(averaged.W_dec)
        averaged.clamp_parameters_()
        return averaged

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights y under names of their own; no copies."""
        return {_PREFIX + name: parameter.detach() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Put the weights y among `tensors` back into the model."""
        for name, parameter in self._trained.items():
            parameter.copy_(tensors[_PREFIX + name])
