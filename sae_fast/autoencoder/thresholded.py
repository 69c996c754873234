"""ReLU and Gated, and what they share with JumpReLU: all latents that reach a limit are active.

That is half of the latents when training starts and few later. A step works on all latents
(DenseCode, matrix products, dense gradients) or on those listed (SparseCode, row factors), by how
many the batch before would list; the results are the same to float32 rounding.

ReLU, f = ReLU((x − b_dec) W_encᵀ + b_enc), with the loss squared error + λ Σ_i f_i |W_dec,i|, are
the first SAEs of the field. With a free decoder, starting from rows of norm 0.1 and λ = 5, it is
the recipe of Anthropic's April 2024 update; with unit rows the penalty is the plain L1. A plain L1
with a free decoder does not exist: growing W_dec would escape it. Without use_relu f = (x − b_dec)
W_encᵀ + b_enc, and the penalty is on |f_i|. Such a code is dense: L1 makes its values small, and
none of them exactly 0.

Gated (arXiv:2404.16014): one linear map decides which latents are active, and scaled and shifted,
how strongly. π = (x − b_dec) W_encᵀ + b_enc, magnitude = ReLU((π − b_enc) e^r_mag + b_mag),
f = 1[π > 0] · magnitude: b_enc is the paper's b_gate. The L1 penalty is on ReLU(π), which an
auxiliary term keeps useful: ReLU(π) has to reconstruct x as well, by a decoder that is detached,
since the decoder serves f alone. Both come from one encoding of the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import losses, target_l0
from sae_fast.autoencoder.architecture import (
    Architecture,
    ArchitectureLoss,
    Batch,
    Engine,
    Weights,
)
from sae_fast.config import SAEConfig
from sae_fast.ops.dense_product import linear

LISTED = "listed_per_token"
TOKENS = "tokens"  # among the sums of a step, the one that is not over latents
_ACTIVE, _EXCESS = "active", "excess"
# Share of all latents, listed per token, from which working on all of them is the faster way. It
# is as fast at 16 to 20 % with relu, 23 to 26 % with gated, 24 to 30 % with jumprelu, by size
# (benchmarks/results/dense_switch.md).
DENSE_FROM = 0.2


class Thresholded(Architecture):
    """Base of relu, jumprelu and gated: list latents above a limit, and weigh what they cost."""

    needs_host_sync = True  # for the number of entries; and to read which way to work

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        self.unit_norm = config.decoder_norm == "unit"

    def buffers(self) -> dict[str, Tensor]:
        """Return listed_per_token, d_sae at first, and the L0 controller's state if there is one.

        listed_per_token, 0-d, is how many entries per token the last batch has listed.
        """
        listed = {LISTED: torch.tensor(float(self.config.d_sae), dtype=torch.float32)}
        return listed | (target_l0.start() if self._is_controlled else {})

    @property
    def wanted_l0(self) -> float | None:
        """`target_l0`."""
        return self.config.target_l0

    @property
    def _is_controlled(self) -> bool:
        """Whether a controller adapts the coefficient of the L1 penalty to `target_l0`."""
        return self.config.target_l0 is not None and "l1_loss" in self.term_names

    @property
    def metric_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The coefficient of the L1 penalty, where a controller adapts it."""
        return ("sparsity_coeff",) if self._is_controlled else ()

    def list_above(
        self,
        weights: Weights,
        batch: Batch,
        engine: Engine,
        limit: Tensor | None = None,  # [F]; None: 0
    ) -> ops.Code:
        """Return ReLU((x − b_dec) W_encᵀ + b_enc − limit), without a gradient to `limit`.

        Latents of negative pre-activation are listed too where they are above their limit.
        """
        b_enc = weights.b_enc if limit is None else weights.b_enc - limit.detach()
        if float(weights.own[LISTED]) >= DENSE_FROM * self.config.d_sae:
            ops.drop_copies(weights.W_enc)  # nothing reads them now; an evaluation has made one
            return engine.encode_dense(weights, batch.x, b_enc=b_enc)
        return engine.encode_threshold(weights, batch.x, b_enc=b_enc)

    def row_norms(self, weights: Weights) -> Tensor | None:
        """Return |W_dec,i| [F], the weight of a latent's activation; None: all 1."""
        if self.unit_norm:
            return None
        norms: Tensor = torch.linalg.vector_norm(weights.W_dec, dim=1)
        return norms

    def penalty(self, weights: Weights, code: ops.Code) -> Tensor:
        """Return Σ_i f_i |W_dec,i|, a mean over tokens; or its Lp form, see `losses.lp_loss`."""
        return losses.lp_loss(code, self.config.sparsity_norm_p, self.row_norms(weights))

    def l1_loss(self, weights: Weights, code: ops.Code, batch: Batch, engine: Engine) -> Tensor:
        """Return the penalty with its coefficient."""
        weight = self._coefficient(weights) * batch.settings.sparsity_weight
        return weight * engine.total(self.penalty(weights, code))

    def pre_act_loss(
        self,
        weights: Weights,
        batch: Batch,
        threshold: Tensor | None = None,  # [F]; None: 0
    ) -> Tensor:
        """Return Σ ReLU(θ_i − π_i) |W_dec,i| over the dead latents, averaged over tokens.

        It has its coefficient. As with AuxK b_dec gets no gradient: all latents share it, and it
        must not suit the dead.
        """
        coefficient = self.config.pre_act_loss_coeff
        assert batch.dead_mask is not None
        dead = batch.dead_mask.nonzero().flatten()
        if not coefficient or len(dead) == 0:
            return batch.x.new_zeros(())
        W_enc, b_enc = weights.W_enc[dead], weights.b_enc[dead]
        pre_acts = linear(batch.x - weights.input_bias.detach(), W_enc, b_enc)
        missing = (-pre_acts if threshold is None else threshold[dead] - pre_acts).relu()
        if not self.unit_norm:
            missing = missing * torch.linalg.vector_norm(weights.W_dec[dead], dim=1)
        return coefficient * losses.deterministic_sum(missing) / len(batch.x)

    def metrics(self, weights: Weights) -> dict[str, Tensor]:
        """Return the metrics of `metric_names`."""
        if not self._is_controlled:
            return {}
        return {"sparsity_coeff": torch.as_tensor(self._coefficient(weights))}

    def observe(self, code: ops.Code) -> dict[str, Tensor]:
        """Return the numbers of tokens, of listed entries and, for a controller, of active ones."""
        device = code.values.device
        counts = {
            TOKENS: torch.full((), code.n_rows, device=device),
            LISTED: torch.as_tensor(code.n_listed, device=device),
        }
        if self.config.target_l0 is not None:
            counts[_ACTIVE] = code.n_active()
        return counts

    def observe_excess(self, weights: Weights, code: ops.Code) -> dict[str, Tensor]:
        """Return by how much values exceed their thresholds, where the L0 has a target."""
        limits = self.thresholds(weights)
        if self.config.target_l0 is None or limits is None:
            return {}
        above = (code.values.detach() - code.spread(limits.detach())).relu()
        return {_EXCESS: losses.deterministic_sum(above)}

    def after_step_(
        self,
        weights: Weights,
        code: ops.Code,
        observed: dict[str, Tensor],
        sparsity_weight: float | Tensor,
    ) -> None:
        """Note how many entries were listed; lead the L0 to its target."""
        n_tokens, target = observed[TOKENS], self.config.target_l0
        weights.own[LISTED].copy_(losses.ratio(observed[LISTED], n_tokens))
        if target is None:
            return
        l0 = losses.ratio(observed[_ACTIVE], n_tokens)
        weight = torch.as_tensor(sparsity_weight, dtype=l0.dtype, device=l0.device)
        if self._is_controlled:
            rate = self.config.target_l0_rate
            target_l0.steer_(weights.own, l0, target, rate, is_on=weight >= 1)
        excess = observed[_EXCESS] / observed[_ACTIVE]
        rise = target_l0.shift(l0, target, self.config.d_sae, excess, weight)
        self.raise_thresholds_(weights, rise)

    def raise_thresholds_(
        self,
        weights: Weights,
        rise: Tensor,  # 0-d
    ) -> None:
        """Let all latents become active at a pre-activation that is larger by `rise`.

        It is b_enc that falls; with relu the values of a code fall with it.
        """
        weights.b_enc.sub_(rise)

    def warning(self, metrics: dict[str, float]) -> str | None:
        """Say when the controller has reached the end of its range."""
        coefficient, target = self.config.l1_penalty_coeff, self.config.target_l0
        if "sparsity_coeff" not in metrics or not coefficient or target is None:
            return None
        scale = metrics["sparsity_coeff"] / coefficient
        return target_l0.saturation(scale, coefficient, target)

    def _coefficient(self, weights: Weights) -> float | Tensor:
        """Return the coefficient of the L1 penalty, before its warm-up."""
        coefficient = self.config.l1_penalty_coeff or 0.0
        if not self._is_controlled:
            return coefficient
        return coefficient * weights.own[target_l0.SCALE]


