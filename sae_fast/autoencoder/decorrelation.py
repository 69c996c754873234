"""Penalties on decoder rows that point the same way, as pure functions, in four forms.

gram_sum is Σ_{i≠j} (ŵ_i·ŵ_j)². It grows with F²: about F (F − 1) / D for random rows, never below
F (F − D) / D, however well they are trained. gram_mean is that per pair of latents, 1 / D for
random rows, and too small for a weight of 0.1 to act beside an error of D. gram_scaled is gram_sum
per latent, in units of a 16th of the reconstruction error of the mean. None of these notices two
equal rows among many; chunked_max does, which penalises a row's nearest other one only (OrtSAE,
arXiv:2509.22033).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.losses import steady_sum
from sae_fast.ops.full_precision import matmul

_SHORTEST = 1e-12
_MASK = 0xFFFF_FFFF
# With a weight of 0.1, 160 steps on MiniLM and F / D of 8 and 2 it takes 49 and 41 % of the mean
# squared cosine, for 0.8 % more held-out error and 1.7 % less. A whole unit takes 55 and 77 %, for
# 1.7 and 4.5 % more.
_SCALED_SHARE = 1 / 16


def decorrelation_loss(
    W_dec: Tensor,  # [F, D]
    form: str,
    draw: Tensor | None,  # 0-d int64
    chunk: int,
    error_of_the_mean: float = 1.0,
) -> Tensor:
    """The penalty of a decoder, 0-d.

    Args:
        W_dec: decoder rows, of any length.
        form: "gram_scaled", "gram_mean", "gram_sum" or "chunked_max".
        draw: which of the random divisions into chunks chunked_max takes; the others take none.
        chunk: latents in a chunk, at least 2.
        error_of_the_mean: reconstruction error that the mean has, the unit of gram_scaled.
    """
    if form == "chunked_max":
        assert draw is not None
        return chunked_max(W_dec, draw, chunk)
    d_sae = len(W_dec)
    total = ops.decorrelation(W_dec)
    if form == "gram_scaled":
        return total * (error_of_the_mean * _SCALED_SHARE / d_sae)
    return total if form == "gram_sum" else total / max(d_sae * (d_sae - 1), 1)


def chunked_max(
    W_dec: Tensor,  # [F, D]
    draw: Tensor,  # 0-d int64
    chunk: int,
) -> Tensor:
    """The square of a row's largest cosine with another one of its chunk, averaged over rows.

    The chunks are searched without a gradient, a product of some chunk² · D each; it goes to a row
    and its nearest only. Memory: six times W_dec.
    """
    d_sae = len(W_dec)
    if d_sae < 2:
        return (0.0 * W_dec).sum()
    lengths = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    unit = W_dec / lengths.clamp_min(_SHORTEST)
    nearest = torch.empty(d_sae, 1, dtype=torch.int32, device=W_dec.device)
    with torch.no_grad():
        for members in random_chunks(d_sae, draw, chunk):
            rows = unit[members]
            cosines = matmul(rows, rows.t()).fill_diagonal_(-torch.inf)
            nearest[members, 0] = members[cosines.argmax(1)].int()
    # A gather whose gradient is summed in a fixed order, on a GPU too.
    others = ops.decode(ops.SparseCode(torch.ones_like(lengths), nearest, d_sae), unit)
    return steady_sum((unit * others).sum(1).square()) / d_sae


def random_chunks(
    d_sae: int,
    draw: Tensor,  # 0-d int64
    chunk: int,
) -> tuple[Tensor, ...]:
    """All latents, divided at random into chunks of `chunk` to 2 · chunk − 1, or one of fewer.

    They are ordered by a hash of latent and draw: no generator whose state would have to be kept,
    and nothing that a CUDA graph could not repeat with another draw.
    """
    latents = torch.arange(d_sae, device=draw.device)
    order = _mix(_mix(latents) ^ _mix(draw.remainder(_MASK) + d_sae)).argsort(stable=True)
    return order.tensor_split(max(d_sae // chunk, 1))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits without pattern, on int64; no product here reaches 2⁶³."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    return (x >> 16) ^ x
