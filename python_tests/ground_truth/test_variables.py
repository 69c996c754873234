"""Scores of latents as detectors, with values computed by hand."""

import math

import pytest
import torch

from sae_fast.ground_truth.variables import auc, best_f1, count

# Six rows in the states 0 0 0 1 1 2.
STATES = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 1, 2]), 3).bool()


def test_one_latent_a_state_is_pure_and_finds_all():
    order = [2, 0, 1]
    values = 3.0 * STATES[:, order].float()
    found = count(values, STATES)
    assert (found.purity(), found.latent_purity()) == (1, 1)
    f1, latents = best_f1(values, STATES)
    assert f1.tolist() == [1, 1, 1]
    assert latents.tolist() == [1, 2, 0]


def test_purity_is_weighted_by_firings_and_dead_latents_do_not_count():
    # Latent 0 fires in the states 0 0 0 1 (3 of 4 in its commonest), latent 1 in 1 2 (1 of 2).
    values = torch.tensor([[1.0, 0, 0]] * 4 + [[0, 1, 0]] * 2)
    found = count(values, STATES)
    assert found.purity() == pytest.approx((3 + 1) / 6)
    assert found.latent_purity() == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found.alive.tolist() == [True, True, False]
    # F1: 2 · 3 / (4 + 3), 2 · 1 / (2 + 2) against 2 · 1 / (4 + 2), 2 · 1 / (2 + 1)
    f1, latents = best_f1(values, STATES)
    assert f1.tolist() == pytest.approx([6 / 7, 1 / 2, 2 / 3])
    assert latents.tolist() == [0, 1, 1]


def test_nothing_fires_has_no_purity_and_no_f1():
    found = count(torch.zeros(6, 2), STATES)
    assert (found.purity(), found.latent_purity()) == (None, None)
    assert best_f1(torch.zeros(6, 2), STATES)[0].tolist() == [0, 0, 0]


def test_the_best_of_ten_thresholds_counts():
    # One latent fires on all rows. Above 0.1 of its largest value are the rows 0, 1, 3 and 5, above
    # 0.3 the rows 0, 1 and 3, above 0.5 the rows 0 and 1. Of state 0 they leave out row 2.
    values = torch.tensor([[10.0], [6.0], [0.5], [4.0], [1.0], [2.0]])
    f1, _ = best_f1(values, STATES)
    state_0 = max(2 * 3 / (6 + 3), 2 * 2 / (2 + 3), 2 * 2 / (3 + 3))
    state_1 = max(2 * 2 / (6 + 2), 2 * 1 / (3 + 2))  # rows 3 and 4
    state_2 = max(2 * 1 / (6 + 1), 2 * 1 / (4 + 1))  # row 5
    assert f1.tolist() == pytest.approx([state_0, state_1, state_2])


def test_a_latent_that_always_fires_has_the_f1_of_the_share():
    found = count(torch.ones(6, 1), STATES)
    assert found.f1()[0].tolist() == pytest.approx([2 * 3 / 9, 2 * 2 / 8, 2 * 1 / 7])
    assert found.purity() == pytest.approx(3 / 6)


def test_auc_counts_equal_values_half():
    truth = torch.tensor([True, True, False, False, False])
    values = torch.tensor(
        [
            [9.0, 0.0, 1.0, 5.0],
            [8.0, 0.0, 0.0, 0.0],
            [1.0, 3.0, 0.0, 5.0],
            [0.0, 4.0, 0.0, 2.0],
            [0.0, 5.0, 0.0, 0.0],
        ]
    )
    # The last: 5 beats 2 and 0 and ties with 5 (2.5 of 3), 0 ties with 0 (0.5 of 3).
    assert auc(values, truth).tolist() == pytest.approx([1, 0, (3 + 1.5) / 6, 3 / 6])


def test_auc_equals_counting_all_pairs():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (60, 3), generator=generator).float()
    truth = torch.rand(60, generator=generator) < 0.3
    pairs = values[truth][:, None] - values[~truth][None]
    expected = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean((0, 1))
    assert torch.allclose(auc(values, truth), expected)


def test_auc_has_no_value_where_all_rows_are_alike():
    assert all(map(math.isnan, auc(torch.ones(4, 2), torch.ones(4).bool()).tolist()))