class ReLU(Thresholded):
    """All latents above 0 are active; an L1 or Lp penalty makes them few."""

    term_names: tuple[str, ...] = ("l1_loss",)

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        engine: Engine,
    ) -> ops.SparseCode:
        """Return the latents of every token that are above 0, or without ReLU all of them."""
        if not self.config.use_relu:
            return engine.encode_dense(weights, x, relu=False).listed()
        return engine.encode_threshold(weights, x)

    def thresholds(self, weights: Weights) -> Tensor | None:
        """Return zeros [F]; None without ReLU."""
        return torch.zeros_like(weights.b_enc) if self.config.use_relu else None

    def loss(self, weights: Weights, batch: Batch, engine: Engine) -> ArchitectureLoss:
        """Return the squared error and the L1 or Lp penalty."""
        code: ops.Code
        if self.config.use_relu:
            code = self.list_above(weights, batch, engine)
        else:
            code = engine.encode_dense(weights, batch.x, relu=False)
        # Before the reconstruction, so that backward comes to the reconstruction first: to its
        # gradient of a dense code the penalty's is added in place, and not the other way round.
        terms = {"l1_loss": self.l1_loss(weights, code, batch, engine)}
        modelled, recon_loss = self.reconstruct(weights, code, batch, engine)
        metrics = self.metrics(weights)
        return ArchitectureLoss(code, *modelled, recon_loss, terms, metrics)


