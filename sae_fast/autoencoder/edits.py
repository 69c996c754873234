"""Edits of codes: latents added to, set, scaled, kept within limits or ablated, at some positions.

Every edit is v' = min(max(factor · v + offset, lower), upper), with numbers of its own for each
latent. One that leaves 0 at 0 concerns only the entries that a code lists. For the others the
values of the edited latents become columns [N, E], and are left out of the entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.ops.code_entries import chosen_latents, places_of

Latents = int | Sequence[int] | Tensor
Positions = int | slice | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Edit:
    """One edit of some latents; the numbers are float64, one for each latent.

    Attributes:
        latents: [E] int64, each once.
        factor, offset, lower, upper: [E], see the beginning of this file.
        positions: the tokens that it concerns, see `Intervention`; None: all.
    """

    latents: Tensor
    factor: Tensor
    offset: Tensor
    lower: Tensor
    upper: Tensor
    positions: Positions

    @property
    def keeps_zero(self) -> bool:
        """Whether a latent that is not active stays so."""
        inside = bool((self.lower <= 0).all()) and bool((self.upper >= 0).all())
        return inside and not bool(self.offset.any())

    def apply(self, values: Tensor, numbers: Tensor) -> Tensor:
        """Return edited values; `numbers` says of which of the edit's latents each is."""
        factor, offset, lower, upper = (
            part.to(values)[numbers] for part in (self.factor, self.offset, self.lower, self.upper)
        )
        return torch.minimum(torch.maximum(values * factor + offset, lower), upper)


class EditedCode(NamedTuple):
    """A code in two parts.

    Attributes:
        values: the values of its entries, 0 for the latents that have columns.
        latents: [E] int64, the latents that have columns.
        columns: [N, E], their values; None: no latent has columns.
        is_changed: whether the values of entries may have been changed by an edit.
    """

    values: Tensor
    latents: Tensor
    columns: Tensor | None
    is_changed: bool


def make_edit(
    latents: Latents,
    d_sae: int,
    positions: Positions,
    *,
    factor: float | Tensor = 1.0,
    offset: float | Tensor = 0.0,
    lower: float | Tensor = -math.inf,
    upper: float | Tensor = math.inf,
) -> Edit:
    """Return an edit; raise IndexError or ValueError for latents or positions that cannot be."""
    chosen = torch.tensor(chosen_latents(latents, d_sae), dtype=torch.int64)
    count = len(chosen)
    edit = Edit(
        chosen,
        _one_a_latent("factor", factor, count),
        _one_a_latent("value", offset, count),
        _one_a_latent("minimum", lower, count),
        _one_a_latent("maximum", upper, count),
        _checked_positions(positions),
    )
    if bool((edit.lower > edit.upper).any()):
        raise ValueError(f"minimum must be at most maximum, got {lower} and {upper}")
    return edit


def edited(
    code: ops.SparseCode,
    edits: Sequence[Edit],
    leading: tuple[int, ...],  # of the tokens
    first: int,
    dtype: torch.dtype,
) -> tuple[EditedCode, EditedCode]:
    """Return a code before and after edits, divided into entries and columns alike.

    Args:
        code: of N tokens.
        edits: in the order in which they are made.
        leading: the shape of the tokens; positions are counted along its last dimension.
        first: position of the first token.
        dtype: of the columns.
    """
    device, filling = code.values.device, [edit for edit in edits if not edit.keeps_zero]
    filled = torch.cat([torch.zeros(0, dtype=torch.int64), *(edit.latents for edit in filling)])
    filled = torch.unique(filled).to(device)
    before = divided(code, filled, dtype)
    values, columns = before.values, before.columns
    is_changed = False
    rows = code.entry_rows().view(code.indices.shape)
    for edit in edits:
        at = positions_mask(edit.positions, leading, first, device)
        latents = edit.latents.to(device)
        has_column = torch.isin(latents, filled)
        if columns is not None and bool(has_column.any()):
            places = torch.searchsorted(filled, latents[has_column])
            own = columns[:, places]
            new = edit.apply(own, has_column.nonzero().flatten())
            new = new if at is None else torch.where(at[:, None], new, own)
            columns = columns.index_copy(1, places, new)
        if not bool(has_column.all()):
            listed = (~has_column).nonzero().flatten()
            place = places_of(code.indices, latents[listed], code.d_sae)
            concerned = place >= 0 if at is None else (place >= 0) & at[rows]
            new = edit.apply(values, listed[place.clamp_min(0)])
            values, is_changed = torch.where(concerned, new, values), True
    return before, EditedCode(values, filled, columns, is_changed)


