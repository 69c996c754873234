"""JumpReLU: f = π · 1[π > θ], θ a trained threshold of every latent (arXiv:2407.14435).

The step is differentiated by a straight-through estimate over a window of width ε round θ:
∂f/∂θ = −(θ/ε) K((π − θ)/ε) and ∂1[π > θ]/∂θ = −(1/ε) K((π − θ)/ε), K = 1 on (−½, ½). So the code
lists entries from θ − ε/2 on: those below θ have the value 0 and move θ nevertheless. θ is a
float32 parameter itself, not its logarithm, which Adam would hardly move from a small start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast import ops
from sae_fast.autoencoder.architecture import (
    ArchitectureLoss,
    Batch,
    Engine,
    Weights,
    WholeStep,
)
from sae_fast.autoencoder.losses import deterministic_sum
from sae_fast.autoencoder.thresholded import Thresholded

_THRESHOLD = "threshold"


class JumpReLU(Thresholded):
    """Latents above their trained thresholds are active; a penalty makes them few."""

    term_names = ("sparsity_loss", "pre_act_loss")
    metric_names = ("mean_threshold",)

    def parameters(self) -> dict[str, Tensor]:
        """Return `threshold`, θ [F]."""
        start = self.config.jumprelu_init_threshold
        return {_THRESHOLD: torch.full((self.config.d_sae,), start, dtype=torch.float32)}

    def learning_rates(self) -> dict[str, float]:
        """Return the learning-rate multiplier of the thresholds."""
        return {_THRESHOLD: self.config.jumprelu_threshold_lr}

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        engine: Engine,
    ) -> ops.SparseCode:
        """Return the latents of every token that are above their thresholds."""
        return engine.encode_threshold(weights, x, weights.own[_THRESHOLD].detach())

    def thresholds(self, weights: Weights) -> Tensor:
        """Return θ, or 0 where it is below, [F]."""
        return weights.own[_THRESHOLD].clamp_min(0)

    def loss(self, weights: Weights, batch: Batch, engine: Engine) -> ArchitectureLoss:
        """Return squared error, sparsity penalty and the pre-activation loss of dead latents."""
        threshold = weights.own[_THRESHOLD]
        above = self._list_window(weights, batch, engine)
        spread = above.spread(threshold)
        estimate = self.config.jumprelu_bandwidth, self.config.jumprelu_ste_to_input
        code = above.with_values(_jump(above.values, spread, *estimate))
        modelled, recon_loss = self.reconstruct(weights, code, batch, engine)
        if self.config.sparsity_penalty == "tanh":
            penalty = engine.total(self._tanh_penalty(weights, code))
        else:
            l0 = deterministic_sum(_step(above.values, spread, *estimate)) / code.n_rows
            penalty = self._l0_penalty(_of_the_step(engine.total(l0), batch.whole))
        assert self.config.sparsity_penalty_coeff is not None
        coefficient = self.config.sparsity_penalty_coeff * batch.settings.sparsity_weight
        terms = {
            "sparsity_loss": coefficient * penalty,
            "pre_act_loss": engine.total(self.pre_act_loss(weights, batch, threshold)),
        }
        metrics = {"mean_threshold": engine.mean(threshold.detach())}
        return ArchitectureLoss(code, *modelled, recon_loss, terms, metrics)

    @property
    def needs_step_l0(self) -> bool:  # type: ignore[override]
        """Whether the penalty is no mean over tokens: l0_target squares the L0."""
        return self.config.sparsity_penalty == "l0_target"

    def count_active(self, weights: Weights, batch: Batch, engine: Engine) -> Tensor:
        """Return how many latents of a batch are active, 0-d, as `loss` counts them."""
        above = self._list_window(weights, batch, engine)
        return engine.total((above.values.detach() > self.config.jumprelu_bandwidth / 2).sum())

    def _list_window(self, weights: Weights, batch: Batch, engine: Engine) -> ops.Code:
        """Return ReLU(π − θ + ε/2): what lies above the threshold and in the window below it."""
        lowest = weights.own[_THRESHOLD].detach() - self.config.jumprelu_bandwidth / 2
        return self.list_above(weights, batch, engine, lowest)

    def clamp_parameters_(self, weights: Weights) -> None:
        """Keep θ at 0 or above, where a latent that fires has a positive value."""
        weights.own[_THRESHOLD].clamp_min_(0)

    def raise_thresholds_(
        self,
        weights: Weights,
        rise: Tensor,  # 0-d
    ) -> None:
        """Raise θ of all latents by `rise`."""
        weights.own[_THRESHOLD].add_(rise)

    def rescale_(self, weights: Weights, factor: Tensor) -> None:
        """Multiply the thresholds by `factor`, as the code's values were."""
        weights.own[_THRESHOLD].mul_(factor)

    def _l0_penalty(
        self,
        l0: Tensor,  # 0-d
    ) -> Tensor:
        """Return the L0, or (L0 / target − 1)²."""
        if self.config.sparsity_penalty == "l0":
            return l0
        assert self.config.target_l0 is not None
        return (l0 / self.config.target_l0 - 1).square()

    def _tanh_penalty(self, weights: Weights, code: ops.Code) -> Tensor:
        """Return Σ_i tanh(c f_i |W_dec,i|), averaged over tokens."""
        row_norms = self.row_norms(weights)
        amounts = code.values if row_norms is None else code.values * code.spread(row_norms)
        return deterministic_sum((self.config.jumprelu_tanh_scale * amounts).tanh()) / code.n_rows


