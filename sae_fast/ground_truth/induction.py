"""Sequences with repeated spans, and a transformer of two attention layers that continues them.

A head of the first layer tells each place which token came before it; a head of the second layer
looks for a place whose token before is the present token, and copies the token there: induction
(arXiv:2209.11895).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_COPIES = 0.6  # share of the spans that repeat an earlier one
_SPANS = (4, 10)  # tokens
_FRESH = 8  # tokens at the beginning, and between a span and what it repeats at least 4


def draw_sequences(
    count: int, length: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw sequences of random tokens in which spans are repeated.

    Returns the tokens [count, length] int64, and which of them are copied, bool.
    """
    tokens = torch.randint(vocabulary, (count, length), generator=generator)
    copied = torch.zeros(count, length, dtype=torch.bool)
    source = torch.full((count,), -1)  # the place that the next token is copied from
    left = torch.full((count,), _FRESH)  # tokens left of the present span
    for place in range(length):
        if place >= _FRESH:
            starts = torch.randint(place - 3, (count,), generator=generator)
            is_copy = torch.rand(count, generator=generator) < _COPIES
            spans = torch.randint(_SPANS[0], _SPANS[1] + 1, (count,), generator=generator)
            is_new = left == 0
            source = torch.where(is_new, torch.where(is_copy, starts, -1), source)
            left = torch.where(is_new, spans, left)
        copies = source >= 0
        tokens[copies, place] = tokens[copies, source[copies]]
        copied[:, place] = copies
        source = torch.where(copies, source + 1, source)
        left = left - 1
    return tokens, copied


@dataclass(frozen=True)
class Variables:
    """The variables of induction at each place of sequences, [N, T] each.

    Attributes:
        previous: the token before, −1 at the first place; int64.
        target: the token after the latest earlier occurrence of the present token, which induction
            expects next, −1 where there is none; int64.
        is_repeated: whether the present token has occurred before.
        previous_is_repeated: whether the token before had occurred before.
        is_inside: whether the present token and the one before have occurred side by side before.
    """

    previous: Tensor
    target: Tensor
    is_repeated: Tensor
    previous_is_repeated: Tensor
    is_inside: Tensor


def variables_of(
    tokens: Tensor,  # [N, T] int64
) -> Variables:
    """Return the variables of induction of sequences."""
    n_rows, length = tokens.shape
    nothing = torch.full((n_rows, 1), -1)
    previous = torch.cat([nothing, tokens[:, :-1]], 1)
    is_earlier = torch.ones(length, length, dtype=torch.bool).tril(-1)  # [place, earlier place]
    same = (tokens[:, :, None] == tokens[:, None]) & is_earlier
    places = torch.arange(length)
    latest = torch.where(same, places, -1).amax(2)
    follower = tokens.gather(1, (latest + 1).clamp_max(length - 1))
    is_repeated = latest >= 0
    both = same & (previous[:, :, None] == previous[:, None])
    both[:, :, 0] = False  # the first place has no token before
    before = torch.cat([torch.zeros(n_rows, 1, dtype=torch.bool), is_repeated[:, :-1]], 1)
    target = torch.where(is_repeated, follower, -1)
    return Variables(previous, target, is_repeated, before, both.any(2))


class AttentionTransformer(nn.Module):
    """Two layers of causal attention over tokens, without MLPs.

    Args:
        vocabulary: number of tokens.
        length: of the longest sequence.
        d_model: width of the residual stream.
        heads: of each layer.
        generator: draws the first weights.
    """

    def __init__(
        self, vocabulary: int, length: int, d_model: int, heads: int, generator: torch.Generator
    ) -> None:
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.8 / math.sqrt(d_model) * torch.randn(shape, generator=generator))

        self.heads = heads
        self.embedding, self.positions = drawn(vocabulary, d_model), drawn(length, d_model)
        self.inputs = nn.ParameterList(drawn(d_model, 3 * d_model) for _ in range(2))
        self.outputs = nn.ParameterList(drawn(d_model, d_model) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(3))
        self.unembedding = drawn(d_model, vocabulary)

    def stream(
        self,
        tokens: Tensor,  # [N, T] int64
        layer: int,
    ) -> Tensor:
        """Return the residual stream after a layer, 1 or 2, [N, T, d_model]."""
        n_rows, length = tokens.shape
        x = self.embedding[tokens] + self.positions[:length]
        for place in range(layer):
            rows = self.norms[place](x) @ self.inputs[place]
            parts = rows.view(n_rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            query, key, value = parts
            attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + attended.transpose(1, 2).flatten(2) @ self.outputs[place]
        return x

    def forward(
        self,
        tokens: Tensor,  # [N, T] int64
    ) -> Tensor:
        """Return the logits of the next token, [N, T, vocabulary]."""
        logits: Tensor = self.norms[2](self.stream(tokens, 2)) @ self.unembedding
        return logits


def train_induction(
    model: AttentionTransformer,
    draw: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Train on new sequences in each step; return the curve, [n, 3] float64.

    Its columns: step, loss, and accuracy on tokens that are copied together with the one before.

    Args:
        model: the transformer.
        draw: draws the sequences of a step, see `draw_sequences`.
        steps: of training.
        learning_rate: its peak, after 100 steps; it falls to 0 in the last two thirds.
        progress: called after each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    curve = []
    for step in range(steps):
        decay = min(1.0, 1.5 * (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / 100, decay)
        tokens, copied = draw()
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % max(1, steps // 60) == 0 or step + 1 == steps:
            curve.append([step + 1, float(loss.detach()), copying(logits, tokens, copied)])
        progress(step + 1, steps)
    return torch.tensor(curve, dtype=torch.float64)


def copying(
    logits: Tensor,  # [N, T − 1, V]
    tokens: Tensor,  # [N, T]
    copied: Tensor,  # [N, T] bool
) -> float:
    """Return the accuracy on tokens that are copied together with the one before; 0 without any."""
    inside = copied[:, 1:] & copied[:, :-1]
    right = logits.argmax(2) == tokens[:, 1:]
    return float(right[inside].double().mean()) if bool(inside.any()) else 0.0
