"""Penalties that every architecture can have: on the decoder's rows, and on codes over tokens.

Decorrelation penalises decoder rows that point the same way, in four forms. gram_sum is
Σ_{i≠j} (ŵ_i·ŵ_j)². It grows with F²: about F (F − 1) / D for random rows, never below
F (F − D) / D, however well they are trained. gram_mean is that per pair of latents, 1 / D for
random rows, and too small for a weight of 0.1 to act beside an error of D. gram_scaled is gram_sum
per latent, in units of a 16th of the reconstruction error of the mean. None of these notices two
equal rows among many; chunked_max does, which penalises a row's nearest other one only (OrtSAE,
arXiv:2509.22033).

Independence and orthogonality penalise latents whose activations vary together over a batch.
Temporal smoothness penalises a code that changes from one token to the next of its sequence.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.losses import deterministic_sum, ratio
from sae_fast.ops.full_precision import matmul

_SHORTEST = 1e-12
_MASK = 0xFFFF_FFFF
# With a weight of 0.1, 160 steps on MiniLM and F / D of 8 and 2 it takes 49 and 41 % of the mean
# squared cosine, for 0.8 % more held-out error and 1.7 % less. A whole unit takes 55 and 77 %, for
# 1.7 and 4.5 % more.
_SCALED_SHARE = 1 / 16
# "mean": over pairs of latents that are not silent in the batch. "sum": the literal sum over pairs,
# which grows with the square of the number of latents. "scaled": the sum per latent, of the smaller
# group for orthogonality, and where there are more latents than the N - 1 directions to vary in, by
# their ratio: 1 for M latents of noise, M / (N - 1) where these are fewer.
Reduction = Literal["scaled", "mean", "sum"]


def decorrelation_loss(
    W_dec: Tensor,  # [F, D]
    form: str,
    draw: Tensor | None,  # 0-d int64
    chunk: int,
    error_of_the_mean: float = 1.0,
) -> Tensor:
    """Return the decorrelation penalty of a decoder, 0-d, without its coefficient.

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
    """Return the square of a row's largest cosine within its chunk, averaged over rows.

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
    return deterministic_sum((unit * others).sum(1).square()) / d_sae


def random_chunks(
    d_sae: int,
    draw: Tensor,  # 0-d int64
    chunk: int,
) -> tuple[Tensor, ...]:
    """Divide all latents at random into chunks of `chunk` to 2 · chunk − 1, or one of fewer.

    They are ordered by a hash of latent and draw: no generator whose state would have to be kept,
    and nothing that a CUDA graph could not repeat with another draw.
    """
    latents = torch.arange(d_sae, device=draw.device)
    order = _mix(_mix(latents) ^ _mix(draw.remainder(_MASK) + d_sae)).argsort(stable=True)
    return order.tensor_split(max(d_sae // chunk, 1))


def _mix(x: Tensor) -> Tensor:
    """Apply a bijection of 32 bits without pattern, on int64; no product here reaches 2⁶³."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    return (x >> 16) ^ x


class CorrelationLosses(NamedTuple):
    """Both losses of one batch, 0-d."""

    independence: Tensor
    orthogonality: Tensor


def correlation_losses(
    h: Tensor,  # [N, F]
    split: int,
    *,
    reduction: Reduction = "mean",
) -> CorrelationLosses:
    """Compute `independence_loss` and `orthogonality_loss` at the cost of one of them."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be scaled, mean or sum, got {reduction!r}")
    sums = ops.code_correlation(h, split)
    if reduction == "sum":
        return CorrelationLosses(sums.within, sums.between)
    first, second = sums.n_active.unbind()
    if reduction == "scaled":
        directions = max(len(h) - 1, 1)
        return CorrelationLosses(
            _per_latent(sums.within, first, first, directions),
            _per_latent(sums.between, first, second, directions),
        )
    own_pairs, pairs = first * (first - 1), first * second
    return CorrelationLosses(
        sums.within / own_pairs.clamp_min(1), sums.between / pairs.clamp_min(1)
    )


def _per_latent(
    total: Tensor,  # 0-d
    first: Tensor,  # 0-d int64
    second: Tensor,  # 0-d int64
    directions: int,
) -> Tensor:
    """Divide a sum over pairs of `first` and `second` latents as "scaled" does, see `Reduction`."""
    fewer, more = torch.minimum(first, second), torch.maximum(first, second)
    return total / (fewer.clamp_min(1) * ratio(more, directions).clamp_min(1))


def independence_loss(
    h: Tensor,  # [N, F]
    split: int | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the squared correlation of two different latents of [0, split), over ordered pairs.

    By default of all latents. Among N tokens no code gets the mean of M > N - 1 latents below
    (M / (N - 1) - 1) / (M - 1): there are only N - 1 directions to vary in.

    Args:
        h: the dense codes [N, F], row = token.
        split: the end of the latents that are compared.
        reduction: see `Reduction`.

    Raises:
        ValueError: where `reduction` is none of these.
    """
    split = h.shape[1] if split is None else split
    return correlation_losses(h, split, reduction=reduction).independence


def orthogonality_loss(
    h: Tensor,  # [N, F]
    split: int,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the squared correlation of a latent of [0, split) and one of [split, F).

    Args:
        h: the dense codes [N, F], row = token.
        split: where the second group begins.
        reduction: see `Reduction`.

    Raises:
        ValueError: where `reduction` is none of these.
    """
    return correlation_losses(h, split, reduction=reduction).orthogonality


def temporal_smoothness_loss(
    code: ops.Code,
    starts: Tensor,  # [N] bool, which tokens begin a sequence
) -> Tensor:
    """Return Σ_j (f_nj − f_(n+1)j)², averaged over the pairs of neighbours in a sequence.

    It is 0 without any pair, and differentiable in the values of the entries that the code lists,
    also where they are 0 (JumpReLU's window below a threshold). No row may list a latent twice.
    """
    goes_on = ~starts  # from the token before
    goes_on[:1] = False
    n_pairs = goes_on.sum().clamp_min(1)
    if isinstance(code, ops.DenseCode):
        squares = (code.values[1:] - code.values[:-1]).square().sum(1)
        return deterministic_sum(torch.where(goes_on[1:], squares, 0.0)) / n_pairs
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
    total = deterministic_sum(squares) + deterministic_sum(changes.square())
    return total / n_pairs
