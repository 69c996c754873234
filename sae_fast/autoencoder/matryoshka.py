"""Matryoshka: BatchTopK whose first latents must do by themselves as well (arXiv:2503.17547).

One selection over all latents. Prefix g of the dictionary, its first m_g latents, gives
x̂_g = Σ_{j<m_g} f_j W_dec,j + b_dec, and the loss is Σ_g w_g ‖x − x̂_g‖²: a sum over prefixes, not
their mean, so that AuxK weighs as much beside it as beside one reconstruction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.architecture import Batch, Mode, Weights
from sae_fast.autoencoder.batch_topk import BatchTopK
from sae_fast.config import SAEConfig


class Matryoshka(BatchTopK):
    """How a Matryoshka model reconstructs; it selects, and finds its threshold, as BatchTopK."""

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        assert config.matryoshka_prefixes is not None
        assert config.matryoshka_weights is not None
        self.prefixes = config.matryoshka_prefixes
        self.prefix_weights = config.matryoshka_weights

    def reconstruct(
        self, weights: Weights, code: ops.Code, batch: Batch, mode: Mode
    ) -> tuple[ops.Reconstruction, Tensor]:
        """The whole dictionary's reconstruction, and the weighted sum over prefixes."""
        assert isinstance(code, ops.SparseCode)
        modelled = ops.reconstruct_prefixes(
            code,
            weights.W_dec,
            weights.b_dec,
            batch.target,
            self.prefixes,
            dense_grad=mode.dense_grad,
        )
        by_prefix = modelled.squared_errors.unbind(1)  # each [N]
        weighted = torch.zeros_like(by_prefix[0])
        for weight, squared_error in zip(self.prefix_weights, by_prefix, strict=True):
            weighted = weighted + weight * squared_error
        whole = ops.Reconstruction(modelled.residual, by_prefix[-1])
        return whole, batch.error_term(weighted)