def _of_the_step(
    l0: Tensor,  # 0-d, of one batch, with its gradient
    whole: WholeStep | None,
) -> Tensor:
    """Return the L0 of all parts of a step where it is known, with the gradient of the part's."""
    if whole is None or whole.l0 is None:
        return l0
    return whole.l0 + (l0 - l0.detach())


def _jump(
    above: Tensor,  # [nnz] or [N, F], ReLU(π − θ + ε/2)
    threshold: Tensor,  # broadcast to it
    bandwidth: float,
    ste_to_input: bool,
) -> Tensor:
    """Return f = π · 1[π > θ] in the shape of `above`."""
    f: Tensor = _Jump.apply(above, threshold, bandwidth, ste_to_input)  # type: ignore[no-untyped-call]
    return f


def _step(
    above: Tensor,  # [nnz] or [N, F], ReLU(π − θ + ε/2)
    threshold: Tensor,  # broadcast to it
    bandwidth: float,
    ste_to_input: bool,
) -> Tensor:
    """Return 1[π > θ] in the shape of `above`."""
    step: Tensor = _Step.apply(above, threshold, bandwidth, ste_to_input)  # type: ignore[no-untyped-call]
    return step


def _kernel(above: Tensor, bandwidth: float) -> Tensor:
    """Return K((π − θ)/ε), bool: π lies in the window."""
    return (above > 0) & (above < bandwidth)


class _Jump(torch.autograd.Function):
    """Autograd of `_jump`. With `ste_to_input` the window's share of the gradient reaches π too."""

    @staticmethod
    def forward(
        ctx: Any, above: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool
    ) -> Tensor:
        ctx.save_for_backward(above, threshold)
        ctx.bandwidth, ctx.ste_to_input = bandwidth, ste_to_input
        pre_acts = above + (threshold - bandwidth / 2)
        return torch.where(~(above <= bandwidth / 2), pre_acts, 0)  # NaN stays

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        above, threshold = ctx.saved_tensors
        in_window = torch.where(_kernel(above, ctx.bandwidth), grad, 0)
        in_window = in_window * (threshold / ctx.bandwidth)
        grad_above = torch.where(above > ctx.bandwidth / 2, grad, 0)
        if ctx.ste_to_input:
            grad_above = grad_above + in_window
        return grad_above, -in_window.sum_to_size(threshold.shape), None, None


class _Step(torch.autograd.Function):
    """Autograd of `_step`. With `ste_to_input` the window's share of the gradient reaches π too."""

    @staticmethod
    def forward(
        ctx: Any, above: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool
    ) -> Tensor:
        ctx.save_for_backward(above)
        ctx.shape, ctx.bandwidth, ctx.ste_to_input = threshold.shape, bandwidth, ste_to_input
        return (above > bandwidth / 2).to(above.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (above,) = ctx.saved_tensors
        in_window = torch.where(_kernel(above, ctx.bandwidth), grad / ctx.bandwidth, 0)
        grad_above = in_window if ctx.ste_to_input else None
        return grad_above, -in_window.sum_to_size(ctx.shape), None, None
