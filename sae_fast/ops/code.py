"""Codes of tokens: a SparseCode lists the few active latents of each, a DenseCode has them all.

Both have what training needs, under the same names. A DenseCode is for steps while so many latents
are active that listing them is slower.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast.ops.checks import Call, check_code, check_entries


class CodeKey:
    """The identity of a code: gradients with the same key belong to the same code.

    It holds the latent-major view of the code, which is computed at the first use.
    """

    def __init__(self) -> None:
        self._view: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def has_view(self) -> bool:
        """Whether the latent-major view has been computed."""
        return self._view is not None

    def latent_major(
        self, values: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return latent_offsets, entries and rows of the code with this key; see SparseCode."""
        if self._view is None:
            op = torch.ops.sae_fast.latent_major.default
            with torch.no_grad():
                self._view = op(values.detach(), indices, offsets, d_sae)
        return self._view


@torch.library.custom_op("sae_fast_checks::indices", mutates_args=())
def _checked_indices(indices: Tensor, offsets: Tensor | None, d_sae: int) -> Tensor:
    """Return the indices after a check at run time, which a compiled program makes."""
    check_entries(indices, offsets, d_sae)
    return indices.clone()


@_checked_indices.register_fake
def _(indices: Tensor, offsets: Tensor | None, d_sae: int) -> Tensor:
    return torch.empty_like(indices)


@torch.library.custom_op("sae_fast_checks::entry_rows", mutates_args=())
def _checked_entry_rows(offsets: Tensor, n_entries: int) -> Tensor:
    """Return the row of every entry, [nnz], after a check of the offsets at run time."""
    Call("SparseCode", "offsets", offsets).partition("offsets", offsets, n_entries)
    rows = torch.arange(offsets.size(0) - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff(), output_size=n_entries)


@_checked_entry_rows.register_fake
def _(offsets: Tensor, n_entries: int) -> Tensor:
    return offsets.new_empty(n_entries)


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


