"""Sequences with repeated spans, the variables of induction, and the transformer."""

import torch

from sae_fast.ground_truth.induction import (
    AttentionTransformer,
    copying,
    draw_sequences,
    train_induction,
    variables_of,
)


def test_variables_of_a_sequence_by_hand():
    found = variables_of(torch.tensor([[7, 3, 5, 3, 5, 7, 3, 9]]))
    assert found.previous.tolist() == [[-1, 7, 3, 5, 3, 5, 7, 3]]
    # The latest 3 before place 3 is at place 1, and 5 came next; before place 6 it is at place 3.
    assert found.target.tolist() == [[-1, -1, -1, 5, 3, 3, 5, -1]]
    assert found.is_repeated.long().tolist() == [[0, 0, 0, 1, 1, 1, 1, 0]]
    assert found.previous_is_repeated.long().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    # Seen before, side by side: 3 5 at places 3 and 4, and 7 3 at places 5 and 6.
    assert found.is_inside.long().tolist() == [[0, 0, 0, 0, 1, 0, 1, 0]]


def test_the_first_place_is_never_inside_a_copy():
    found = variables_of(torch.tensor([[4, 4, 4]]))
    assert found.is_inside.long().tolist() == [[0, 0, 1]]
    assert found.target.tolist() == [[-1, 4, 4]]


def test_copied_tokens_have_occurred_before():
    tokens, copied = draw_sequences(64, 40, 500, torch.Generator().manual_seed(0))
    found = variables_of(tokens)
    assert not bool(copied[:, :8].any())
    assert bool(found.is_repeated[copied].all())
    inside = copied[:, 1:] & copied[:, :-1]
    assert 0.4 < float(copied[:, 8:].double().mean()) < 0.7
    assert float(found.is_inside[:, 1:][inside].double().mean()) > 0.8
    again, _ = draw_sequences(64, 40, 500, torch.Generator().manual_seed(0))
    assert torch.equal(tokens, again)


def test_accuracy_is_of_tokens_that_are_copied_with_the_one_before():
    tokens = torch.tensor([[1, 2, 1, 2, 0]])
    copied = torch.tensor([[False, False, True, True, False]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 0, 2, 2]]), 3).float()
    assert copying(logits, tokens, copied) == 1
    assert copying(-logits, tokens, copied) == 0
    assert copying(logits, tokens, torch.zeros(1, 5, dtype=torch.bool)) == 0


def test_a_place_does_not_see_later_tokens():
    model = AttentionTransformer(10, 12, 8, 2, torch.Generator().manual_seed(0))
    tokens, _ = draw_sequences(3, 12, 10, torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 10
    for layer in (1, 2):
        one, other = model.stream(tokens, layer), model.stream(changed, layer)
        assert torch.equal(one[:, :6], other[:, :6])
        assert not torch.allclose(one[:, 6:], other[:, 6:])
    assert model(tokens).shape == (3, 12, 10)


def test_training_reduces_the_loss_and_repeats_to_the_bit():
    curves = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        model = AttentionTransformer(6, 16, 16, 2, generator)
        draw = lambda g=generator: draw_sequences(16, 16, 6, g)  # noqa: E731
        curves.append(train_induction(model, draw, 30, 1e-2, lambda step, total: None))
    assert torch.equal(*curves)
    assert curves[0].shape == (30, 3)
    assert float(curves[0][-1, 1]) < float(curves[0][0, 1])
