"""TopK: the k largest pre-activations of a token, with AuxK for dead latents (arXiv:2406.04093)."""

from __future__ import annotations

from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import losses
from sae_fast.autoencoder.architecture import (
    Architecture,
    ArchitectureLoss,
    Batch,
    Mode,
    Weights,
)
from sae_fast.config import SAEConfig


class TopK(Architecture):
    """How a TopK model selects latents, and AuxK."""

    select = staticmethod(ops.encode_topk)
    term_names = ("l1_loss", "aux_loss")

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        assert config.k is not None
        assert config.aux_k_coeff is not None
        self.k = config.k
        self.aux_k_coeff = config.aux_k_coeff
        if self.aux_k_coeff > 0:
            self.full_k_aux = config.aux_k or max(config.d_in // 2, 1)

    def encode(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        mode: Mode,
        dead_mask: Tensor | None = None,  # [F] bool
        k_aux: int | None = None,
    ) -> ops.SparseCode:
        """The code of a batch in training; `code.aux` has the k_aux best dead latents.

        By default k_aux is the number of dead latents, for which the host waits.
        """
        if dead_mask is None or self.full_k_aux == 0:
            k_aux = 0
        elif k_aux is None:
            k_aux = min(self.full_k_aux, int(dead_mask.sum()))
        return self.select(
            x,
            *weights[:2],
            weights.b_dec,
            self.k,
            precision=mode.precision,
            dead_mask=dead_mask if k_aux else None,
            k_aux=k_aux,
            dense_grad=mode.dense_grad,
        )

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        mode: Mode,
    ) -> ops.SparseCode:
        """The code of every token outside training: here the same."""
        return self.encode(weights, x, mode)

    def loss(self, weights: Weights, batch: Batch, mode: Mode) -> ArchitectureLoss:
        """Squared error, the plain L1 penalty where there is one, and AuxK."""
        code = self.encode(weights, batch.x, mode, batch.dead_mask, batch.k_aux)
        modelled, recon_loss = self.reconstruct(weights, code, batch, mode)
        terms = {
            "l1_loss": batch.x.new_zeros(()),
            "aux_loss": self._auxiliary_loss(weights, code, modelled.residual, batch, mode),
        }
        if self.config.l1_penalty_coeff > 0:
            weight = self.config.l1_penalty_coeff * batch.sparsity_weight
            terms["l1_loss"] = weight * losses.l1_loss(code.values, code.n_rows)
        return ArchitectureLoss(code, modelled.squared_error, recon_loss, terms)

    def _auxiliary_loss(
        self,
        weights: Weights,
        code: ops.SparseCode,
        residual: Tensor,  # [N, D], x̂ − x
        batch: Batch,
        mode: Mode,
    ) -> Tensor:
        """AuxK with its coefficient: the dead latents, without b_dec, model the residual x − x̂.

        Its gradient reaches W_enc, b_enc and W_dec in the rows of the selected dead latents only.
        """
        if code.aux is None:
            return residual.new_zeros((), dtype=code.values.dtype)
        target = residual.detach().to(code.values.dtype).neg()
        modelled = ops.reconstruct(
            code.aux, weights.W_dec, None, target, dense_grad=mode.dense_grad
        )
        n_dead = batch.dead_mask.sum()
        loss = losses.aux_k_loss(modelled.squared_error, target, n_dead, self.full_k_aux)
        return self.aux_k_coeff * loss
