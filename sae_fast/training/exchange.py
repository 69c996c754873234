"""The exchange of gradients between ranks, each of which makes some of the parts of a step.

A process alone makes the parts of a step (`grad_acc_steps`) one after the other, and adds up their
gradients. Ranks make R of them at a time. After each backward they give each other what it has left
on the parameters: row factors as they are, whose size does not depend on d_sae, and the gradients
of vectors. Each rank then has what a process alone would have after these R parts, in the same
order, so its update is equal to the bit.

Of a bias [F] nothing is sent where its gradient follows from the factors, as for TopK; else its
numbers other than 0, or all, whichever is less. Matrices with dense gradients are summed slice by
slice.

The rows of a part, which are nearly half of what is sent, are on their way while the part is made.
The dense sides of W_dec's factors, as much again, are on their way from the moment when backward
has made them, until the update has merged and measured the gradient of W_enc, which needs the rows
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.distributed.ranks import PendingGather, Ranks
from sae_fast.distributed.wire import DTYPES
from sae_fast.ops.code import CodeKey
from sae_fast.ops.row_factors import RowFactor, factor_sums, row_factors, watched

_Shape = tuple[int, list[int]]  # a number of `DTYPES`, and the lengths of the axes
_ROWS = ("W_enc", "W_dec")  # the parameters that have factors
# Forms in which a gradient or the mask of the latents that fired is sent.
_NONE, _WHOLE, _LISTED, _FACTORS = "none", "whole", "listed", "factors"


class Part(NamedTuple):
    """A part of a step, beside its gradients.

    Attributes:
        values: [M], its metrics, the loss first.
        variance: 0-d, of its rows.
        fired: [F] bool, the latents that fired in it.
        observed: sums over its tokens by name, 0-d.
    """

    values: Tensor
    variance: Tensor
    fired: Tensor
    observed: dict[str, Tensor]


class GradientExchange:
    """Gathers what each rank's backward has left, part by part.

    Args:
        sae: the model.
        names: of the parameters that are trained.
        ranks: the processes.
    """

    def __init__(self, sae: SparseAutoencoder, names: Sequence[str], ranks: Ranks) -> None:
        self.ranks = ranks
        self._sae = sae
        self._names = tuple(names)
        self._before: dict[str, Tensor | None] = {}
        self._n_factors: dict[str, int] = {}
        self._ahead = _Ahead(ranks)

    @contextmanager
    def part(self, x: Tensor) -> Iterator[None]:
        """Put the gradients of the parts before aside, and send ahead what this part needs.

        Its forward and backward are made in this context, and `gather` is called after it.

        Args:
            x: [N, D], the rows of the part, which must stay as they are until `finish`.
        """
        if self.ranks.size == 1:
            yield
            return
        self._ahead.begin(x)
        for name in self._names:
            parameter = self._sae.get_parameter(name)
            self._before[name], parameter.grad = parameter.grad, None
        self._n_factors = {name: len(row_factors(self._sae.get_parameter(name))) for name in _ROWS}
        with watched(self._sae.W_dec, lambda factor: self._ahead.add(factor.dense)):
            yield

    @torch.no_grad()
    def gather(self, part: Part, code: ops.Code) -> list[Part]:
        """Add the gradients of this part on all ranks to those before; return these parts.

        Args:
            part: of this rank, whose backward was called.
            code: of the part.
        """
        if self.ranks.size == 1:
            return [part]
        ahead = self._ahead.complete()
        table = _Table([each.parts[self.ranks.rank] for each in ahead])
        own = {name: self._own_factors(name) for name in _ROWS}
        header: dict[str, Any] = {
            "factors": {name: [table.add_factor(f) for f in own[name]] for name in _ROWS},
            "grads": {name: self._add_grad(table, name, own["W_enc"]) for name in self._vectors},
            "matrices": self._dense_matrices(),
            "fired": _add_fired(table, part.fired, code, own["W_dec"]),
            "values": table.add(part.values),
            "variance": table.add(part.variance),
            "observed": {name: table.add(value) for name, value in part.observed.items()},
            "ahead": self._ahead.wanted(own["W_enc"], own["W_dec"]),
        }
        found = self.ranks.gather(header, table.tensors)
        self._ahead.agree([other["ahead"] for other, _ in found])
        for rows in ahead[:1]:
            rows.wait()
        found = [
            (other, [*(each.parts[number] for each in ahead), *sent])
            for number, (other, sent) in enumerate(found)
        ]
        shift = _shift_of(own["W_enc"])
        factors = [
            own if number == self.ranks.rank else self._factors(theirs, tensors, shift)
            for number, (theirs, tensors) in enumerate(found)
        ]
        for name in _ROWS:
            listed = row_factors(self._sae.get_parameter(name))
            del listed[self._n_factors[name] :]
            for each in factors:
                listed.extend(each[name])
        self._add_vectors(found, factors)
        self._add_matrices([header["matrices"] for header, _ in found])
        others = zip(found, factors, strict=True)
        parts = [_part(self._sae, *one, theirs) for one, theirs in others]
        return [part if number == self.ranks.rank else one for number, one in enumerate(parts)]

    def finish(self) -> None:
        """Wait for the dense sides of W_dec's factors, which nothing may read before."""
        self._ahead.finish()

    @property
    def _n_latents(self) -> int:
        """The number of latents that the process holds, all of them or a block."""
        return len(self._sae.W_enc)

    @property
    def _vectors(self) -> list[str]:
        return [name for name in self._names if self._sae.get_parameter(name).dim() < 2]

    def _dense_matrices(self) -> list[str]:
        """Return the names of the matrices of which this rank has a dense gradient."""
        parameters = {name: self._sae.get_parameter(name) for name in self._names}
        return [name for name, p in parameters.items() if p.dim() >= 2 and p.grad is not None]

    def _own_factors(self, name: str) -> list[RowFactor]:
        return row_factors(self._sae.get_parameter(name))[self._n_factors[name] :]

    def _add_grad(self, table: _Table, name: str, factors: Sequence[RowFactor]) -> list[Any]:
        """Return in which form the gradient of a vector is sent; put its tensors on the table."""
        grad = self._sae.get_parameter(name).grad
        if grad is None:
            return [_NONE]
        if name == "b_enc" and factors:
            sums = _sums(factors, self._n_latents)
            if torch.equal(sums.view(torch.int32), grad.view(torch.int32)):
                return [_FACTORS]
        if not grad.is_cuda and len(grad) == self._n_latents:
            places = (grad.view(torch.int32) != 0).nonzero().flatten()
            if 2 * len(places) < len(grad):
                return [_LISTED, table.add(places.int()), table.add(grad[places])]
        return [_WHOLE, table.add(grad)]

    def _factors(
        self, header: Mapping[str, Any], tensors: Sequence[Tensor], shift: Tensor | None
    ) -> dict[str, list[RowFactor]]:
        """Return another rank's factors; `shift` is the one that they were taken with, too."""
        keys: dict[int, CodeKey] = {}

        def made(places: Sequence[int | None]) -> RowFactor:
            *parts, has_shift, key = places
            values, indices, offsets, coefficients, dense = (
                None if place is None else tensors[place] for place in parts
            )
            assert values is not None
            assert indices is not None
            assert coefficients is not None
            assert dense is not None
            assert key is not None
            code = (values, indices, offsets, coefficients, dense)
            known = keys.setdefault(key, CodeKey())
            return RowFactor(*code, shift if has_shift else None, known)

        return {name: [made(places) for places in header["factors"][name]] for name in _ROWS}

    def _add_vectors(
        self,
        found: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]],
        factors: Sequence[Mapping[str, Sequence[RowFactor]]],
    ) -> None:
        """Add the vectors' gradients of all ranks, in their order, to those before."""
        for name in self._vectors:
            parameter = self._sae.get_parameter(name)
            own, total = parameter.grad, self._before[name]
            for number, (header, tensors) in enumerate(found):
                form, *places = header["grads"][name]
                if form == _NONE:
                    continue
                if number == self.ranks.rank:
                    assert own is not None
                    grad = own
                elif form == _FACTORS:
                    grad = _sums(factors[number]["W_enc"], self._n_latents)
                elif form == _LISTED:
                    grad = torch.zeros_like(parameter)
                    grad[tensors[places[0]].long()] = tensors[places[1]]
                else:
                    grad = tensors[places[0]]
                total = grad.clone() if total is None else total.add_(grad)
            parameter.grad = total

    def _add_matrices(self, found: Sequence[Sequence[str]]) -> None:
        """Add the dense gradients of all ranks to those before.

        Args:
            found: the names of the matrices that each rank has one of.
        """
        for name in self._names:
            parameter = self._sae.get_parameter(name)
            if parameter.dim() >= 2:
                has = [name in names for names in found]
                before, own = self._before[name], parameter.grad
                parameter.grad = self.ranks.add_in_order(before, own, parameter.detach(), has)


