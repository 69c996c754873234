"""TopK: the k largest pre-activations of a token, with AuxK for dead latents (arXiv:2406.04093)."""

from __future__ import annotations

from torch import Tensor, nn

from sae_fast import ops
from sae_fast.autoencoder.losses import aux_k_loss
from sae_fast.config import SAEConfig

Buffers = dict[str, Tensor]


class TopK:
    """How a TopK model selects latents, and the loss term that only it has.

    `buffers` are the tensors that an architecture keeps beside the parameters: they are made here
    and live on the model.
    """

    select = staticmethod(ops.encode_topk)

    def __init__(self, config: SAEConfig):
        self.k = config.k
        self.aux_k_coeff = config.aux_k_coeff
        self.full_k_aux = config.aux_k or max(config.d_in // 2, 1)

    def encode(
        self,
        x: Tensor,  # [N, D], normalised
        W_enc: nn.Parameter,  # [F, D]
        b_enc: nn.Parameter,  # [F]
        b_dec: nn.Parameter,  # [D]
        *,
        precision: str,
        dense_grad: bool,
        dead_mask: Tensor | None = None,  # [F] bool
        k_aux: int | None = None,
    ) -> ops.SparseCode:
        """The code of a batch in training; `code.aux` has the k_aux best dead latents.

        By default k_aux is the number of dead latents, for which the host waits.
        """
        if dead_mask is None or self.aux_k_coeff == 0:
            k_aux = 0
        elif k_aux is None:
            k_aux = min(self.full_k_aux, int(dead_mask.sum()))
        return self.select(
            x,
            W_enc,
            b_enc,
            b_dec,
            self.k,
            precision=precision,
            dead_mask=dead_mask if k_aux else None,
            k_aux=k_aux,
            dense_grad=dense_grad,
        )

    def infer(
        self,
        x: Tensor,  # [N, D], normalised
        W_enc: nn.Parameter,  # [F, D]
        b_enc: nn.Parameter,  # [F]
        b_dec: nn.Parameter,  # [D]
        buffers: Buffers,
        *,
        precision: str,
        dense_grad: bool,
    ) -> ops.SparseCode:
        """The code of every token outside training: here the same."""
        return self.encode(x, W_enc, b_enc, b_dec, precision=precision, dense_grad=dense_grad)

    def buffers(self) -> Buffers:
        """New buffers: none."""
        return {}

    def follow_(self, buffers: Buffers, code: ops.SparseCode) -> None:
        """Learn from a code of training what inference needs: nothing."""

    def rescale_(self, buffers: Buffers, factor: Tensor) -> None:
        """Follow a change of the units that the code's values are in."""

    def auxiliary_loss(
        self,
        code: ops.SparseCode,
        residual: Tensor,  # [N, D], x̂ − x
        W_dec: nn.Parameter,  # [F, D]
        dead_mask: Tensor,  # [F] bool
        *,
        dense_grad: bool,
    ) -> Tensor:
        """AuxK with its coefficient: the dead latents, without b_dec, model the residual x − x̂.

        Its gradient reaches W_enc, b_enc and W_dec in the rows of the selected dead latents only.
        """
        if code.aux is None:
            return residual.new_zeros((), dtype=code.values.dtype)
        target = residual.detach().to(code.values.dtype).neg()
        modelled = ops.reconstruct(code.aux, W_dec, None, target, dense_grad=dense_grad)
        loss = aux_k_loss(modelled.squared_error, target, dead_mask.sum(), self.full_k_aux)
        return self.aux_k_coeff * loss
