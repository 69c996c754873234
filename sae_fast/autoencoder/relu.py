"""ReLU with an L1 penalty: f = ReLU((x − b_dec) W_encᵀ + b_enc), the first SAEs of the field.

Loss: squared error + λ Σ_i f_i |W_dec,i|. With a free decoder, starting from rows of norm 0.1 and
λ = 5, it is the recipe of Anthropic's April 2024 update; with unit rows the penalty is the plain
L1. Plain L1 with a free decoder is not to be had: growing W_dec would escape it.

Without use_relu f = (x − b_dec) W_encᵀ + b_enc, and the penalty is on |f_i|. Such a code is dense:
L1 makes its values small, and none of them exactly 0.
"""

from __future__ import annotations

from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.architecture import ArchitectureLoss, Batch, Mode, Weights
from sae_fast.autoencoder.thresholded import Thresholded


class ReLU(Thresholded):
    """How a ReLU model selects latents, and its penalty."""

    term_names: tuple[str, ...] = ("l1_loss",)

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        mode: Mode,
    ) -> ops.SparseCode:
        """The code of every token: its latents above 0, or without ReLU all of them."""
        if not self.config.use_relu:
            return self._signed(weights, x, mode).listed()
        return ops.encode_threshold(
            x,
            *weights[:2],
            weights.input_bias,
            weights.b_enc.new_zeros(len(weights.b_enc)),
            precision=mode.precision,
            dense_grad=mode.dense_grad,
        )

    def loss(self, weights: Weights, batch: Batch, mode: Mode) -> ArchitectureLoss:
        """Squared error and the L1 or Lp penalty."""
        code: ops.Code
        if self.config.use_relu:
            code = self.list_above(weights, batch, mode)
        else:
            code = self._signed(weights, batch.x, mode)
        # Before the reconstruction, so that backward comes to the reconstruction first: to its
        # gradient of a dense code the penalty's is added in place, and not the other way round.
        l1_loss = self.l1_loss(weights, code, batch, self.config.sparsity_norm_p)
        modelled, recon_loss = self.reconstruct(weights, code, batch, mode)
        return ArchitectureLoss(
            code,
            modelled.squared_error,
            recon_loss,
            {"l1_loss": l1_loss},
            self.figures(weights),
        )

    def _signed(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        mode: Mode,
    ) -> ops.DenseCode:
        """The code without ReLU."""
        arguments = (x, *weights[:2], weights.input_bias)
        return ops.encode_dense(*arguments, precision=mode.precision, relu=False)