class _Ahead:
    """Tensors of a part that are sent before the rest of it: its rows, and W_dec's dense sides.

    They have the shapes that all ranks had in the part before, and no others, so each rank knows
    what the others send. One that a rank does not have this time it sends as zeros.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._agreed: list[_Shape] = []  # of what is sent ahead of the next part, the rows first
        self._begun: list[PendingGather] = []
        self._waits: list[Callable[[], None]] = []  # for dense sides, also of the parts before
        self._x: Tensor | None = None

    def begin(self, x: Tensor) -> None:
        """Start with a part of these rows [N, D]."""
        self._x, self._begun = x, []
        self.add(x)

    def add(self, tensor: Tensor) -> None:
        """Send a tensor, if it is the next one that was agreed on."""
        number = len(self._begun)
        sent = {_identity(each.parts[self._ranks.rank]) for each in self._begun}
        if number == len(self._agreed) or _identity(tensor) in sent:
            return
        if _shape(tensor) == self._agreed[number]:
            self._begun.append(self._ranks.begin_gather(tensor))

    def complete(self) -> list[PendingGather]:
        """Return everything that is sent ahead, the rows first."""
        assert self._x is not None
        for dtype, shape in self._agreed[len(self._begun) :]:
            self.add(torch.zeros(shape, dtype=DTYPES[dtype], device=self._x.device))
        begun, self._begun = self._begun, []
        self._waits.extend(each.wait for each in begun[1:])
        return begun

    def wanted(self, encoder: Sequence[RowFactor], decoder: Sequence[RowFactor]) -> list[_Shape]:
        """Return what this rank could have sent ahead of the rest of its part, by its factors."""
        assert self._x is not None
        x, self._x = self._x, None
        if all(_identity(factor.dense) != _identity(x) for factor in encoder):
            return []
        sides = {_identity(factor.dense): factor.dense for factor in decoder}
        return [_shape(tensor) for tensor in (x, *sides.values())]

    def agree(self, wanted: Sequence[list[_Shape]]) -> None:
        """Take what all ranks could have sent ahead of this part for the next one."""
        first, *others = ([(dtype, list(shape)) for dtype, shape in each] for each in wanted)
        self._agreed = first if all(other == first for other in others) else []

    def finish(self) -> None:
        """Wait for what is on its way."""
        for wait in self._waits:
            wait()
        self._waits.clear()


class _Table:
    """The tensors to send, each once, however many factors have it.

    Args:
        ahead: tensors that are sent already, which have the first places.
    """

    def __init__(self, ahead: Sequence[Tensor]) -> None:
        self.tensors: list[Tensor] = []
        self._n_ahead = len(ahead)
        self._places = {_identity(tensor): place for place, tensor in enumerate(ahead)}
        self._keys: dict[CodeKey, int] = {}

    def add(self, tensor: Tensor) -> int:
        """Return the place of a tensor, after the ones sent ahead among `tensors`."""
        identity = _identity(tensor)
        if tensor.data_ptr() and identity in self._places:
            return self._places[identity]
        self.tensors.append(tensor)
        self._places[identity] = self._n_ahead + len(self.tensors) - 1
        return self._places[identity]

    def add_factor(self, factor: RowFactor) -> list[int | None]:
        """Return the places of a factor's tensors, if it has a shift, and its code's number."""
        offsets = None if factor.offsets is None else self.add(factor.offsets)
        return [
            self.add(factor.values),
            self.add(factor.indices),
            offsets,
            self.add(factor.coefficients),
            self.add(factor.dense),
            int(factor.shift is not None),
            self._keys.setdefault(factor.code_key, len(self._keys)),
        ]


def _shape(tensor: Tensor) -> _Shape:
    return DTYPES.index(tensor.dtype), list(tensor.shape)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _shift_of(factors: Sequence[RowFactor]) -> Tensor | None:
    """Return the shift of factors, which is one tensor for a step: the decoder's bias before it."""
    return next((factor.shift for factor in factors if factor.shift is not None), None)