class Gated(Thresholded):
    """A gate decides which latents are active, a magnitude how strongly."""

    term_names = ("l1_loss", "aux_loss", "pre_act_loss")

    def parameters(self) -> dict[str, Tensor]:
        """Return `r_mag` and `b_mag`, [F] of 0: at first the magnitude is the gate's."""
        start = torch.zeros(self.config.d_sae, dtype=torch.float32)
        return {name: start.clone() for name in ("r_mag", "b_mag")}

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        engine: Engine,
    ) -> ops.SparseCode:
        """Return the magnitudes of the latents whose gates are open."""
        gate = engine.encode_threshold(weights, x)
        return gate.with_values(_magnitudes(weights, gate))

    def thresholds(self, weights: Weights) -> Tensor:
        """Return the magnitude, or 0, at which the gate of each latent opens, [F]."""
        scale = weights.own["r_mag"].exp()
        return (weights.own["b_mag"] - weights.b_enc * scale).relu()

    def loss(self, weights: Weights, batch: Batch, engine: Engine) -> ArchitectureLoss:
        """Return the squared error, the L1 penalty on the gate, and the gate's reconstruction."""
        gate = self.list_above(weights, batch, engine)
        code = gate.with_values(_magnitudes(weights, gate))
        modelled, recon_loss = self.reconstruct(weights, code, batch, engine)
        frozen = (weights.W_dec.detach(), weights.b_dec.detach())
        target = batch.target.detach()  # a skip connection serves f alone, too
        by_gate = engine.reconstruct(gate, *frozen, target)
        terms = {
            "l1_loss": self.l1_loss(weights, gate, batch, engine),
            "aux_loss": batch.error_term(by_gate.squared_error),
            "pre_act_loss": engine.total(self.pre_act_loss(weights, batch)),
        }
        metrics = self.metrics(weights)
        return ArchitectureLoss(code, *modelled, recon_loss, terms, metrics)

    def raise_thresholds_(
        self,
        weights: Weights,
        rise: Tensor,  # 0-d
    ) -> None:
        """Let all gates open at magnitudes that are larger by `rise`, of 0 and above.

        A gate that opened earlier would let nothing pass.
        """
        shrink = (-weights.own["r_mag"]).exp()
        highest = torch.maximum(weights.b_enc, weights.own["b_mag"] * shrink)
        weights.b_enc.copy_(torch.minimum(weights.b_enc - rise * shrink, highest))

    def rescale_(self, weights: Weights, factor: Tensor) -> None:
        """Multiply the magnitudes' bias by `factor`, as the code's values were."""
        weights.own["b_mag"].mul_(factor)

    def rebase_(self, weights: Weights, moved: Tensor) -> None:
        """Subtract `moved` from the magnitudes too, which are of the product without b_enc."""
        weights.own["b_mag"].sub_(weights.own["r_mag"].exp() * moved)


def _magnitudes(weights: Weights, gate: ops.Code) -> Tensor:
    """Return f in the shape of the gate's values."""
    scale = weights.own["r_mag"].exp()
    shift = weights.own["b_mag"] - weights.b_enc * scale
    magnitudes = torch.addcmul(gate.spread(shift), gate.values, gate.spread(scale)).relu()
    return torch.where(gate.values == 0, 0, magnitudes)