def divided(code: ops.SparseCode, latents: Tensor, dtype: torch.dtype) -> EditedCode:
    """Divide a code into the columns of some latents, [E] ascending, and the other entries."""
    if not len(latents):
        return EditedCode(code.values, latents, None, False)
    place = places_of(code.indices, latents, code.d_sae)
    of_entry = torch.where(place < 0, len(latents), place)  # the last column is dropped
    columns = torch.zeros(code.n_rows, len(latents) + 1, dtype=dtype, device=latents.device)
    if code.offsets is None:
        columns = columns.scatter_add(1, of_entry, code.values.to(dtype))
    else:
        index = (code.entry_rows(), of_entry)
        columns = columns.index_put(index, code.values.to(dtype), accumulate=True)
    rest = torch.where(of_entry < len(latents), 0, code.values)
    return EditedCode(rest, latents, columns[:, :-1], False)


def positions_mask(
    positions: Positions,
    leading: tuple[int, ...],
    first: int,
    device: torch.device,
) -> Tensor | None:
    """Return which of the N tokens have one of the positions, [N] bool; None: all."""
    if positions is None:
        return None
    length = leading[-1] if leading else 1
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        mask = positions.to(device)[..., first : first + length]
        missing = length - mask.shape[-1]
        mask = torch.nn.functional.pad(mask, (0, missing))
    else:
        places = torch.arange(first, first + length, device=device)
        if isinstance(positions, slice):
            start, step = positions.start or 0, positions.step or 1
            mask = (places >= start) & ((places - start) % step == 0)
            if positions.stop is not None:
                mask &= places < positions.stop
        else:
            mask = torch.isin(places, torch.as_tensor(positions, device=device))
    try:
        return mask.expand(leading).reshape(-1)
    except RuntimeError:
        shape = tuple(positions.shape) if isinstance(positions, Tensor) else ()
        repeats, rest = divmod(leading[0], shape[0]) if leading and shape and shape[0] else (0, 1)
        hint = (
            f"; generate repeats each sequence for its beams and samples, as "
            f"mask.repeat_interleave({repeats}, 0) does"
        )
        raise ValueError(
            f"positions: a mask must have the shape of the tokens, {leading}, or of one sequence, "
            f"got {shape}{'' if rest or len(shape) != len(leading) else hint}"
        ) from None


def _checked_positions(positions: Positions) -> Positions:
    """Return positions, a mask as a tensor.

    Raises ValueError for negative ones, whose place depends on the pass.
    """
    if isinstance(positions, list | tuple) and positions and isinstance(positions[0], bool):
        positions = torch.tensor(positions)
    if positions is None or (isinstance(positions, Tensor) and positions.dtype == torch.bool):
        return positions
    if isinstance(positions, slice):
        numbers = [positions.start or 0, positions.stop or 0, (positions.step or 1) - 1]
    elif isinstance(positions, str | bool):
        numbers = [None]
    else:
        numbers = torch.as_tensor(positions).flatten().tolist()
    if any(not hasattr(number, "__index__") or number < 0 for number in numbers):
        raise ValueError(
            f"positions must be whole numbers from 0, counted from the first token of a sequence, "
            f"got {positions}"
        )
    return positions


def _one_a_latent(name: str, given: float | Tensor, count: int) -> Tensor:
    """Return numbers as [count] float64; raise ValueError for another count, and for NaN."""
    try:
        numbers = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or a tensor, got {given!r}") from None
    if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) not in (1, count)):
        got = tuple(numbers.shape)
        raise ValueError(
            f"{name} must be one number, or one for each of {count} latents, got {got}"
        )
    if bool(numbers.isnan().any()):
        raise ValueError(f"{name} must be a number, got NaN")
    return numbers.expand(count)
