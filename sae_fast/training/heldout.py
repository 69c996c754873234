"""How well a model does on rows that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> dict[str, float]:
    """Fraction of variance unexplained, L0 and the share of latents that never fire.

    FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2 over all rows, sums in float64.

    Args:
        sae: the model.
        batches: rows [n, D] as captured; the model normalises them itself.
    """
    device = sae.W_enc.device
    squared_error = torch.zeros((), dtype=torch.float64, device=device)
    squared_norm = torch.zeros_like(squared_error)
    active = torch.zeros_like(squared_error)
    total = torch.zeros(sae.config.d_in, dtype=torch.float64, device=device)
    fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=device)
    rows = 0
    for batch in batches:
        x = batch.to(device)
        code = sae.encode(x)
        squared_error += (x - sae.decode(code)).double().square().sum()
        squared_norm += x.double().square().sum()
        total += x.sum(dim=0, dtype=torch.float64)
        active += code.l0().sum()
        fired |= code.fired()
        rows += len(x)
    variance = squared_norm - total.square().sum() / rows
    return {
        "heldout_fvu": float(squared_error / variance),
        "heldout_l0": float(active / rows),
        "heldout_dead_fraction": 1.0 - float(fired.double().mean()),
    }
