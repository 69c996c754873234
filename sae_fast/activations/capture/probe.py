"""Runs of a network on a few tokens, to find what its configuration might not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast.activations.capture.hooks import find_blocks, find_parts
from sae_fast.activations.capture.loading import device_of

PROBE_TOKENS = 8
PROBED_BLOCKS = 4  # some models look ahead only in every second or third block


_PROBING: ContextVar[bool] = ContextVar("probing", default=False)


@dataclass(frozen=True)
class Source:
    """The texts that an encoder reads while a decoder reads others.

    Attributes:
        tokens: [B, S] int64.
        mask: [B, S] bool, False for padding.
    """

    tokens: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Source:
        """Return it on a device."""
        return Source(self.tokens.to(device), self.mask.to(device))


def whole_source(tokens: Tensor) -> Source:
    """Return tokens [B, S] without padding as a source."""
    return Source(tokens, torch.ones_like(tokens, dtype=torch.bool))


def is_probing() -> bool:
    """Return whether the network runs on tokens that only try it out."""
    return _PROBING.get()


def probe_tokens(
    network: nn.Module, tokenizer: Any = None, context: int | None = None
) -> Tensor | None:
    """Return ordinary tokens [1, T + 1] int64; None: too few, or none are known.

    Without a tokenizer they are tokens that the configuration does not name.
    """
    embeddings = getattr(network, "get_input_embeddings", lambda: None)()
    rows = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
    known = min([number for number in (rows, _length(tokenizer)) if number is not None], default=0)
    special = {*_configured_tokens(getattr(network, "config", None))}
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
    length = min(PROBE_TOKENS, context or PROBE_TOKENS)
    ordinary = [token for token in range(known) if token not in special]
    if length < 2 or len(ordinary) < length + 1:
        return None
    step = max(1, len(ordinary) // (2 * PROBE_TOKENS))  # the last ones often stand for pictures
    return torch.tensor([ordinary[: step * (length + 1) : step]])


def _length(tokenizer: Any) -> int | None:
    return None if tokenizer is None else len(tokenizer)


def _configured_tokens(config: Any) -> Iterator[int]:
    """Yield the tokens that a configuration names: pad_token_id, pad_index, image_token_id."""
    for part in (config, getattr(config, "text_config", None)):
        for name, value in getattr(part, "__dict__", {}).items():
            if name.endswith(("_token_id", "_index")) and isinstance(value, int):
                yield value


def sees_later_tokens(network: nn.Module, tokens: Tensor) -> bool | None:
    """Find out whether the activations of a token change with a later token.

    Args:
        network: a language model.
        tokens: [1, T + 1] int64, all different; the last two are tried as the last one.

    Returns: None where the network does not run on tokens alone, has no blocks, or gives the last
    place the same activations for both.
    """
    try:
        blocks = find_blocks(network).modules
        one, other = tokens[:, :-1], torch.cat([tokens[:, :-2], tokens[:, -1:]], dim=1)
        device = device_of(network)
        rows = _output_of(
            network, blocks[min(PROBED_BLOCKS, len(blocks)) - 1], torch.cat([one, other]).to(device)
        )
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError):
        return None
    if rows is None or not bool(torch.isfinite(rows).all()) or torch.equal(*rows[:, -1]):
        return None
    return _differ(rows)


def _differ(rows: Tensor) -> bool:
    """Return whether rows [2, T, D] differ before the last place by more than rounding.

    The rows of a causal model are equal to the bit, but for experts that take other numbers of
    tokens.
    """
    if torch.equal(rows[0, :-1], rows[1, :-1]):
        return False
    changes = (rows[0].float() - rows[1].float()).norm(dim=1)
    rounding = 2 * torch.finfo(rows.dtype).eps if rows.dtype.itemsize < 4 else 1e-5
    return bool(changes[:-1].max() > rounding * changes[-1])


def _output_of(network: nn.Module, module: nn.Module, tokens: Tensor) -> Tensor | None:
    """Return the output [B, T, D] of a module while the network reads `tokens` [B, T]."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        rows = output[0] if isinstance(output, tuple | list) else output
        if isinstance(rows, Tensor) and rows.shape[:2] == tokens.shape:
            outputs.append(rows.clone())
        raise _Seen

    handle = module.register_forward_hook(keep)
    try:
        with as_evaluated(network):
            run_on_tokens(network, tokens)
    except _Seen:
        pass
    finally:
        handle.remove()
    return outputs[0] if outputs else None


def run_on_tokens(
    network: nn.Module,
    tokens: Tensor,
    mask: Tensor | None = None,
    source: Source | None = None,
) -> None:
    """Run a network on tokens [B, T], without a cache for the next ones.

    Of a model with an encoder and a decoder the encoder alone reads the tokens, or with a source
    the decoder does while the encoder reads the source.
    """
    parts = find_parts(network)
    caches = hasattr(getattr(network, "config", None), "use_cache")
    without_cache = {"use_cache": False} if caches else {}
    given = None if mask is None else mask.to(torch.int64)
    if parts is None:
        network(input_ids=tokens, attention_mask=given, **without_cache)
    elif source is None:
        network.get_submodule(parts.encoder)(input_ids=tokens, attention_mask=given)
    else:
        network(
            input_ids=source.tokens,
            attention_mask=source.mask.to(torch.int64),
            decoder_input_ids=tokens,
            decoder_attention_mask=given,
            **without_cache,
        )


@contextmanager
def as_evaluated(network: nn.Module) -> Iterator[None]:
    """Run a network without gradients and without dropout, and leave it as it was.

    Meanwhile what is hooked into it by `splicing.hooked` rests.
    """
    training = [module for module in network.modules() if module.training]
    network.eval()
    token = _PROBING.set(True)
    try:
        with torch.no_grad():
            yield
    finally:
        _PROBING.reset(token)
        for module in training:
            module.training = True


class _Seen(Exception):
    """Ends a forward pass when the module has run."""
