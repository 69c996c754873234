"""Codes of tokens: a SparseCode lists the few active latents of each, a DenseCode has them all.

Both have what training needs, under the same names. A DenseCode is for steps while so many latents
are active that listing them is slower. Only a SparseCode has the shape of the activations that it
was made from, and can be indexed and edited; training uses it flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast.ops.checks import Call, check_code, check_entries
from sae_fast.ops.code_entries import (
    append_entries,
    chosen_latents,
    expanded,
    is_one,
    latent_numbers,
    one_a_token,
    per_entry,
    places_of,
    take_rows,
)

Units = Literal["normalized", "raw"]
NORMALIZED: Final = "normalized"  # the units of a model's parameters
RAW: Final = "raw"  # the units of the activations


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


@dataclass(frozen=True, eq=False)
class SparseCode:
    """A sparse array [..., d_sae]: K entries for every token, or with `offsets` any number (CSR).

    A latent fires where its value is greater than 0, in a signed code where it is not 0, and never
    because its index is listed. The N tokens of `leading` are the rows, in row-major order.

    Attributes:
        values: [N, K], or [nnz] with offsets; differentiable.
        indices: the latents, int32, in the shape of values.
        d_sae: number of latents.
        offsets: None, or [N + 1] int64: row n has the entries from offsets[n] up to offsets[n + 1].
        aux: the code of the dead latents, for AuxK, if a dead mask was given.
        precision: of the encoder that made the code; `decode` and `reconstruct` use it too.
        signed: whether values may be negative: the encoder had no ReLU.
        base: the code whose entries these are, with other values, see `with_values`.
        leading: the shape of the tokens; None: (N,).
        units: "normalized" or "raw", see `SparseAutoencoder.encode`.
        key: the identity of this code, shared by `with_values`, not by `dataclasses.replace`.
        made_key: the key, if an encoder made it before the code; None: the key of `base`, or new.
    """

    values: Tensor
    indices: Tensor
    d_sae: int
    offsets: Tensor | None = None
    aux: SparseCode | None = None
    precision: str = "fp32"
    signed: bool = False
    base: SparseCode | None = None
    leading: tuple[int, ...] | None = None
    units: Units = NORMALIZED
    key: CodeKey = field(init=False)
    made_key: InitVar[CodeKey | None] = None

    def __post_init__(self, made_key: CodeKey | None) -> None:
        shared = None if self.base is None else self.base.key
        object.__setattr__(self, "key", made_key or shared or CodeKey())

    @property
    def n_rows(self) -> int:
        """N, the number of tokens."""
        return self.indices.size(0) if self.offsets is None else self.offsets.size(0) - 1

    # ---- as an array of tokens ---------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """The shape of `dense()`: the tokens' shape, then d_sae."""
        return torch.Size((*self._tokens, self.d_sae))

    @property
    def device(self) -> torch.device:
        """The device of the values."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def _tokens(self) -> tuple[int, ...]:
        return (self.n_rows,) if self.leading is None else self.leading

    def __len__(self) -> int:
        """Return the first size of the tokens' shape."""
        if not self._tokens:
            raise TypeError("the code of a single token has no length")
        return self._tokens[0]

    def __repr__(self) -> str:
        shape, entries = tuple(self.shape), self.n_listed
        text = f"SparseCode(shape={shape}, {entries} entries, {self.units} units"
        return f"{text}, {self.dtype}, device={str(self.device)!r})"

    def __getitem__(self, index: Any) -> SparseCode:
        """Return the codes of some tokens, indexed as a tensor of the tokens' shape is.

        Raises IndexError for an index that also selects latents: `latent` gives a latent's values.
        """
        rows = torch.arange(self.n_rows, device=self.indices.device).reshape(self._tokens)
        try:
            rows = rows[index]
        except IndexError as error:
            raise IndexError(
                f"a code of shape {tuple(self.shape)} is indexed by token: {error}; "
                "code.latent(j) gives the values of latent j, code.dense() all values"
            ) from None
        parts = take_rows(self.values, self.indices, self.offsets, rows.flatten())
        return self._edited(*parts, leading=tuple(rows.shape))

    def shaped(self, leading: Sequence[int]) -> SparseCode:
        """Return the code with its tokens in another shape, of the same number of tokens."""
        size = tuple(leading)
        if not torch.compiler.is_compiling() and torch.Size(size).numel() != self.n_rows:
            raise ValueError(f"leading must have {self.n_rows} tokens, got shape {size}")
        return self._shaped(size)

    def flatten(self) -> SparseCode:
        """Return the code with its tokens in one dimension, shape (N, d_sae)."""
        return self if self.leading is None else self._shaped(None)

    def _shaped(self, leading: tuple[int, ...] | None) -> SparseCode:
        """Return these entries, which keep their identity, in another shape."""
        return SparseCode(
            self.values,
            self.indices,
            self.d_sae,
            self.offsets,
            self.aux,
            self.precision,
            self.signed,
            self if self.base is None else self.base,
            leading,
            self.units,
        )

    def dense(self) -> Tensor:
        """Return the whole array [..., d_sae]; differentiable."""
        places = self._places().flatten()
        out = self.values.new_zeros(self.n_rows, self.d_sae)
        place = (self.entry_rows(), places)
        out = out.index_put_(place, self.values.flatten(), accumulate=True)  # no second [N, F]
        return out if self.leading is None else out.reshape(self.shape)

    def to_sparse(self) -> Tensor:
        """Return a sparse COO tensor [..., d_sae] of the values other than 0; differentiable."""
        rows, places, values = self.entry_rows(), self._places().flatten(), self.values.flatten()
        kept = (values != 0).nonzero().flatten()
        tokens = torch.unravel_index(rows[kept], self._tokens) if self._tokens else ()
        index = torch.stack([*tokens, places[kept].long()])
        made = torch.sparse_coo_tensor(  # the indices were checked by `_places`
            index, values[kept], self.shape, check_invariants=False
        )
        return made.coalesce()

    def latent(self, latent: int | Sequence[int] | Tensor) -> Tensor:
        """Return the values of a latent, 0 where it is not active, in the tokens' shape.

        Of several latents the result is [..., number of latents]. Differentiable.

        Raises IndexError for a number that is no latent.
        """
        numbers = latent_numbers(latent, self.d_sae)
        places = places_of(self.indices, numbers, self.d_sae).flatten()
        values = torch.where(places >= 0, self.values.flatten(), 0)
        found = values.new_zeros(self.n_rows, len(numbers))
        found = found.index_put((self.entry_rows(), places.clamp_min(0)), values, accumulate=True)
        return found.reshape(self._tokens if is_one(latent) else (*self._tokens, len(numbers)))

    def to(
        self,
        device: str | torch.device | torch.dtype | Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> SparseCode:
        """Return the code on a device, its values as `dtype`; one argument may be either.

        A tensor in place of the device gives both.
        """
        place: str | torch.device | None = None
        if isinstance(device, Tensor):
            place, dtype = device.device, device.dtype
        elif isinstance(device, torch.dtype):
            dtype = device
        else:
            place = device
        return replace(
            self,
            values=self.values.to(device=place, dtype=dtype),
            indices=self.indices.to(place),
            offsets=None if self.offsets is None else self.offsets.to(place),
            aux=None if self.aux is None else self.aux.to(place, dtype),
            base=None,
        )

    def cpu(self) -> SparseCode:
        """Return the code on the CPU."""
        return self.to("cpu")

    def detach(self) -> SparseCode:
        """Return the code without its graph; both share memory."""
        aux = None if self.aux is None else self.aux.detach()
        return replace(self, values=self.values.detach(), aux=aux, base=None)

    # ---- edited ------------------------------------------------------------------------------

    def set(
        self,
        latent: int | Sequence[int] | Tensor,
        value: float | Tensor,
    ) -> SparseCode:
        """Return a code in which latents have a given value for every token, active or not.

        Differentiable in the other values and in `value`.

        Args:
            latent: one number, or several, without repetition.
            value: one for all; or for one latent a tensor that broadcasts to the tokens' shape, for
                several one that broadcasts to that shape followed by the number of latents.
                0 ablates a latent.

        Raises IndexError for a number that is no latent.
        """
        numbers = latent_numbers(latent, self.d_sae)
        places = places_of(self.indices, numbers, self.d_sae)
        values = torch.where(places >= 0, 0, self.values)
        if isinstance(value, int | float) and value == 0:
            return self._edited(values, self.indices, self.offsets)
        given = one_a_token("value", value, latent, len(numbers), self._tokens, self.values)
        signed = self.signed or not isinstance(value, int | float) or value < 0
        parts = append_entries(values, self.indices, self.offsets, numbers, given)
        return self._edited(*parts, signed=signed)

    def scaled(
        self,
        latent: int | Sequence[int] | Tensor,
        factor: float | Tensor,
    ) -> SparseCode:
        """Return a code in which the values of latents are multiplied by a factor.

        Differentiable in the values and in `factor`. Arguments and errors as for `set`.
        """
        numbers = latent_numbers(latent, self.d_sae)
        places = places_of(self.indices, numbers, self.d_sae)
        given = one_a_token("factor", factor, latent, len(numbers), self._tokens, self.values)
        rows = self.entry_rows().view(self.indices.shape)
        factors = given[rows, places.clamp_min(0)]
        values = torch.where(places >= 0, self.values * factors, self.values)
        signed = self.signed or isinstance(factor, Tensor) or factor < 0
        return self._edited(values, self.indices, self.offsets, signed=signed)

    def mask(
        self,
        *,
        tokens: Sequence[bool] | Tensor | None = None,
        latents: Sequence[int] | Tensor | None = None,
    ) -> SparseCode:
        """Return a code in which only some tokens and latents keep their values; others are 0.

        Args:
            tokens: bool, broadcasts to the tokens' shape: which to keep; None: all.
            latents: bool [d_sae], or numbers: which to keep; None: all.

        Raises ValueError for another shape, IndexError for a number that is no latent.
        """
        values = self.values
        if tokens is not None:
            chosen = torch.as_tensor(tokens, dtype=torch.bool, device=values.device)
            kept = expanded("tokens", chosen, self._tokens).flatten()
            kept = kept[self.entry_rows().view(self.indices.shape)]
            values = torch.where(kept, values, 0)
        if latents is not None:
            numbers = chosen_latents(latents, self.d_sae)
            places = places_of(self.indices, numbers, self.d_sae)
            values = torch.where(places >= 0, values, 0)
        return self._edited(values, self.indices, self.offsets)

    def _edited(
        self,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        *,
        signed: bool | None = None,
        leading: tuple[int, ...] | None = None,
    ) -> SparseCode:
        """Return a code of these entries, which has its own identity."""
        return SparseCode(
            values,
            indices,
            self.d_sae,
            offsets,
            precision=self.precision,
            signed=self.signed if signed is None else signed,
            leading=self.leading if leading is None else leading,
            units=self.units,
        )

    # ---- which latents fire ------------------------------------------------------------------

    def fires(self) -> Tensor:
        """Return which entries fire, bool in the shape of values; NaN does not."""
        return self.values.abs() > 0 if self.signed else self.values > 0

    def n_active(self) -> Tensor:
        """Return the number of entries that fire, 0-d int64."""
        return self.fires().sum()

    def l0(self) -> Tensor:
        """Return how many latents fire for each token, int64 in the tokens' shape."""
        if not torch.compiler.is_compiling():
            self.check()
        fires = self.fires()
        if self.offsets is None:
            return fires.sum(1).reshape(self._tokens)
        counts = torch.cat([self.offsets.new_zeros(1), fires.cumsum(0)])
        return counts[self.offsets].diff().reshape(self._tokens)

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

    # ---- entries -----------------------------------------------------------------------------

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
        units: Units | None = None,
    ) -> SparseCode:
        """Return a code with these entries and other values, which are 0 wherever they were 0.

        Both codes share the latent-major view. Without `units` the values have the code's.
        """
        base = self if self.base is None else self.base
        return SparseCode(
            values,
            self.indices,
            self.d_sae,
            self.offsets,
            precision=self.precision,
            signed=self.signed,
            base=base,
            leading=self.leading,
            units=self.units if units is None else units,
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

    def detach(self) -> DenseCode:
        """Return the code without its graph; both share memory."""
        return replace(self, values=self.values.detach())

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
