"""Codes between two codes of the same tokens, as patching and integrated gradients take them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast import ops


class PatchedCode(NamedTuple):
    """Two codes with the entries of both.

    Attributes:
        before: the code, with entries of value 0 for the latents of the other one alone.
        other: the values of the other code, for each entry.
    """

    before: ops.SparseCode
    other: Tensor

    def between(self, share: float) -> ops.SparseCode:
        """Return (1 − share) times the code plus `share` times the other one."""
        values = torch.lerp(self.before.values, self.other, share)
        return replace(self.before, values=values, base=None)


def patched(code: ops.SparseCode, other: ops.SparseCode) -> PatchedCode:
    """Return a code with the entries of another code of as many tokens among its own.

    Raises ValueError for a code of other tokens, latents or units.
    """
    if other.n_rows != code.n_rows or other.d_sae != code.d_sae:
        raise ValueError(
            f"patch: the code must have the shape of the pass, {tuple(code.shape)}, "
            f"got {tuple(other.shape)}"
        )
    if other.units != code.units:
        raise ValueError(f"patch: the code must be in {code.units} units, got {other.units}")
    both = (code, other.to(code.device, code.dtype))
    keys = [one.entry_rows() * one.d_sae + one.indices.flatten() for one in both]
    entries, places = torch.unique(torch.cat(keys), return_inverse=True)
    nothing = code.values.new_zeros(len(entries))
    parts = places.split([len(key) for key in keys])
    values = [
        nothing.index_add(0, part, one.values.flatten())
        for part, one in zip(parts, both, strict=True)
    ]
    rows = torch.arange(code.n_rows + 1, device=code.device)
    before = replace(
        code,
        values=values[0],
        indices=(entries % code.d_sae).to(code.indices.dtype),
        offsets=torch.searchsorted(entries, rows * code.d_sae),
        aux=None,
        base=None,
        signed=True,
    )
    return PatchedCode(before, values[1])
