"""TopK, BatchTopK and Matryoshka: the largest pre-activations are active.

TopK (arXiv:2406.04093) takes the k largest of each token. With it go AuxK for dead latents,
Multi-TopK, which lets 4k latents reconstruct too, so that a code is of use at another k than it was
trained with, and two other choices of k latents: the largest in magnitude, with their sign
(abs_topk), and the largest of each of k groups (groupmax).

BatchTopK (arXiv:2412.06410) takes the N·k largest of a batch, so that a token has k on average. At
inference a token's code must not depend on its batch: then the latents above `threshold` are
active, an average over training batches of the least active value among their N·k largest.

Matryoshka (arXiv:2503.17547) is BatchTopK whose first latents must reconstruct alone as well. The
first m_g latents give x̂_g = Σ_{j<m_g} f_j W_dec,j + b_dec, and the loss is Σ_g w_g ‖x − x̂_g‖²: a
sum over prefixes, not their mean, so that AuxK weighs as much beside it as beside one
reconstruction.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import losses
from sae_fast.autoencoder.architecture import (
    Architecture,
    ArchitectureLoss,
    Batch,
    Engine,
    StepSettings,
    Weights,
)
from sae_fast.config import SAEConfig

MULTI = 4  # Multi-TopK takes so many times k
# BatchTopK: batch t has the weight min(1, 16 / t) in the average, at least 1 / 100: at first only
# the latest counts, then about a sixteenth of all, and in the end 100. With a plain mean of the
# first 100 the threshold lags: held-out L0 after 50 steps (lr 3e-3, batches of 64 to 4096) is 0.16
# to 0.42 of k.
_FORGETTING = 16
_WINDOW = 100


class TopK(Architecture):
    """Select the k largest latents of a token; AuxK and Multi-TopK."""

    term_names: tuple[str, ...] = ("l1_loss", "aux_loss")
    compares_latents = True

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        assert config.k is not None
        assert config.aux_k_coeff is not None
        self.k = config.k
        self.selection: str = config.activation
        self.aux_k_coeff = config.aux_k_coeff
        self.full_k_aux = config.kept_aux_k
        if config.multi_topk:
            self.term_names = (*self.term_names, "multi_topk_loss")

    def encode(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        engine: Engine,
        dead_mask: Tensor | None = None,  # [F] bool
        k_aux: int | None = None,
        k: int | None = None,
    ) -> ops.SparseCode:
        """Return the code of a batch in training; `code.aux` has the k_aux best dead latents.

        By default k is the model's, and k_aux the number of dead latents, for which the host waits.
        """
        if dead_mask is None or self.full_k_aux == 0:
            k_aux = 0
        elif k_aux is None:
            k_aux = min(self.full_k_aux, int(engine.count_latents(dead_mask)))
        return engine.encode_topk(
            weights,
            x,
            self.k if k is None else k,
            selection=self.selection,
            dead_mask=dead_mask,
            k_aux=k_aux,
        )

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        engine: Engine,
    ) -> ops.SparseCode:
        """Return the code of every token, selected as in training."""
        return self.encode(weights, x, engine)

    def loss(self, weights: Weights, batch: Batch, engine: Engine) -> ArchitectureLoss:
        """Return the squared error and, where their coefficients ask for them, the other terms.

        These are L1, AuxK and Multi-TopK.
        """
        config, settings = self.config, batch.settings
        dead = batch.dead_mask, settings.k_aux
        k = self.k if settings.k is None else settings.k
        if config.multi_topk:
            wide = self.encode(weights, batch.x, engine, *dead, k=min(MULTI * k, config.d_sae))
            code = _first(wide, k)
        else:
            code = self.encode(weights, batch.x, engine, *dead, k=k)
        modelled, recon_loss = self.reconstruct(weights, code, batch, engine)
        terms = self._auxiliary_terms(weights, code, modelled.residual, batch, engine)
        if config.l1_penalty_coeff:
            weight = config.l1_penalty_coeff * settings.sparsity_weight
            terms["l1_loss"] = weight * engine.total(self.penalty(weights, code))
        if config.multi_topk:
            # One encoder call gives both codes, so that the gradient of either reaches W_enc.
            _, multi_loss = self.reconstruct(weights, wide, batch, engine)
            terms["multi_topk_loss"] = config.multi_topk_coeff * multi_loss
        return ArchitectureLoss(code, *modelled, recon_loss, terms)

    def reads_dead_mask(self, settings: StepSettings) -> bool:
        """Return whether dead latents are trained in a step."""
        return self.has_aux_k and settings.k_aux != 0

    @property
    def has_aux_k(self) -> bool:  # type: ignore[override]
        """Whether dead latents are trained."""
        return self.full_k_aux > 0

    def residual(self, weights: Weights, batch: Batch, engine: Engine) -> Tensor:
        """Return x̂ − x of a batch, [N, D], or ŷ − y, as `loss` computes it."""
        code = self.encode(weights, batch.x, engine, k=batch.settings.k)
        return engine.reconstruct(code, weights.W_dec, weights.b_dec, batch.target).residual

    def _auxiliary_terms(
        self,
        weights: Weights,
        code: ops.SparseCode,
        residual: Tensor,  # [N, D], x̂ − x, or ŷ − y
        batch: Batch,
        engine: Engine,
    ) -> dict[str, Tensor]:
        """Return AuxK with its coefficient, if there is any.

        The dead latents model the residual, without b_dec. The gradient reaches W_enc, b_enc and
        W_dec in the rows of the selected dead latents only: W_enc and b_enc straight through ReLU,
        which leaves the values of most of them at 0. The term is in units of the reconstruction
        error, so that Adam's moments, which a latent has from the time before it died, do not make
        its steps short.
        """
        if code.aux is None:
            return {}
        target = torch.empty_like(residual, dtype=code.values.dtype)
        torch.mul(residual.detach(), -1.0, out=target)  # in one pass
        modelled = engine.reconstruct(code.aux, weights.W_dec, None, target)
        assert batch.dead_mask is not None
        n_dead = engine.count_latents(batch.dead_mask)
        variance = None
        if batch.whole is not None and batch.whole.residual_variance is not None:
            variance = batch.whole.residual_variance / batch.whole.n_parts
        loss = losses.aux_k_loss(
            *(modelled.squared_error, target, n_dead, self.full_k_aux), variance=variance
        )
        return {"aux_loss": self.aux_k_coeff * self.config.error_of_the_mean * loss}


class BatchTopK(TopK):
    """Select the N·k largest latents of a batch, at inference those above a fixed threshold."""

    selects_from_step = True

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        self.selection = "batch_topk"

    def buffers(self) -> dict[str, Tensor]:
        """Return `threshold` and how many batches have set it, both 0-d and 0."""
        return {
            "threshold": torch.zeros((), dtype=torch.float32),
            "threshold_updates": torch.zeros((), dtype=torch.int64),
        }

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        engine: Engine,
    ) -> ops.SparseCode:
        """Return the latents above the threshold; before any training as in a batch."""
        n_updates = weights.own["threshold_updates"].item()
        if torch.compiler.is_exporting():  # a program without the branch, which checks this
            torch._check(  # type: ignore[no-untyped-call]
                n_updates > 0, lambda: "the model was exported before any training"
            )
        if n_updates == 0:
            return self.encode(weights, x, engine)
        threshold = weights.own["threshold"].expand(len(weights.W_enc))
        return engine.encode_threshold(weights, x, threshold)

    def thresholds(self, weights: Weights) -> Tensor | None:
        """Return the threshold of inference for every latent, [F]; None before any training."""
        if int(weights.own["threshold_updates"]) == 0:
            return None
        return weights.own["threshold"].clamp_min(0).expand(len(weights.W_enc))

    def after_step_(
        self,
        weights: Weights,
        code: ops.Code,
        observed: dict[str, Tensor],
        sparsity_weight: float | Tensor,
    ) -> None:
        """Move the threshold towards the least active value of `code`, if it has any.

        While k is annealed the code has more than N·k entries; the largest N·k count.
        """
        threshold, updates = weights.own["threshold"], weights.own["threshold_updates"]
        values, wanted = code.values.detach().flatten(), code.n_rows * self.k
        if len(values) > wanted:
            values = values.sort(descending=True).values[:wanted]
        least = torch.where(values > 0, values, torch.inf).amin()
        found = torch.isfinite(least)
        updates.add_(found)
        rate = (_FORGETTING / updates.clamp_min(1).float()).clamp(1 / _WINDOW, 1.0)
        threshold.add_(torch.where(found, rate * (least - threshold), 0.0))

    @property
    def wanted_l0(self) -> float | None:
        """k, which training has over a batch; None where it is more than half of the latents.

        ReLU leaves fewer of them active then.
        """
        return float(self.k) if 2 * self.k <= self.config.d_sae else None

    def raise_thresholds_(
        self,
        weights: Weights,
        rise: Tensor,  # 0-d
    ) -> None:
        """Raise the threshold of inference by `rise`."""
        weights.own["threshold"].add_(rise).clamp_min_(0)

    def rescale_(self, weights: Weights, factor: Tensor) -> None:
        """Multiply the threshold by `factor`, as the code's values were."""
        weights.own["threshold"].mul_(factor)


