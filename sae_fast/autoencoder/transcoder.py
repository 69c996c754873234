"""Transcoders: the code of x predicts other activations, the targets y (arXiv:2406.11944).

f = select(x W_encᵀ + b_enc) and ŷ = Σ_j f_j W_dec,j + b_dec, with a skip connection + x W_skipᵀ
(arXiv:2501.18823). b_dec lies where the targets do, so nothing is subtracted from x. Every
architecture can be one: its code models y − x W_skipᵀ in place of x, and nothing else changes.
x and y are normalised each by a mean and a scale of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.config import SAEConfig
from sae_fast.ops.dense_product import linear
from sae_fast.ops.full_precision import full_precision
from sae_fast.ops.reference import ROUNDED_DTYPES
from sae_fast.ops.working_copies import float32_copy

SKIP = "W_skip"


def transcoder_parameters(config: SAEConfig) -> dict[str, Tensor]:
    """Return the start of `W_skip` [d_out, D], where there is one: 0, all is left to the code."""
    if not config.skip_connection:
        return {}
    return {SKIP: torch.zeros(config.d_out, config.d_in, dtype=torch.float32)}


def transcoder_buffers(config: SAEConfig) -> dict[str, Tensor]:
    """Return the buffers of the targets' normalisation: mean [d_out] and scale, 0-d."""
    if not config.transcoder:
        return {}
    return {
        "target_mean": torch.zeros(config.d_out, dtype=torch.float32),
        "target_scale": torch.ones((), dtype=torch.float32),
    }


def skip(
    x: Tensor,  # [N, D]
    W_skip: Tensor,  # [d_out, D]
    precision: str = "screened",
) -> Tensor:
    """Return x W_skipᵀ, [N, d_out]; with bf16 and fp16 from operands of that type.

    In float64 it is torch's product.
    """
    if x.dtype == torch.float64:
        return x @ W_skip.t()
    W_skip = float32_copy(W_skip)
    if x.is_cuda and precision in ROUNDED_DTYPES:  # whose products its tensor cores make
        return _low_product(x, W_skip, precision)
    return linear(x, W_skip, precision=precision)


@full_precision
def _low_product(x: Tensor, W_skip: Tensor, precision: str) -> Tensor:
    dtype = ROUNDED_DTYPES[precision]
    return (x.to(dtype) @ W_skip.to(dtype).t()).to(x.dtype)
