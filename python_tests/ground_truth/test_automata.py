"""Automata, their strings, and the LSTM that learns them."""

import math
import re

import pytest
import torch

from sae_fast.ground_truth.automata import (
    AUTOMATA,
    SYMBOLS,
    Automaton,
    Strings,
    SymbolLSTM,
    prediction,
    train_lstm,
)

INNER = "B(T(S)*X(X(T)*V(PX(T)*V)*(V|PS)|S)|P(T)*V(PX(T)*V)*(V|PS))E"  # Reber's grammar


def words(strings: Strings):
    return ["".join(SYMBOLS[i] for i in row if i >= 0) for row in strings.symbols.tolist()]


@pytest.mark.parametrize("name", AUTOMATA)
def test_strings_are_of_the_grammar(name):
    strings = Automaton(AUTOMATA[name]).sample(200, torch.Generator().manual_seed(0))
    assert torch.equal(strings.symbols >= 0, strings.states >= 0)
    pattern = INNER if name == "reber" else f"B(?P<first>[TP]){INNER}(?P=first)E"
    found = words(strings)
    assert len(set(found)) > 40
    assert [word for word in found if not re.fullmatch(pattern, word)] == []


@pytest.mark.parametrize("name", AUTOMATA)
def test_states_follow_from_the_symbols(name):
    edges = AUTOMATA[name]
    automaton = Automaton(edges)
    strings = automaton.sample(20, torch.Generator().manual_seed(1))
    for word, states in zip(words(strings), strings.states.tolist(), strict=True):
        state = automaton.states[0]
        for symbol, following in zip(word, states, strict=False):
            state = edges[state][symbol]
            assert state == automaton.states[following]
        assert edges[state] == {}


def test_symbols_out_of_a_state_are_equally_likely():
    automaton = Automaton(AUTOMATA["reber"])
    rows = automaton.allowed(torch.arange(len(automaton.states)))
    assert rows[1].tolist() == [0, 0.5, 0.5, 0, 0, 0, 0]  # T or P
    assert rows[-1].sum() == 0
    strings = automaton.sample(4000, torch.Generator().manual_seed(0))
    share = float((strings.symbols[:, 1] == SYMBOLS.index("T")).double().mean())
    assert share == pytest.approx(0.5, abs=0.03)


def test_a_model_that_knows_nothing_has_the_loss_of_a_guess():
    model = SymbolLSTM(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    automaton = Automaton(
        {"start": {"B": "1"}, "1": {"T": "2", "P": "2"}, "2": {"E": "e"}, "e": {}}
    )
    strings = automaton.sample(10, torch.Generator().manual_seed(0))
    found = prediction(model, automaton, strings)
    assert found["loss"] == pytest.approx(math.log(7))
    assert found["entropy"] == pytest.approx(math.log(2) / 2)
    assert found["forbidden"] == pytest.approx((5 / 7 + 6 / 7) / 2)
    assert float(model.loss(strings).detach()) == pytest.approx(math.log(7))


def trained():
    generator = torch.Generator().manual_seed(0)
    model = SymbolLSTM(16, generator)
    automaton = Automaton(AUTOMATA["reber"])
    curve = train_lstm(model, automaton, 60, 32, 2e-2, generator, lambda step, total: None)
    return curve, prediction(model, automaton, automaton.sample(100, generator))


def test_the_lstm_learns_and_repeats_to_the_bit():
    (curve, found), (again, _) = trained(), trained()
    assert torch.equal(curve, again)
    assert found["loss"] - found["entropy"] < 0.2
    assert found["forbidden"] < 0.1
