"""Cosines between decoder rows: large ones are a sign of latents that absorb others' features."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.evaluation.dictionary import largest_cosines

SAMPLED_LATENTS = 1024  # evenly spaced; all of a smaller dictionary


@torch.no_grad()
def mean_largest_cosine(
    W_dec: Tensor,  # [F, D]
) -> Tensor:
    """Return the largest cosine of a decoder row with another one, a mean over latents, 0-d."""
    count = len(W_dec)
    chosen = torch.arange(0, count, max(1, count // SAMPLED_LATENTS), device=W_dec.device)
    return largest_cosines(W_dec, chosen).mean() if count > 1 else W_dec.new_zeros(())
