"""Gated: one linear map decides which latents are active, and scaled and shifted, how strongly.

arXiv:2404.16014. π = (x − b_dec) W_encᵀ + b_enc, magnitude = ReLU((π − b_enc) e^r_mag + b_mag),
f = 1[π > 0] · magnitude: b_enc is the paper's b_gate. The L1 penalty is on ReLU(π), which an
auxiliary term keeps useful: ReLU(π) has to reconstruct x as well, by a decoder that is detached,
since the decoder serves f alone. Both come from one encoding of the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.architecture import ArchitectureLoss, Batch, Mode, Weights
from sae_fast.autoencoder.thresholded import Thresholded


class Gated(Thresholded):
    """How a gated model selects latents, and its terms."""

    term_names = ("l1_loss", "aux_loss")

    def parameters(self) -> dict[str, Tensor]:
        """`r_mag` and `b_mag`, [F]: at first the magnitude is the gate's."""
        start = torch.zeros(self.config.d_sae, dtype=torch.float32)
        return {name: start.clone() for name in ("r_mag", "b_mag")}

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        mode: Mode,
    ) -> ops.SparseCode:
        """The code of every token: the magnitudes of the latents whose gates are open."""
        gate = ops.encode_threshold(
            x,
            *weights[:2],
            weights.input_bias,
            weights.b_enc.new_zeros(len(weights.b_enc)),
            precision=mode.precision,
            dense_grad=mode.dense_grad,
        )
        return gate.with_values(_magnitudes(weights, gate))

    def loss(self, weights: Weights, batch: Batch, mode: Mode) -> ArchitectureLoss:
        """Squared error, the L1 penalty on the gate, and the gate's own reconstruction."""
        gate = self.list_above(weights, batch, mode)
        code = gate.with_values(_magnitudes(weights, gate))
        modelled, recon_loss = self.reconstruct(weights, code, batch, mode)
        frozen = (weights.W_dec.detach(), weights.b_dec.detach())
        target = batch.target.detach()  # a skip connection serves f alone, too
        by_gate = ops.reconstruct(gate, *frozen, target, dense_grad=mode.dense_grad)
        terms = {
            "l1_loss": self.l1_loss(weights, gate, batch),
            "aux_loss": batch.error_term(by_gate.squared_error),
        }
        figures = self.figures(weights)
        return ArchitectureLoss(code, modelled.squared_error, recon_loss, terms, figures)

    def rescale_(self, weights: Weights, factor: Tensor) -> None:
        """Follow a change of the units that the code's values are in."""
        weights.own["b_mag"].mul_(factor)

    def rebase_(self, weights: Weights, moved: Tensor) -> None:
        """Follow b_enc having given up `moved`: the magnitude is of the product without b_enc."""
        weights.own["b_mag"].sub_(weights.own["r_mag"].exp() * moved)


def _magnitudes(weights: Weights, gate: ops.Code) -> Tensor:
    """f, in the shape of the gate's values."""
    scale = weights.own["r_mag"].exp()
    shift = weights.own["b_mag"] - weights.b_enc * scale
    magnitudes = torch.addcmul(gate.spread(shift), gate.values, gate.spread(scale)).relu()
    return torch.where(gate.values == 0, 0, magnitudes)
