"""Entries of a code selected, looked up and appended: what indexing and editing a code is made of.

A code's entries are values and indices [N, K], or flat ones [nnz] with offsets [N + 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_fast.ops.checks import Call

Entries = tuple[Tensor, Tensor, Tensor | None]  # values, indices, offsets


def per_entry(
    rows: Tensor,  # [N]
    offsets: Tensor,  # [N + 1]
    n_entries: int,
) -> Tensor:
    """Return for every entry of a code with offsets its row's number, [nnz]."""
    # With offsets that do not ascend repeat_interleave would write past its result.
    if not offsets.is_cuda and not torch.compiler.is_compiling():
        Call("SparseCode", "offsets", offsets).partition("offsets", offsets, n_entries)
    return rows.repeat_interleave(offsets.diff(), output_size=n_entries)


def take_rows(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    rows: Tensor,  # [M] int64, below N
) -> Entries:
    """Return the entries of some rows, in their order."""
    if offsets is None:
        return values[rows], indices[rows], None
    lengths = offsets.diff()[rows]
    ends = lengths.cumsum(0)
    taken = torch.cat([ends.new_zeros(1), ends])
    shift = offsets[rows] - taken[:-1]
    places = torch.arange(int(taken[-1]), device=rows.device) + shift.repeat_interleave(lengths)
    return values[places], indices[places], taken


def append_entries(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    latents: Sequence[int],
    added: Tensor,  # [N, M], their values
) -> Entries:
    """Return the entries with M more at the end of every row, of the latents in `latents`."""
    n_rows, count = added.shape
    own = torch.tensor(latents, dtype=indices.dtype, device=indices.device).expand(n_rows, count)
    if offsets is None:
        return torch.cat([values, added], 1), torch.cat([indices, own], 1), None
    step = torch.arange(n_rows + 1, device=offsets.device) * count
    longer = offsets + step
    rows = per_entry(torch.arange(n_rows, device=offsets.device), offsets, len(indices))
    before = torch.arange(len(indices), device=offsets.device) + step[rows]
    after = (longer[1:, None] - count) + torch.arange(count, device=offsets.device)
    places = torch.cat([before, after.flatten()])
    order = torch.empty_like(places)
    order[places] = torch.arange(len(places), device=places.device)
    all_values = torch.cat([values, added.flatten()])
    return all_values[order], torch.cat([indices, own.flatten()])[order], longer


def places_of(
    indices: Tensor,  # int32
    latents: Sequence[int] | Tensor,  # int64 if a tensor
    d_sae: int,
) -> Tensor:
    """Return for every entry the place of its latent in `latents`, or -1, int64."""
    places = torch.full((d_sae,), -1, device=indices.device)
    numbers = torch.as_tensor(latents, dtype=torch.int64, device=indices.device)
    places[numbers] = torch.arange(len(numbers), device=indices.device)
    return places[indices.long()]


def chosen_latents(latents: int | Sequence[int] | Tensor, d_sae: int) -> list[int]:
    """Return latents as numbers, see `latent_numbers`; a bool mask [d_sae] is True for them.

    Raises ValueError for a mask of another shape.
    """
    if not isinstance(latents, Tensor) or latents.dtype != torch.bool:
        return latent_numbers(latents, d_sae)
    if latents.shape != (d_sae,):
        got = tuple(latents.shape)
        raise ValueError(f"latents must have shape ({d_sae},), got {got}")
    numbers: list[int] = latents.nonzero().flatten().tolist()
    return numbers


def latent_numbers(latent: int | Sequence[int] | Tensor, d_sae: int) -> list[int]:
    """Return latents as numbers; raise IndexError for what is no latent, or is there twice."""
    if isinstance(latent, Tensor):
        if latent.is_floating_point() or latent.dtype == torch.bool:
            raise IndexError(f"latent must be whole numbers, got a tensor of {latent.dtype}")
        numbers = latent.flatten().tolist()
    else:
        numbers = list(latent) if isinstance(latent, Sequence) else [latent]
    for number in numbers:
        if not hasattr(number, "__index__"):
            raise IndexError(f"latent must be a whole number, got {number!r}")
        if not 0 <= number < d_sae:
            raise IndexError(f"latent must be 0 to {d_sae - 1}, got {number}")
    if len(set(numbers)) < len(numbers):
        raise IndexError(f"latent must name each latent once, got {numbers}")
    return [int(number) for number in numbers]


def one_a_token(
    name: str,
    given: float | Tensor,
    latent: int | Sequence[int] | Tensor,
    count: int,
    tokens: tuple[int, ...],
    like: Tensor,
) -> Tensor:
    """Return numbers of `count` latents for every token as [N, count], in the dtype of `like`.

    Raises ValueError where they do not broadcast.
    """
    if not isinstance(given, int | float | Tensor):
        raise TypeError(f"{name} must be a number or a tensor, got {type(given).__name__}")
    wanted = tokens if is_one(latent) else (*tokens, count)
    numbers = torch.as_tensor(given, dtype=like.dtype, device=like.device)
    return expanded(name, numbers, wanted).reshape(torch.Size(tokens).numel(), count)


def is_one(latent: int | Sequence[int] | Tensor) -> bool:
    """Return whether a single latent is named, and no list of them."""
    return latent.ndim == 0 if isinstance(latent, Tensor) else not isinstance(latent, Sequence)


def expanded(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor broadcast to a shape; raise ValueError, naming it, where that cannot be."""
    try:
        return tensor.expand(shape)
    except RuntimeError:
        got = tuple(tensor.shape)
        raise ValueError(f"{name} must broadcast to shape {shape}, got {got}") from None