class Matryoshka(BatchTopK):
    """BatchTopK with a reconstruction by each prefix of the dictionary."""

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        assert config.matryoshka_prefixes is not None
        assert config.matryoshka_weights is not None
        self.prefixes = config.matryoshka_prefixes
        self.prefix_weights = config.matryoshka_weights

    def reconstruct(
        self, weights: Weights, code: ops.Code, batch: Batch, engine: Engine
    ) -> tuple[ops.Reconstruction, Tensor]:
        """Return the whole dictionary's reconstruction and the weighted error of all prefixes."""
        assert isinstance(code, ops.SparseCode)
        modelled = engine.reconstruct_prefixes(
            code, weights.W_dec, weights.b_dec, batch.target, self.prefixes
        )
        by_prefix = modelled.squared_errors.unbind(1)  # each [N]
        weighted = torch.zeros_like(by_prefix[0])
        for weight, squared_error in zip(self.prefix_weights, by_prefix, strict=True):
            weighted = weighted + weight * squared_error
        whole = ops.Reconstruction(modelled.residual, by_prefix[-1])
        return whole, batch.error_term(weighted)


def _first(code: ops.SparseCode, k: int) -> ops.SparseCode:
    """Return the first k entries of every row, which are the largest."""
    values, indices = code.values[:, :k].contiguous(), code.indices[:, :k].contiguous()
    return replace(code, values=values, indices=indices)
