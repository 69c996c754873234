"""TopK: the k largest pre-activations of a token (arXiv:2406.04093).

With it go AuxK for dead latents, Multi-TopK, which lets 4k latents reconstruct too, so that a code
is of use at other k than it was trained with, and two other choices of k latents: the largest in
magnitude, with their sign (abs_topk), and the largest of each of k groups (groupmax).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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

_SELECTIONS: dict[str, Callable[..., ops.SparseCode]] = {
    "topk": ops.encode_topk,
    "abs_topk": ops.encode_abs_topk,
    "groupmax": ops.encode_groupmax,
}
_MULTI = 4  # Multi-TopK takes so many times k


class TopK(Architecture):
    """How a TopK model selects latents, AuxK and Multi-TopK."""

    term_names: tuple[str, ...] = ("l1_loss", "aux_loss")
    compares_latents = True

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        assert config.k is not None
        assert config.aux_k_coeff is not None
        self.k = config.k
        self.select = _SELECTIONS[config.activation]
        self.aux_k_coeff = config.aux_k_coeff
        if self.aux_k_coeff > 0:
            self.full_k_aux = config.aux_k or max(config.target_width // 2, 1)
        if config.multi_topk:
            self.term_names = (*self.term_names, "multi_topk_loss")

    def encode(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        mode: Mode,
        dead_mask: Tensor | None = None,  # [F] bool
        k_aux: int | None = None,
        k: int | None = None,
    ) -> ops.SparseCode:
        """The code of a batch in training; `code.aux` has the k_aux best dead latents.

        By default k is the model's, and k_aux the number of dead latents, for which the host waits.
        """
        if dead_mask is None or self.full_k_aux == 0:
            k_aux = 0
        elif k_aux is None:
            k_aux = min(self.full_k_aux, int(dead_mask.sum()))
        return self.select(
            x,
            *weights[:2],
            weights.input_bias,
            self.k if k is None else k,
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
        """Squared error, and where they are asked for L1, AuxK and Multi-TopK."""
        config, dead = self.config, (batch.dead_mask, batch.k_aux)
        k = self.k if batch.k is None else batch.k
        if config.multi_topk:
            wide = self.encode(weights, batch.x, mode, *dead, k=min(_MULTI * k, config.d_sae))
            code = _first(wide, k)
        else:
            code = self.encode(weights, batch.x, mode, *dead, k=k)
        modelled, recon_loss = self.reconstruct(weights, code, batch, mode)
        terms = {
            "l1_loss": batch.x.new_zeros(()),
            "aux_loss": self._auxiliary_loss(weights, code, modelled.residual, batch, mode),
        }
        if config.l1_penalty_coeff:
            weight = config.l1_penalty_coeff * batch.sparsity_weight
            magnitudes = code.values.abs() if code.signed else code.values
            terms["l1_loss"] = weight * losses.l1_loss(magnitudes, code.n_rows)
        if config.multi_topk:
            # One encoder call gives both codes, so that the gradient of either reaches W_enc.
            _, multi_loss = self.reconstruct(weights, wide, batch, mode)
            terms["multi_topk_loss"] = config.multi_topk_coeff * multi_loss
        return ArchitectureLoss(code, modelled.squared_error, recon_loss, terms)

    def _auxiliary_loss(
        self,
        weights: Weights,
        code: ops.SparseCode,
        residual: Tensor,  # [N, D], x̂ − x, or ŷ − y
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


def _first(code: ops.SparseCode, k: int) -> ops.SparseCode:
    """The first k entries of every row, which are the largest."""
    values, indices = code.values[:, :k].contiguous(), code.indices[:, :k].contiguous()
    return replace(code, values=values, indices=indices)
