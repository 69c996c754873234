"""One training step of every architecture in plain dense PyTorch, as packaged trainers write it.

Pre-activations, code, products and gradients are dense. All architectures share the parts around
the loss: projection, clip, Adam, unit rows and counters of silent tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast.autoencoder import SparseAutoencoder

GRADIENT_CLIP = 1.0


class DenseArchitecture:
    """Trains a copy of a model's weights with the dense form of its architecture.

    Args:
        sae: the model whose weights are copied.
        lr: Adam's learning rate.
    """

    def __init__(self, sae: SparseAutoencoder, lr: float) -> None:
        self.config = sae.config
        self.unit_norm = sae.architecture.unit_norm
        self.p = {name: nn.Parameter(p.detach().clone()) for name, p in sae.named_parameters()}
        # A controller of L0 has multiplied the penalty's coefficient by this factor.
        scale = dict(sae.named_buffers()).get("sparsity_scale", torch.ones(()))
        self.l1_coeff = (sae.config.l1_penalty_coeff or 0.0) * float(scale)
        self.tokens_since_fired = torch.zeros(sae.config.d_sae, dtype=torch.int64)
        self.optimizer = torch.optim.Adam(self.p.values(), lr=lr, fused=True)
        self.loss: Callable[[Tensor], tuple[Tensor, Tensor]] = getattr(self, f"_{sae.config.arch}")

    def step(self, x: Tensor) -> Tensor:
        """Take one whole training step on x [N, D]; return the loss."""
        loss, code = self.loss(x)
        loss.backward()  # type: ignore[no-untyped-call]
        W_dec = self.p["W_dec"]
        with torch.no_grad():
            if self.unit_norm:
                assert W_dec.grad is not None
                W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(list(self.p.values()), GRADIENT_CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.unit_norm:
                W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
            self.tokens_since_fired += len(x)
            self.tokens_since_fired.masked_fill_((code > 0).any(0), 0)
        return loss.detach()

    def _pre_acts(self, x: Tensor) -> Tensor:  # [N, F]
        return (x - self.p["b_dec"]) @ self.p["W_enc"].t() + self.p["b_enc"]

    def _squared_error(self, x: Tensor, code: Tensor) -> Tensor:
        x_hat = code @ self.p["W_dec"] + self.p["b_dec"]
        return (x - x_hat).square().sum(1).mean()

    def _weighted(self, code: Tensor) -> Tensor:
        """Return the code times the decoder rows' norms, unless these are fixed at 1."""
        return code if self.unit_norm else code * self.p["W_dec"].norm(dim=1)

    def _topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.config.k is not None
        values, indices = self._pre_acts(x).relu().topk(self.config.k, dim=1)
        code = torch.zeros(len(x), self.config.d_sae).scatter(1, indices, values)
        return self._squared_error(x, code), code

    def _batch_code(self, x: Tensor) -> Tensor:
        assert self.config.k is not None
        flat = self._pre_acts(x).relu().flatten()
        values, places = flat.topk(self.config.k * len(x))
        return torch.zeros_like(flat).scatter(0, places, values).view(len(x), -1)

    def _batch_topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self._batch_code(x)
        return self._squared_error(x, code), code

    def _matryoshka(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.config.matryoshka_prefixes is not None
        assert self.config.matryoshka_weights is not None
        code = self._batch_code(x)
        residual, begin, loss = self.p["b_dec"] - x, 0, x.new_zeros(())
        prefixes = zip(self.config.matryoshka_prefixes, self.config.matryoshka_weights, strict=True)
        for end, weight in prefixes:
            residual = residual + code[:, begin:end] @ self.p["W_dec"][begin:end]
            loss, begin = loss + weight * residual.square().sum(1).mean(), end
        return loss, code

    def _relu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self._pre_acts(x).relu()
        penalty = self._weighted(code).sum(1).mean()
        return self._squared_error(x, code) + self.l1_coeff * penalty, code

    def _jumprelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre_acts, threshold = self._pre_acts(x), self.p["threshold"]
        bandwidth = self.config.jumprelu_bandwidth
        code = _Jump.apply(pre_acts, threshold, bandwidth)  # type: ignore[no-untyped-call]
        l0 = _Step.apply(pre_acts, threshold, bandwidth).sum(1).mean()  # type: ignore[no-untyped-call]
        assert self.config.target_l0 is not None
        assert self.config.sparsity_penalty_coeff is not None
        penalty = (l0 / self.config.target_l0 - 1).square()
        loss = self._squared_error(x, code) + self.config.sparsity_penalty_coeff * penalty
        return loss, code

    def _gated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre_acts = self._pre_acts(x)
        gate = pre_acts.relu()
        scaled = (pre_acts - self.p["b_enc"]) * self.p["r_mag"].exp()
        code = (pre_acts > 0) * (scaled + self.p["b_mag"]).relu()
        by_gate = gate @ self.p["W_dec"].detach() + self.p["b_dec"].detach()
        auxiliary = (x - by_gate).square().sum(1).mean()
        penalty = self.l1_coeff * self._weighted(gate).sum(1).mean()
        return self._squared_error(x, code) + penalty + auxiliary, code


class _Jump(torch.autograd.Function):
    """π · 1[π > θ] with the rectangle's estimate of the gradient of θ."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pre_acts, threshold = ctx.saved_tensors
        window = (pre_acts - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = -(threshold / ctx.bandwidth) * (window * grad).sum(0)
        return grad * (pre_acts > threshold), grad_threshold, None


class _Step(torch.autograd.Function):
    """1[π > θ] with the rectangle's estimate of the gradient of θ."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pre_acts, threshold = ctx.saved_tensors
        window = (pre_acts - threshold).abs() < ctx.bandwidth / 2
        return None, -(window * grad).sum(0) / ctx.bandwidth, None