@dataclass(frozen=True, eq=False)
class SparseCode:
    """A sparse matrix [N, d_sae]: K entries in every row, or with `offsets` any number (CSR).

    A latent fires where its value is greater than 0, in a signed code where it is not 0, and never
    because its index is listed.

    Attributes:
        values: [N, K], or [nnz] with offsets; differentiable.
        indices: the latents, int32, in the shape of values.
        d_sae: number of latents.
        offsets: None, or [N + 1] int64: row n has the entries from offsets[n] up to offsets[n + 1].
        aux: the code of the dead latents, for AuxK, if a dead mask was given.
        precision: of the encoder that made the code; `decode` and `reconstruct` use it too.
        signed: whether values may be negative: the encoder had no ReLU.
        base: the code whose entries these are, with other values, see `with_values`.
    """

    values: Tensor
    indices: Tensor
    d_sae: int
    offsets: Tensor | None = None
    aux: SparseCode | None = None
    precision: str = "fp32"
    signed: bool = False
    base: SparseCode | None = None

    @functools.cached_property
    def key(self) -> CodeKey:
        """The identity of this code, shared by `with_values`, not by `dataclasses.replace`."""
        return CodeKey() if self.base is None else self.base.key

    @property
    def n_rows(self) -> int:
        """N, the number of tokens."""
        return self.indices.size(0) if self.offsets is None else self.offsets.size(0) - 1

    def dense(self) -> Tensor:
        """Return the whole matrix [N, d_sae]; differentiable."""
        places = self._places().flatten()
        out = self.values.new_zeros(self.n_rows, self.d_sae)
        place = (self.entry_rows(), places)
        return out.index_put_(place, self.values.flatten(), accumulate=True)  # no second [N, F]

    def fires(self) -> Tensor:
        """Return which entries fire, bool in the shape of values; NaN does not."""
        return self.values.abs() > 0 if self.signed else self.values > 0

    def n_active(self) -> Tensor:
        """Return the number of entries that fire, 0-d int64."""
        return self.fires().sum()

    def l0(self) -> Tensor:
        """Return how many latents fire in each row, [N] int64."""
        if not torch.compiler.is_compiling():
            self.check()
        fires = self.fires()
        if self.offsets is None:
            return fires.sum(1)
        counts = torch.cat([self.offsets.new_zeros(1), fires.cumsum(0)])
        return counts[self.offsets].diff()

    def fired(self) -> Tensor:
        """Return which latents fire in any row, [d_sae] bool."""
        must_not_look = torch.compiler.is_compiling() or self.values.is_cuda  # at data
        if not must_not_look and self.base is None and self.key.has_view:
            # The view, which training has computed by now, lists the entries that are not 0.
            magnitudes = self.values.abs() if self.signed else self.values
            if bool((magnitudes >= 0).all()):
                return self.latent_major()[0].diff() > 0
        # Entries that do not fire mark a place past the end: there is no mask to compact.
        latents = torch.where(self.fires(), self._places(), self.d_sae).flatten()
        fired = torch.zeros(self.d_sae + 1, dtype=torch.bool, device=self.values.device)
        return fired.index_fill_(0, latents.long(), True)[:-1]

    def latent_major(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the entries with a value other than 0 by latent: latent_offsets, entries, rows.

        latent_offsets [d_sae + 1] int64; entries, flat positions in values, and rows, int32. With
        a base they are the entries of the base, of which some may have the value 0 here.
        """
        values = self.values if self.base is None else self.base.values
        return self.key.latent_major(values, self.indices, self.offsets, self.d_sae)

    def with_values(
        self,
        values: Tensor,  # in the shape of self.values
    ) -> SparseCode:
        """Return a code with these entries and other values, which are 0 wherever they were 0.

        Both codes share the latent-major view.
        """
        base = self if self.base is None else self.base
        return SparseCode(
            values, self.indices, self.d_sae, self.offsets, precision=self.precision, base=base
        )

    def spread(
        self,
        numbers: Tensor,  # [d_sae]
    ) -> Tensor:
        """Return for every entry its latent's number, in the shape of values; differentiable.

        Entries of value 0 are outside the code and have no part in the gradient.
        """
        spread: Tensor = _Spread.apply(numbers, self)  # type: ignore[no-untyped-call]
        return spread

    @property
    def n_listed(self) -> int:
        """The number of listed entries, of any value."""
        return self.indices.numel()

    def entry_rows(self) -> Tensor:
        """Return the row of every entry, [N * K] or [nnz]."""
        if self.offsets is not None and torch.compiler.is_compiling() and not self.offsets.is_cuda:
            checked: Tensor = _checked_entry_rows(self.offsets, self.indices.size(0))
            return checked
        if not torch.compiler.is_compiling():
            self.check()
        rows = torch.arange(self.n_rows, device=self.indices.device)
        if self.offsets is None:
            return rows.repeat_interleave(self.indices.size(1))
        return per_entry(rows, self.offsets, self.indices.size(0))

    def _places(self) -> Tensor:
        """Return the indices, checked where that need not wait for a device.

        Torch's own ops do not check them, or end the process.
        """
        if not torch.compiler.is_compiling():
            self.check()
        elif not self.indices.is_cuda:
            checked: Tensor = _checked_indices(self.indices, self.offsets, self.d_sae)
            return checked
        return self.indices

    def check(self) -> None:
        """Raise RuntimeError where values, indices and offsets do not fit together.

        On a GPU the numbers inside are not looked at: that would wait for the device.
        """
        check_code(self.values, self.indices, self.offsets, self.d_sae)


@dataclass(frozen=True, eq=False)
class DenseCode:
    """A matrix [N, d_sae]; a latent fires where its value is greater than 0, or if signed not 0.

    It is made by dense products and has dense gradients; where torch makes these, their rounding
    depends on the number of threads.

    Attributes:
        values: [N, d_sae]; differentiable.
        n_listed: 0-d, how many entries a SparseCode of this matrix would list.
        precision: of the encoder that made the code.
        signed: whether values may be negative: the encoder had no ReLU.
        counted: 0-d, how many entries fire, if that is known.
    """

    values: Tensor
    n_listed: Tensor
    precision: str = "fp32"
    signed: bool = False
    counted: Tensor | None = None

    @property
    def n_rows(self) -> int:
        """N, the number of tokens."""
        return self.values.size(0)

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.values.size(1)

    def dense(self) -> Tensor:
        """Return the whole matrix [N, d_sae]; differentiable."""
        return self.values

    def fires(self) -> Tensor:
        """Return which entries fire, bool in the shape of values; NaN does not."""
        return self.values.abs() > 0 if self.signed else self.values > 0

    def l0(self) -> Tensor:
        """Return how many latents fire in each row, [N] int64."""
        return self.fires().sum(1)

    def n_active(self) -> Tensor:
        """Return the number of entries that fire, 0-d int64."""
        if self.counted is not None:
            return self.counted
        return torch.count_nonzero(self.fires())  # of bool; of float32 it takes 4 times as long

    def fired(self) -> Tensor:
        """Return which latents fire in any row, [d_sae] bool."""
        if self.signed or self.n_rows == 0:
            return self.fires().any(0)
        return self.values.detach().amax(0) > 0  # without an array [N, d_sae]

    def with_values(
        self,
        values: Tensor,  # [N, d_sae]
    ) -> DenseCode:
        """Return a code with these entries and other values."""
        return DenseCode(values, self.n_listed, self.precision, self.signed)

    def listed(self) -> SparseCode:
        """Return the code with every latent of every token listed, in ascending order."""
        latents = torch.arange(self.d_sae, dtype=torch.int32, device=self.values.device)
        indices = latents.expand(self.n_rows, -1).contiguous()
        return SparseCode(
            self.values, indices, self.d_sae, precision=self.precision, signed=self.signed
        )

    def spread(
        self,
        numbers: Tensor,  # [d_sae]
    ) -> Tensor:
        """Return each latent's number as [1, d_sae], which broadcasts over the rows."""
        return numbers[None]


Code = SparseCode | DenseCode


class _Spread(torch.autograd.Function):
    """Autograd of SparseCode.spread: backward sums by latent in a fixed order, unlike torch's."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, code: SparseCode) -> Tensor:
        ctx.code = code
        if len(numbers) != code.d_sae:
            raise RuntimeError(
                f"SparseCode: numbers must have shape [{code.d_sae}], got {list(numbers.shape)}"
            )
        return numbers.index_select(0, code._places().flatten()).view_as(code.indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        latent_offsets, entries, _ = ctx.code.latent_major()
        sum_entries = torch.ops.sae_fast.latent_sums.default
        return sum_entries(latent_offsets, entries, grad.contiguous()), None
