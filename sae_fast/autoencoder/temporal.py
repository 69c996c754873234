"""Temporal smoothness: how much the code changes from one token to the next of its sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.losses import steady_sum


def temporal_smoothness_loss(
    code: ops.Code,
    starts: Tensor,  # [N] bool, which tokens do not go on from the one before them
) -> Tensor:
    """Σ_j (f_nj − f_(n+1)j)², averaged over the pairs of neighbours in a sequence; 0 without any.

    Differentiable in the values of the entries that the code lists, among them those of 0 where it
    has a base (JumpReLU's window below a threshold). No row may list a latent twice.
    """
    goes_on = ~starts  # from the token before
    goes_on[:1] = False
    n_pairs = goes_on.sum().clamp_min(1)
    if isinstance(code, ops.DenseCode):
        squares = (code.values[1:] - code.values[:-1]).square().sum(1)
        return steady_sum(torch.where(goes_on[1:], squares, 0.0)) / n_pairs
    # By latent and, within one, by token, a latent that fires for both tokens of a pair has the two
    # entries side by side. A view of fixed size holds other numbers behind its last entry.
    latent_offsets, entries, rows = code.latent_major()
    is_entry = torch.arange(len(entries), device=entries.device) < latent_offsets[-1]
    values = code.values.flatten().index_select(0, entries)
    latents = code.indices.flatten().index_select(0, entries)
    is_gone_on_from = goes_on.roll(-1)
    appears = goes_on.index_select(0, rows)
    vanishes = is_gone_on_from.index_select(0, rows)
    stays = appears[1:] & (latents[1:] == latents[:-1]) & (rows[1:] == rows[:-1] + 1)
    stays &= is_entry[1:]
    appears[1:] &= ~stays
    vanishes[:-1] &= ~stays
    squares = values.square() * (appears.to(torch.int8) + vanishes.to(torch.int8))
    changes = torch.where(stays, values[1:] - values[:-1], 0.0)
    total = steady_sum(squares) + steady_sum(changes.square())
    return total / n_pairs
