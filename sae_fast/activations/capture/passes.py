"""The tokens of the forward pass that a model is making: which of them are padding, and where.

A model with a cache reads only the tokens that it has not read before, so the position of a token
is not its place in the pass. Padding and positions are taken from the arguments of the model, or of
the part of it that holds the blocks, for callers that leave out the head.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TokensOfPass:
    """The tokens that a model reads in one forward pass.

    Attributes:
        shape: [B, T], of the tokens.
        first: position of the first one in its sequence, padding counted.
        mask: [B, T] bool, False for padding; None: there is none, or nothing says.
    """

    shape: tuple[int, int]
    first: int
    mask: Tensor | None


class PassWatch:
    """Knows the tokens of the current pass of a network, inside `watching`.

    Every thread has passes of its own.
    """

    def __init__(self) -> None:
        self._threads = threading.local()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse a copy: the copied model would keep the hooks beyond the context."""
        raise TypeError(
            "this model is watched, as by an autoencoder that is attached to it: copy, pickle or "
            "save it outside of the context; its state_dict can be saved inside"
        )

    @property
    def _passes(self) -> list[TokensOfPass | None]:
        """The passes of this thread, each inside of the one before."""
        passes: list[TokensOfPass | None] = self._threads.__dict__.setdefault("passes", [])
        return passes

    @property
    def tokens(self) -> TokensOfPass | None:
        """The tokens of the current pass; None: the model is not running, or takes no tokens."""
        return self._passes[-1] if self._passes else None

    @contextmanager
    def watching(self, network: nn.Module, path: str) -> Iterator[None]:
        """Watch a network, and the modules round the one at `path`, inside this context."""
        parts = path.split(".")
        owners = [network.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
        with ExitStack() as stack:
            for module in owners:
                if isinstance(module, nn.ModuleList | nn.ModuleDict):
                    break  # what is in it are the blocks
                names = _names_of_arguments(module)
                if not names & {"input_ids", "inputs_embeds"}:
                    continue
                for handle in (
                    module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
                    module.register_forward_hook(self._end, always_call=True),
                ):
                    stack.callback(handle.remove)
            yield

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._passes.append(_tokens_of(module, args, kwargs) or self.tokens)

    def _end(self, *_: Any) -> None:
        if self._passes:
            self._passes.pop()


def _names_of_arguments(module: nn.Module) -> set[str]:
    try:
        return set(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return set()


def _tokens_of(module: nn.Module, args: Any, kwargs: Any) -> TokensOfPass | None:
    """Return the tokens that a module's arguments say; None: they say nothing."""
    try:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:
        given = {}
    given = {**given, **given.get("kwargs", {}), **kwargs}
    tokens = next(
        (
            value
            for name in ("input_ids", "inputs_embeds")
            if isinstance(value := given.get(name), Tensor) and value.ndim >= 2
        ),
        None,
    )
    if tokens is None:
        return None
    shape, first = (tokens.shape[0], tokens.shape[1]), _length_of(given.get("past_key_values"))
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != shape[0]:
        return TokensOfPass(shape, first, None)
    if mask.shape[1] >= first + shape[1]:
        mask = mask[:, first : first + shape[1]]
    if mask.shape[1] != shape[1]:
        return TokensOfPass(shape, first, None)
    mask = mask.to(torch.bool)
    # On a GPU looking at the mask would wait for the device.
    return TokensOfPass(shape, first, None if not mask.is_cuda and bool(mask.all()) else mask)


def _length_of(cache: Any) -> int:
    """Return how many tokens a cache holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    try:
        return int(cache[0][0].shape[-2])  # a tuple of keys and values for each layer
    except (TypeError, IndexError, AttributeError):
        return 0
