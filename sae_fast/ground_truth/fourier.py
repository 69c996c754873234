"""Strengths of functions on the numbers modulo p as waves of one frequency, whatever their phase.

The waves cos(2πwt/p) and sin(2πwt/p) of a frequency w span a plane. The strength of a function in a
plane is the length of its projection, divided by the length of the function about its mean. For odd
p the planes of w = 1 … (p − 1) / 2 are orthogonal, and the squares of the strengths sum to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sae_fast.evaluation.matching import best_matching

KEY_SHARE = 0.05  # of the embedding's power, from which a frequency counts as a key frequency


def planes(p: int) -> Tensor:
    """Return the unit waves of all frequencies, [(p − 1) / 2, 2, p] float64: cosine and sine."""
    frequencies = torch.arange(1, (p - 1) // 2 + 1, dtype=torch.float64)
    angles = 2 * math.pi / p * frequencies[:, None] * torch.arange(p, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], 1) * math.sqrt(2 / p)


def strengths(
    curves: Tensor,  # [..., p], values of functions at t = 0 … p − 1
) -> Tensor:
    """Return the strength of functions in the plane of each frequency, [..., (p − 1) / 2].

    Each is from 0 to 1. Constant functions have 0 in all planes.
    """
    centred = curves.double() - curves.double().mean(-1, keepdim=True)
    coordinates = torch.einsum("...p,wcp->...wc", centred, planes(curves.shape[-1]))
    length = centred.norm(dim=-1, keepdim=True)
    scale = curves.double().abs().amax(-1, keepdim=True)
    is_flat = length <= 1e-6 * scale * math.sqrt(curves.shape[-1])  # rounding of a constant
    found = coordinates.norm(dim=-1) / length.clamp_min(1e-300)
    return torch.where(is_flat, 0.0, found.clamp_max(1))


def power(
    embedding: Tensor,  # [p, D]
) -> Tensor:
    """Return the share of each frequency in the squares of an embedding, [(p − 1) / 2] float64."""
    centred = embedding.double() - embedding.double().mean(0)
    squares = torch.einsum("pd,wcp->wcd", centred, planes(len(embedding))).square().sum((1, 2))
    return squares / squares.sum().clamp_min(1e-300)


def key_frequencies(
    embedding: Tensor,  # [p, D]
) -> list[int]:
    """Return the frequencies, ascending, with at least 5 % of an embedding's power.

    It is the largest one alone where none has as much.
    """
    shares = power(embedding)
    chosen = (shares >= KEY_SHARE).nonzero().squeeze(1).tolist() or [int(shares.argmax())]
    return [place + 1 for place in chosen]


def marginals(
    values: Tensor,  # [p, p, F], values of latents by a and b
) -> Tensor:
    """Return the mean value of latents by a, by b, and by a + b modulo p, [3, F, p] float64."""
    p = len(values)
    a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
    by_sum = torch.zeros(p, values.shape[2], dtype=torch.float64)
    flat = values.reshape(p * p, -1).double()
    by_sum.index_add_(0, ((a + b) % p).reshape(-1), flat)
    return torch.stack([values.double().mean(1), values.double().mean(0), by_sum / p]).mT


def match_frequencies(
    found: Tensor,  # [F, W], strengths of latents in the plane of each frequency
    frequencies: list[int],  # from 1
) -> tuple[list[int], list[float]]:
    """Give each key frequency a latent of its own, so that the sum of strengths is largest.

    Returns the latents and their strengths in the order of the frequencies; with fewer latents than
    frequencies −1 and 0 for those without one.
    """
    columns = torch.tensor(frequencies) - 1
    scores = found[:, columns].t().contiguous()  # [K, F]
    rows, latents = best_matching(scores)
    matched, values = [-1] * len(frequencies), [0.0] * len(frequencies)
    for row, latent in zip(rows.tolist(), latents.tolist(), strict=True):
        matched[row], values[row] = latent, float(scores[row, latent])
    return matched, values
