"""What relu, jumprelu and gated share: a token has all latents that reach a limit, however many.

That is half of them when training starts and few later. A step works on all latents (DenseCode,
matrix products, dense gradients) or on those listed (SparseCode, row factors), by how many the
batch before would list; the results are the same to float32 rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import losses, target_l0
from sae_fast.autoencoder.architecture import Architecture, Batch, Mode, Weights
from sae_fast.config import SAEConfig

LISTED = "listed_per_token"
_TOKENS, _ACTIVE = "tokens", "active"
# Share of all latents, listed per token, from which working on all of them is the faster way. It
# is as fast at 16 to 20 % with relu, 23 to 26 % with gated, 24 to 30 % with jumprelu, by size
# (benchmarks/results/dense_switch.md).
DENSE_FROM = 0.2


class Thresholded(Architecture):
    """Lists latents above a limit, one way or the other, and weights what they cost."""

    waits = True  # for the number of entries; and to read which way to go

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        self.unit_norm = config.decoder_norm == "unit"

    def buffers(self) -> dict[str, Tensor]:
        """`listed_per_token` of the last batch, 0-d, all at the start; those of a controller."""
        listed = {LISTED: torch.tensor(float(self.config.d_sae), dtype=torch.float32)}
        return listed | (target_l0.start() if self._is_controlled else {})

    @property
    def _is_controlled(self) -> bool:
        """Whether the coefficient of the L1 penalty is led to `target_l0`."""
        return self.config.target_l0 is not None and "l1_loss" in self.term_names

    @property
    def figure_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The coefficient of the L1 penalty where it is led to a target."""
        return ("sparsity_coeff",) if self._is_controlled else ()

    def list_above(
        self,
        weights: Weights,
        batch: Batch,
        mode: Mode,
        limit: Tensor | None = None,  # [F]; None: 0
    ) -> ops.Code:
        """ReLU((x − b_dec) W_encᵀ + b_enc − limit), listed where above 0; `limit` gets no gradient.

        Latents of negative pre-activation are listed too where they are above their limit.
        """
        bias = weights.b_enc if limit is None else weights.b_enc - limit.detach()
        arguments = (batch.x, weights.W_enc, bias, weights.input_bias)
        if float(weights.own[LISTED]) >= DENSE_FROM * self.config.d_sae:
            ops.drop_copies(weights.W_enc)  # nothing reads them now; an evaluation has made one
            return ops.encode_dense(*arguments, precision=mode.precision)
        return ops.encode_threshold(
            *arguments,
            torch.zeros_like(bias),
            precision=mode.precision,
            dense_grad=mode.dense_grad,
        )

    def row_norms(self, weights: Weights) -> Tensor | None:
        """|W_dec,i| [F], which a latent's activation is weighted by; None: all 1."""
        if self.unit_norm:
            return None
        norms: Tensor = torch.linalg.vector_norm(weights.W_dec, dim=1)
        return norms

    def l1_loss(self, weights: Weights, code: ops.Code, batch: Batch, p: float = 1.0) -> Tensor:
        """The L1 (or Lp) penalty on a code's values with its coefficient."""
        loss = losses.lp_loss(code, p, self.row_norms(weights))
        return self._coefficient(weights) * batch.sparsity_weight * loss

    def figures(self, weights: Weights) -> dict[str, Tensor]:
        """The figures of a loss that are not the architecture's own."""
        if not self._is_controlled:
            return {}
        return {"sparsity_coeff": torch.as_tensor(self._coefficient(weights))}

    def observe(self, code: ops.Code) -> dict[str, Tensor]:
        """Return the numbers of tokens, of listed entries and, for a controller, of active ones."""
        device = code.values.device
        counts = {
            _TOKENS: torch.full((), code.n_rows, device=device),
            LISTED: torch.as_tensor(code.n_listed, device=device),
        }
        if self._is_controlled:
            counts[_ACTIVE] = code.n_active()
        return counts

    def steer_(
        self, weights: Weights, observed: dict[str, Tensor], sparsity_weight: float | Tensor
    ) -> None:
        """Note how many entries were listed; lead the coefficient to the target."""
        n_tokens = observed[_TOKENS]
        weights.own[LISTED].copy_(losses.ratio(observed[LISTED], n_tokens))
        if self.config.target_l0 is not None and self._is_controlled:
            is_on = torch.as_tensor(sparsity_weight, device=n_tokens.device) >= 1
            rate, l0 = self.config.target_l0_rate, losses.ratio(observed[_ACTIVE], n_tokens)
            target_l0.steer_(weights.own, l0, self.config.target_l0, rate, is_on)

    def warning(self, figures: dict[str, float]) -> str | None:
        """That the coefficient cannot get any further towards the target."""
        coefficient, target = self.config.l1_penalty_coeff, self.config.target_l0
        if "sparsity_coeff" not in figures or not coefficient or target is None:
            return None
        scale = figures["sparsity_coeff"] / coefficient
        return target_l0.saturation(scale, coefficient, target)

    def _coefficient(self, weights: Weights) -> float | Tensor:
        """Of the L1 penalty, before its warm-up."""
        coefficient = self.config.l1_penalty_coeff or 0.0
        if not self._is_controlled:
            return coefficient
        return coefficient * weights.own[target_l0.SCALE]
