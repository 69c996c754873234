"""The language in which ops are declared.

A declaration is the op's schema and, for every tensor, a few words such as "F D", "F: bool" or
"N K, E if offsets: int32". From it come the checks of the arguments, the shapes of the results, and
the lines of the op table:

- a capital letter is a size: the first tensor that has it fixes it, later ones must agree; the name
  of an integer argument is that argument; "N+1" is one more than N; "N*k" is a product;
- "scalar" is a tensor without dimensions, "any" one of any shape, "like w" one with w's shape,
  "opaque" one that only the compiled op can judge;
- "A, B if offsets" is A in a call without `offsets` and B in a call with it;
- "?active" is a size of a result that depends on the data;
- after a colon comes the dtype, float32 if there is none: "gathered" is float32, bfloat16 or
  float16, "moment" float32, bfloat16 or uint8, "of exp_avg" the dtype of that argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_fast.ops.checks import FLOAT32, GATHERED, Call, dtype_name
from sae_fast.ops.reference.moments import MOMENT_DTYPES

# The arguments of a call by name, and the sizes found so far by letter.
Known = dict[str, Any]
Condition = Callable[[Call, Known], None]
Shapes = Callable[..., tuple[Tensor, ...]]

_DTYPES = {"float32": FLOAT32, "gathered": GATHERED, "moment": MOMENT_DTYPES}
# Of offsets: the fewest elements, how the message calls their number, and no elements at all.
_COUNTS = {"N+1": (1, "N + 1", "none"), "F+1": (2, "d_sae + 1 >= 2", "0")}


class Form(NamedTuple):
    """The part of a declaration about one tensor."""

    sizes: tuple[str, ...]
    sizes_with: tuple[str, ...]  # in a call with the argument `given`
    given: str
    dtype: str

    @classmethod
    def parse(cls, words: str) -> Form:
        """Read the words of one tensor."""
        shape, _, dtype = words.partition(":")
        without, _, other = shape.partition(",")
        listed, _, given = other.partition(" if ")
        sizes = tuple(without.split())
        return cls(sizes, tuple(listed.split()), given.strip(), dtype.strip() or "float32")

    @property
    def is_opaque(self) -> bool:
        """Whether only the compiled op can judge the tensor."""
        return self.sizes == ("opaque",)

    def of(self, known: Known) -> tuple[str, ...]:
        """Return the words for the sizes in this call."""
        return self.sizes_with if self.given and known[self.given] is not None else self.sizes

    def dtypes(self, known: Known) -> tuple[torch.dtype, ...]:
        """Return the dtypes that an argument may have in this call."""
        if self.dtype.startswith("of "):
            return (known[self.dtype[3:]].dtype,)
        return _DTYPES.get(self.dtype) or (getattr(torch, self.dtype),)

    def text(self) -> str:
        """Return shape and dtype for the op table, such as "[F, D] bool"."""
        shapes = [sizes for sizes in (self.sizes, self.sizes_with) if sizes]
        dtypes = "" if self.dtype == "float32" else f" {_dtype_text(self.dtype)}"
        return " or ".join(_shape_text(sizes) for sizes in shapes) + dtypes


def _shape_text(sizes: tuple[str, ...]) -> str:
    if sizes[0] in ("any", "like"):
        return " ".join(sizes)
    return f"[{'' if sizes == ('scalar',) else ', '.join(sizes)}]".replace("?", "")


def _dtype_text(dtype: str) -> str:
    if dtype.startswith("of "):
        return f"in the dtype {dtype}"
    names = [dtype_name(one) for one in _DTYPES.get(dtype, ())] or [dtype]
    return ", ".join(names[:-1]) + (" or " if len(names) > 1 else "") + names[-1]


@dataclass(frozen=True)
class Op:
    """One op: its schema, the forms of its tensors, and the conditions on its arguments."""

    name: str
    schema: str
    arguments: tuple[str, ...]
    needed: tuple[str, ...]  # tensors that are not optional
    written: tuple[str, ...]  # tensors that the op changes
    results: tuple[str, ...]
    like: str  # the argument whose device the others share
    forms: Mapping[str, Form]  # of the arguments, in the order of the checks
    returns: Mapping[str, Form] | Shapes
    sizes: Mapping[str, Callable[[Known], int]]
    conditions: Sequence[Condition]
    data: Sequence[Condition]
    has_derivative: bool

    def is_optional(self, argument: str) -> bool:
        """Tell if an argument is a tensor that may be None."""
        return argument in self.forms and argument not in self.needed

    def check(self, *arguments: Any) -> Known:
        """Raise RuntimeError for arguments that do not fit; return them and the sizes by name."""
        # torch leaves out arguments at the end that have their default, which is None.
        missing = (None,) * (len(self.arguments) - len(arguments))
        known: Known = dict(zip(self.arguments, (*arguments, *missing), strict=True))
        for name in self.needed:  # torch lets None pass for a tensor
            if known[name] is None:
                raise RuntimeError(f"{self.name}: {name} must be a tensor, got None")
        call = Call(self.name, self.like, known[self.like])
        for name, form in self.forms.items():
            if known[name] is not None:
                self._check_tensor(call, name, form, known)
        for condition in self.conditions:
            condition(call, known)
        for name in self.written:
            if known[name] is not None:
                call.in_place(name, known[name])
        return known

    def check_data(self, known: Known) -> None:
        """Check the numbers inside the arguments; on a GPU that would wait for it."""
        call = Call(self.name, self.like, known[self.like])
        if call.device is not None and call.device.type == "cpu":
            for condition in self.data:
                condition(call, known)

    def fake(self, *arguments: Any) -> Any:
        """Check the arguments and return empty results of the right shapes and dtypes."""
        known = self.check(*arguments)
        if not isinstance(self.returns, Mapping):
            return self.returns(*arguments)
        made = [self._empty(form, known) for form in self.returns.values()]
        return tuple(made) if len(made) > 1 else made[0] if made else None

    def _check_tensor(self, call: Call, name: str, form: Form, known: Known) -> None:
        sizes, tensor = form.of(known), known[name]
        if form.is_opaque:
            return
        if sizes[0] == "like":
            call.same_shape(name, tensor, sizes[1], known[sizes[1]])
        elif sizes != ("any",):
            named = () if sizes == ("scalar",) else sizes
            call.shape(name, tensor, [self._wanted(size, known) for size in named])
        call.dtype(name, tensor, form.dtypes(known))
        call.same_device(name, tensor)
        if sizes[0] not in ("like", "any", "scalar"):
            _learn(call, name, sizes, tensor, known)

    def _wanted(self, size: str, known: Known) -> int | None:
        """Return a size as far as it is known."""
        if size.isdigit():
            return int(size)
        if size.endswith("+1"):
            rest = self._wanted(size[:-2], known)
            return None if rest is None else rest + 1
        if size in self.sizes:
            return self.sizes[size](known)
        found: int | None = known.get(size)
        return found

    def _empty(self, form: Form, known: Known) -> Tensor:
        base = known[form.dtype[3:] if form.dtype.startswith("of ") else self.like]
        given = form.dtype == "float32" or form.dtype.startswith("of ")
        dtype = base.dtype if given else getattr(torch, form.dtype)
        sizes = form.of(known)
        if sizes[0] == "like":
            shape = known[sizes[1]].shape
        else:
            shape = [self._size(size, known) for size in sizes if size != "scalar"]
        empty: Tensor = base.new_empty(shape, dtype=dtype)
        return empty

    def _size(self, size: str, known: Known) -> int:
        """Return the size of a result."""
        if size.startswith("?"):
            if size not in known:
                known[size] = torch.library.get_ctx().new_dynamic_size()
            active: int = known[size]
            return active
        factors = [self._wanted(factor, known) for factor in size.split("*")]
        return math.prod(factor for factor in factors if factor is not None)


def _learn(call: Call, name: str, sizes: tuple[str, ...], tensor: Tensor, known: Known) -> None:
    """Keep the sizes that this tensor is the first to have."""
    for size, got in zip(sizes, tensor.shape, strict=True):
        if size in _COUNTS:
            fewest, count, none = _COUNTS[size]
            must = f"{name} must have {count} elements"
            call.require(got >= fewest, must, none if got == 0 else str(got))
            known.setdefault(size[:-2], got - 1)
        else:
            known.setdefault(size, got)


def op(
    schema: str,
    *,
    tensors: Mapping[str, str],
    returns: Mapping[str, str] | Shapes,
    like: str = "",
    sizes: Mapping[str, Callable[[Known], int]] | None = None,
    require: Sequence[Condition] = (),
    data: Sequence[Condition] = (),
    has_derivative: bool = True,
) -> Op:
    """Declare an op.

    Args:
        schema: name, arguments and results, as torch.library takes them.
        tensors: the words of every tensor argument, in the order in which they are checked.
        returns: the words of every result, or a function of the arguments that makes empty ones.
        like: the argument whose device the others share; by default the first.
        sizes: capital letters that stand for a function of the arguments and the other sizes.
        require: conditions on the arguments beyond shape, dtype, device and layout.
        data: conditions on the numbers inside the arguments, looked at on the CPU alone.
        has_derivative: whether backward has a formula; if not, it raises.

    Raises:
        ValueError: if the schema has other tensors or results.
    """
    parsed = torch._C.parse_schema(f"sae_fast::{schema}")
    given = [a for a in parsed.arguments if "Tensor" in str(a.type)]
    name, results = parsed.name.removeprefix("sae_fast::"), [r.name for r in parsed.returns]
    if {a.name for a in given} != tensors.keys():
        raise ValueError(f"{name}: the schema has other tensors than {', '.join(tensors)}")
    if isinstance(returns, Mapping) and list(returns) != results:
        raise ValueError(f"{name}: the schema has other results than {', '.join(returns)}")
    return Op(
        name=name,
        schema=schema,
        arguments=tuple(a.name for a in parsed.arguments),
        needed=tuple(a.name for a in given if str(a.type) == "Tensor"),
        written=tuple(a.name for a in given if a.alias_info and a.alias_info.is_write),
        results=tuple(results),
        like=like or given[0].name,
        forms={name: Form.parse(words) for name, words in tensors.items()},
        returns={name: Form.parse(words) for name, words in returns.items()}
        if isinstance(returns, Mapping)
        else returns,
        sizes=sizes or {},
        conditions=require,
        data=data,
        has_derivative=has_derivative,
    )


def one_of(name: str, choices: Sequence[str]) -> Condition:
    """Require that the string argument is one of the choices."""
    must = f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}"

    def check(call: Call, known: Known) -> None:
        call.require(known[name] in choices, must, known[name])

    return check


def in_range(name: str, low: int) -> Condition:
    """Require that the integer argument is in [low, F], both included."""

    def check(call: Call, known: Known) -> None:
        number, d_sae = known[name], known["F"]
        must = f"{name} must be in [{low}, d_sae]"
        call.require(low <= number <= d_sae, must, f"{name}={number} with d_sae={d_sae}")

    return check


def at_least(name: str, low: int) -> Condition:
    """Require that the integer argument is at least `low`."""

    def check(call: Call, known: Known) -> None:
        call.require(known[name] >= low, f"{name} must be at least {low}", str(known[name]))

    return check


def partition(offsets: str, entries: str) -> Condition:
    """Require that the offsets, where given, ascend from 0 to the number of the entries."""

    def check(call: Call, known: Known) -> None:
        if known[offsets] is not None:
            call.partition(offsets, known[offsets], known[entries].numel())

    return check


def below(numbers: str, bound: Callable[[Known], int]) -> Condition:
    """Require that the integers of a tensor, where given, are in [0, bound)."""

    def check(call: Call, known: Known) -> None:
        if known[numbers] is not None:
            call.below(numbers, known[numbers], bound(known))

    return check


def check_given(call: Call, known: Known, name: str, wanted: bool, where: str) -> None:
    """Check that an optional tensor is given if `wanted`, and else absent; `where` says when."""
    is_given = known[name] is not None
    call.require(is_given or not wanted, f"{name} must be given where {where}", "none")
    call.require(wanted or not is_given, f"{name} must be none where {where}", "a tensor")
