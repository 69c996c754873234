"""Finite automata with random strings, and an LSTM that learns to predict the next symbol.

Reber's grammar (Reber 1967) has a state for each place between two symbols. In the embedded grammar
(Hochreiter and Schmidhuber 1997) the second symbol, T or P, comes again as the last but one, after
a string of Reber's grammar that does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SYMBOLS = "BTPSXVE"
_END = "end"
# By state, the symbols that may come next, all equally likely, and the state behind each.
REBER: Mapping[str, Mapping[str, str]] = {
    "start": {"B": "1"},
    "1": {"T": "2", "P": "3"},
    "2": {"S": "2", "X": "4"},
    "3": {"T": "3", "V": "5"},
    "4": {"X": "3", "S": "6"},
    "5": {"P": "4", "V": "6"},
    "6": {"E": _END},
    _END: {},
}


def _embedded() -> dict[str, dict[str, str]]:
    edges: dict[str, dict[str, str]] = {
        "start": {"B": "first"},
        "first": {"T": "T:start", "P": "P:start"},
    }
    for symbol in "TP":
        for state, targets in REBER.items():
            edges[f"{symbol}:{state}"] = {
                label: f"{symbol}:{target}" for label, target in targets.items()
            }
        edges[f"{symbol}:{_END}"] = {symbol: "last"}
    return {**edges, "last": {"E": _END}, _END: {}}


AUTOMATA: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "reber": REBER,
    "embedded_reber": _embedded(),
}


@dataclass(frozen=True)
class Strings:
    """Strings of an automaton, padded on the right with −1.

    Attributes:
        symbols: [N, T] int64.
        states: the state after each symbol, [N, T] int64.
    """

    symbols: Tensor
    states: Tensor

    @property
    def is_symbol(self) -> Tensor:
        """The places that are not padding, [N, T] bool."""
        return self.symbols >= 0


class Automaton:
    """A finite automaton whose edges out of a state are equally likely.

    Args:
        edges: by state, the target by symbol; the first state is the start, one without edges the
            end.
    """

    def __init__(self, edges: Mapping[str, Mapping[str, str]]) -> None:
        self.states = list(edges)
        widest = max(map(len, edges.values()))
        self._symbols = torch.full((len(edges), widest), -1)  # by state and choice
        self._targets = torch.full((len(edges), widest), -1)
        self._degrees = torch.tensor([len(targets) for targets in edges.values()])
        for row, targets in enumerate(edges.values()):
            for column, (symbol, target) in enumerate(targets.items()):
                self._symbols[row, column] = SYMBOLS.index(symbol)
                self._targets[row, column] = self.states.index(target)

    def sample(self, count: int, generator: torch.Generator) -> Strings:
        """Draw strings from the start to the end."""
        state = torch.zeros(count, dtype=torch.int64)
        symbols, states = [], []
        while bool((self._degrees[state] > 0).any()):
            degrees = self._degrees[state]
            choice = (torch.rand(count, generator=generator) * degrees).long()
            choice = choice.minimum((degrees - 1).clamp_min(0))  # a draw can round up to 1
            goes_on = degrees > 0
            symbols.append(torch.where(goes_on, self._symbols[state, choice], -1))
            state = torch.where(goes_on, self._targets[state, choice], state)
            states.append(torch.where(goes_on, state, -1))
        return Strings(torch.stack(symbols, 1), torch.stack(states, 1))

    def allowed(
        self,
        states: Tensor,  # [N] int64
    ) -> Tensor:
        """Return the probability of each symbol after states, [N, 7]; zeros at the end."""
        rows = torch.zeros(len(self.states), len(SYMBOLS))
        for state, degree in enumerate(self._degrees.tolist()):
            rows[state, self._symbols[state, :degree]] = 1 / max(degree, 1)
        return rows[states]


class SymbolLSTM(nn.Module):
    """An LSTM over symbols that predicts the next one from its hidden state.

    Args:
        hidden: width of the state.
        generator: draws the first weights.
    """

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.lstm = nn.LSTM(len(SYMBOLS), hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(SYMBOLS))
        with torch.no_grad():
            for parameter in self.parameters():
                bound = 1 / math.sqrt(hidden)
                draws = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((2 * draws - 1) * bound)

    def hidden(
        self,
        symbols: Tensor,  # [N, T] int64
    ) -> Tensor:
        """Return the hidden state after each symbol, [N, T, hidden]."""
        rows = functional.one_hot(symbols.clamp_min(0), len(SYMBOLS)).float()
        states: Tensor = self.lstm(rows)[0]
        return states

    def loss(self, strings: Strings) -> Tensor:
        """Return the mean cross-entropy of the symbols after the first, in nats, 0-d."""
        logits = self.head(self.hidden(strings.symbols[:, :-1]))
        targets = strings.symbols[:, 1:]
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def train_lstm(
    model: SymbolLSTM,
    automaton: Automaton,
    steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Train on new strings in each step; return the curve: step and loss, [n, 2] float64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    curve = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, 3 * (steps - step) / steps)
        loss = model.loss(automaton.sample(batch, generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 60) == 0 or step + 1 == steps:
            curve.append([step + 1, float(loss.detach())])
        progress(step + 1, steps)
    return torch.tensor(curve, dtype=torch.float64)


@torch.no_grad()
def prediction(model: SymbolLSTM, automaton: Automaton, strings: Strings) -> dict[str, float]:
    """Return how well a model predicts, over all symbols of strings but the first.

    `loss` is its cross-entropy and `entropy` the smallest one possible, in nats; `forbidden` is the
    mean probability that it gives to symbols which the automaton does not allow.
    """
    inputs, targets = strings.symbols[:, :-1], strings.symbols[:, 1:]
    is_target = targets >= 0
    logs = model.head(model.hidden(inputs)).log_softmax(-1)[is_target]
    truth = automaton.allowed(strings.states[:, :-1][is_target])
    entropy = -(truth * truth.clamp_min(1e-30).log()).sum(1)
    own = logs.gather(1, targets[is_target][:, None])
    return {
        "loss": -float(own.double().mean()),
        "entropy": float(entropy.double().mean()),
        "forbidden": float((logs.exp() * (truth == 0)).sum(1).double().mean()),
    }
