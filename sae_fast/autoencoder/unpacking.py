"""The result of `SparseAutoencoder.forward`: a tensor that refuses to be unpacked.

Code written for other libraries unpacks a call of the model into x_hat and its code. A tensor of
two rows would be unpacked into its rows without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Undivided(Tensor):
    """A tensor whose iteration is an error; what is computed from it is an ordinary tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Tensor]:
        raise TypeError(
            "sae(x) gives x_hat alone and cannot be unpacked or iterated over: "
            "x_hat, code = sae.forward_with_code(x) gives both, "
            "x_hat, code, losses = sae.run(x) the losses too, sae(x).unbind() the rows"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Write an ordinary tensor into a pickle, which any program can load."""
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(_plain(self), memo)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(_plain(self))


def refuse_unpacking(
    x_hat: Tensor,  # any shape
) -> Tensor:
    """Return `x_hat` as an `Undivided`, or unchanged under a tracer and for a tensor subclass."""
    is_traced = (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    if is_traced or type(x_hat) is not Tensor:
        return x_hat
    return x_hat.as_subclass(Undivided)


def _plain(x_hat: Undivided) -> Tensor:
    plain: Tensor = x_hat.as_subclass(Tensor)
    return plain