def _sums(factors: Sequence[RowFactor], d_sae: int) -> Tensor:
    """Return the sums of the coefficients by latent [F], added up as an encoder's backward does."""
    total: Tensor | None = None
    for factor in factors:
        sums = factor_sums(factor, d_sae)
        total = sums if total is None else total + sums
    assert total is not None
    return total


def _add_fired(
    table: _Table,
    fired: Tensor,  # [F] bool
    code: ops.Code,
    factors: Sequence[RowFactor],  # of W_dec
) -> list[Any]:
    """Return in which form the mask is sent: by the factor that has the code, or whole."""
    if isinstance(code, ops.SparseCode):
        for number, factor in enumerate(factors):
            if _is_same(factor.values, code.values) and _is_same(factor.indices, code.indices):
                return [_FACTORS, number, code.signed]
    return [_WHOLE, table.add(fired)]


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors are one array in memory."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape


def _part(
    sae: SparseAutoencoder,
    header: Mapping[str, Any],
    tensors: Sequence[Tensor],
    factors: Mapping[str, Sequence[RowFactor]],
) -> Part:
    """Return the part of another rank."""
    form, *places = header["fired"]
    if form == _FACTORS:
        factor, signed = factors["W_dec"][places[0]], places[1]
        code = ops.SparseCode(
            factor.values, factor.indices, len(sae.W_enc), factor.offsets, signed=signed
        )
        fired = code.fired()
    else:
        fired = tensors[places[0]]
    observed = {name: tensors[place] for name, place in header["observed"].items()}
    values, variance = tensors[header["values"]], tensors[header["variance"]]
    return Part(values, variance, fired, observed)
