"""Working copies of a weight matrix in the form the kernels read, kept on the parameter itself.

A copy is current while the parameter's version and storage are those it was made from. Whoever
changes W through `W.data`, which autograd does not count, calls `drop_copies(W)` afterwards.
Each precision has a copy of its own, so that an evaluation in another one leaves that of the
training where it is: a CUDA graph knows it by its address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae_fast.ops.reference import ROUNDED_DTYPES

_ATTRIBUTE = "sae_fast_copies"
_ENCODER = "encoder"
_DECODER = "decoder"
_FROZEN = "frozen"


class _Copy:
    """One copy: its tensors, and the state of W that they were made from."""

    def __init__(self, W: Tensor, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors
        self.mark_current(W)

    def mark_current(self, W: Tensor) -> None:
        self.version, self.pointer = W._version, W.data_ptr()

    def is_current(self, W: Tensor) -> bool:
        return self.version == W._version and self.pointer == W.data_ptr()


class _Copies(dict[tuple[str, str], _Copy]):
    """The copies of one tensor by role and precision; they stay behind when it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Copies:
        return _Copies()

    def __reduce__(self) -> tuple[type[_Copies], tuple[()]]:
        return _Copies, ()


def encoder_copy(
    W_enc: Tensor,  # [F, D]
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`packed`, `stats` and `rounded` for encode_*: made once, then kept up to date.

    All None where nothing can be kept, under torch.compile or for inference tensors: the op then
    packs for itself.
    """
    if torch.compiler.is_compiling() or W_enc.is_inference():
        return None, None, None

    def make(W: Tensor) -> tuple[Tensor, ...]:
        packed: tuple[Tensor, ...] = torch.ops.sae_fast.pack_encoder.default(W, precision)
        return packed

    packed, stats, rounded = _current(W_enc, _ENCODER, precision, make)
    return packed, stats, rounded


def decoder_copy(
    W_dec: Tensor,  # [F, D]
    precision: str,
) -> Tensor:
    """W_dec as decode gathers it: rounded for bf16 and fp16, else itself; not differentiable."""
    dtype = ROUNDED_DTYPES.get(precision)
    if dtype is None:
        return W_dec.detach()
    if torch.compiler.is_compiling() or W_dec.is_inference():
        return W_dec.detach().to(dtype)
    return _current(W_dec, _DECODER, precision, lambda W: (W.to(dtype),))[0]


def frozen_copy(
    b: Tensor,  # any shape
) -> Tensor:
    """`b` as it is now, for what is read after b's update: the same tensor until then."""
    if torch.compiler.is_compiling():
        return b.detach().clone()
    return _current(b, _FROZEN, "fp32", lambda b: (b.clone(),))[0]


def copies_to_refresh(
    W: Tensor,  # [F, D]
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What an update of W is to write beside it: the current copy of this precision, if any."""
    copies = getattr(W, _ATTRIBUTE, {})
    for role in (_ENCODER, _DECODER):
        copy = copies.get((role, precision))
        if copy is not None and copy.is_current(W):
            tensors: tuple[Tensor, ...] = copy.tensors
            return tensors if len(tensors) == 3 else (None, None, tensors[0])
    return None, None, None


def mark_updated(W: Tensor, *refreshed: Tensor | None) -> None:
    """Count an update of W by an op: the copies it refreshed are current, the others go.

    An op's writes are invisible to autograd, which counts versions, unless they are announced.
    """
    written = [tensor for tensor in refreshed if tensor is not None]
    torch.autograd.graph.increment_version([W, *written])
    copies: dict[tuple[str, str], _Copy] = getattr(W, _ATTRIBUTE, {})
    for key, copy in list(copies.items()):
        if written and copy.tensors[-1] is written[-1]:
            copy.mark_current(W)
        else:
            del copies[key]  # stale, and as large as W


def drop_copies(W: Tensor) -> None:
    """Forget the copies of W, after a change that its version does not show."""
    getattr(W, _ATTRIBUTE, {}).clear()


def _current(
    W: Tensor, role: str, precision: str, make: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    if not hasattr(W, _ATTRIBUTE):
        setattr(W, _ATTRIBUTE, _Copies())
    copies: _Copies = getattr(W, _ATTRIBUTE)
    copy = copies.get((role, precision))
    if copy is None or not copy.is_current(W):
        with torch.no_grad():
            copies[role, precision] = copy = _Copy(W, make(W.detach()))
    return copy.tensors
