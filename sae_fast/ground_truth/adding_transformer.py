"""A one-layer transformer that adds modulo p, trained until it generalises.

The input is the three tokens a, b and "=", and the answer is read at the last one. Nothing is
normalised and attention is causal, so that keys and values depend on a token and its place alone:
they are made once for every number, not once for every pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

_WARMUP = 10  # steps
_EVALUATIONS = 60  # points of the curve
_BETAS = (0.9, 0.98)


class AddingTransformer(nn.Module):
    """One block of attention and MLP over a, b and "=".

    Args:
        p: the modulus.
        d_model: width of the residual stream.
        heads: of attention.
        d_mlp: neurons.
        generator: draws the first weights.
    """

    def __init__(
        self, p: int, d_model: int, heads: int, d_mlp: int, generator: torch.Generator
    ) -> None:
        super().__init__()

        def drawn(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(fan_in))

        self.p, self.heads = p, heads
        self.embedding = drawn(p + 1, d_model, fan_in=d_model)
        self.positions = drawn(3, d_model, fan_in=d_model)
        self.query, self.key, self.value, self.output = (
            drawn(d_model, d_model, fan_in=d_model) for _ in range(4)
        )
        self.W_in, self.b_in = (
            drawn(d_model, d_mlp, fan_in=d_model),
            nn.Parameter(torch.zeros(d_mlp)),
        )
        self.W_out, self.b_out = (
            drawn(d_mlp, d_model, fan_in=d_mlp),
            nn.Parameter(torch.zeros(d_model)),
        )
        self.unembedding = drawn(d_model, p, fan_in=d_model)

    def activations(
        self,
        a: Tensor,  # [N] int64
        b: Tensor,  # [N] int64
        site: Literal["residual", "mlp_out"] = "residual",
    ) -> Tensor:
        """Return the stream after the MLP, or the MLP's output, at "=", [N, d_model]."""
        first = self.embedding[: self.p] + self.positions[0]
        second = self.embedding[: self.p] + self.positions[1]
        equals = self.embedding[self.p :] + self.positions[2]
        query = self._split(equals @ self.query)
        tokens = ((first, a), (second, b), (equals, torch.zeros_like(a)))
        scores = torch.stack(
            [(self._split(x @ self.key) * query).sum(-1)[index] for x, index in tokens]
        )
        pattern = (scores / math.sqrt(query.size(-1))).softmax(0)[..., None]  # [3, N, heads, 1]
        values = torch.stack([self._split(x @ self.value)[index] for x, index in tokens])
        stream = equals + (pattern * values).sum(0).flatten(1) @ self.output
        mlp = functional.relu(stream @ self.W_in + self.b_in) @ self.W_out + self.b_out
        return mlp if site == "mlp_out" else stream + mlp

    def _split(self, rows: Tensor) -> Tensor:
        return rows.view(len(rows), self.heads, -1)

    def forward(
        self,
        a: Tensor,  # [N] int64
        b: Tensor,  # [N] int64
    ) -> Tensor:
        """Return the logits of the sum, [N, p]."""
        return self.activations(a, b) @ self.unembedding


def all_pairs(p: int) -> tuple[Tensor, Tensor]:
    """Return a and b of all pairs, [p * p] int64 each; b changes faster."""
    numbers = torch.arange(p)
    return numbers.repeat_interleave(p), numbers.repeat(p)


def train_adding(
    model: AddingTransformer,
    train_fraction: float,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    generator: torch.Generator,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Train on a random share of all pairs, all of them in each step; return the curve.

    Its columns, [n, 4] float64: step, loss on these pairs, loss and accuracy on the others.
    """
    a, b = all_pairs(model.p)
    answers = (a + b) % model.p
    order = torch.randperm(len(a), generator=generator)
    n_train = min(max(1, round(train_fraction * len(a))), len(a) - 1)
    train, others = order[:n_train], order[n_train:]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=_BETAS, weight_decay=weight_decay
    )
    curve: list[list[float]] = []
    interval = max(1, steps // _EVALUATIONS)
    for step in range(steps):
        decay = min(1.0, 3 * (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / _WARMUP, decay)
        # In float32 the gradients of losses below 1e-6 are rounding, which Adam makes as large as
        # any: after 2,000 steps one direction that no answer depends on had 97 % of the variance.
        loss = functional.cross_entropy(model(a[train], b[train]).double(), answers[train])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % interval == 0 or step + 1 == steps:
            with torch.no_grad():
                logits = model(a[others], b[others])
            right = (logits.argmax(1) == answers[others]).double().mean()
            other_loss = functional.cross_entropy(logits, answers[others])
            curve.append([step + 1, float(loss.detach()), float(other_loss), float(right)])
        progress(step + 1, steps)
    return torch.tensor(curve, dtype=torch.float64)
