"""Cosines between decoder rows: large ones are a sign of latents that absorb others' features."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED_LATENTS = 1024  # evenly spaced; all of a smaller dictionary
ROWS = 128  # whose cosines with all others are in memory at a time


@torch.no_grad()
def mean_largest_cosine(
    W_dec: Tensor,  # [F, D]
) -> Tensor:
    """Return the largest cosine of a decoder row with another one, a mean over latents, 0-d."""
    count = len(W_dec)
    if count < 2:
        return W_dec.new_zeros(())
    norms = W_dec.norm(dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)
    chosen = torch.arange(0, count, max(1, count // SAMPLED_LATENTS), device=W_dec.device)
    largest = []
    for part in torch.split(chosen, ROWS):
        cosines = W_dec[part] @ W_dec.T / norms[part, None] / norms
        cosines[torch.arange(len(part), device=part.device), part] = -1.0
        largest.append(cosines.amax(dim=1))
    return torch.cat(largest).mean()
