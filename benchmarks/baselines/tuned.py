"""The step of eager.py with faster PyTorch: gathers instead of dense products, and fused Adam.

`TunedTrainer` decodes with embedding_bag instead of a dense product. `GatherTrainer` also keeps the
encoder's backward sparse, as sparsify does on a CPU: it needs fewer operations but a temporary
[N·k, d_in], so that the size decides which of the two is faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.eager import EagerTrainer


class TunedTrainer(EagerTrainer):
    """An EagerTrainer that decodes with embedding_bag and uses Adam(fused=True)."""

    fused_adam = True

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Return Σ value · W_dec[index] over the active rows only, [N, D]."""
        weights = values.to(self.W_dec.dtype)
        return F.embedding_bag(indices, self.W_dec, per_sample_weights=weights, mode="sum")


class GatherTrainer(TunedTrainer):
    """A TunedTrainer with an encoder whose backward touches only the selected latents."""

    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Select the k largest pre-activations; gradients flow only through them."""
        values, indices = SparseEncoder.apply(  # type: ignore[no-untyped-call]
            x - self.b_dec, self.W_enc, self.b_enc, self.k
        )
        return values, indices


class SparseEncoder(torch.autograd.Function):
    """linear, ReLU, topk; the backward adds up selected rows instead of two dense products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return values [N, K] and indices [N, K]."""
        values, indices = torch.relu(F.linear(x, W_enc, b_enc)).topk(k, dim=-1, sorted=False)
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of x, W_enc and b_enc from the gradient of the values."""
        x, W_enc, values, indices = ctx.saved_tensors
        grad_values = (grads[0] * (values > 0)).to(W_enc.dtype)
        grad_x = F.embedding_bag(indices, W_enc, per_sample_weights=grad_values, mode="sum")
        contributions = (grad_values.unsqueeze(2) * x.unsqueeze(1)).reshape(-1, x.shape[1])
        flat = indices.flatten()
        grad_W = torch.zeros_like(W_enc).index_add_(0, flat, contributions)
        grad_b = torch.zeros_like(W_enc[:, 0]).index_add_(0, flat, grad_values.flatten())
        return grad_x, grad_W, grad_b, None
