"""Scores against a true dictionary, with values computed by hand."""

import pytest
import torch

from sae_fast.ground_truth.dictionary_scores import FiringCounts, pair_features, uniqueness

pytest.importorskip("scipy")
FEATURES = torch.eye(4, 6)


def test_a_permuted_scaled_and_flipped_dictionary_is_perfect():
    order = torch.tensor([2, 0, 3, 1])
    rows = FEATURES[order] * torch.tensor([1.0, -3.0, 0.5, -1.0])[:, None]
    pairs = pair_features(rows, FEATURES)
    assert pairs.latents.tolist() == [1, 3, 0, 2]
    assert pairs.cosines.tolist() == [-1, -1, 1, 1]
    assert (pairs.mcc(), pairs.recovered_share(), uniqueness(rows, FEATURES)) == (1, 1, 1)


def test_no_cosine_is_above_1():
    features = torch.randn(500, 48, generator=torch.Generator().manual_seed(0))
    assert torch.cosine_similarity(features, features, dim=1, eps=1e-30).max() > 1  # by rounding
    pairs = pair_features(-features, features)
    assert pairs.cosines.min() == -1
    assert 1 - 1e-6 < pairs.mcc() <= 1


def test_the_best_matching_is_not_each_latents_nearest_feature():
    # Both latents are nearest to feature 0; one to one the sum is 1 + 0.6, not 0.8 + 0.
    rows = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0.8, 0.6, 0, 0, 0, 0]])
    pairs = pair_features(rows, FEATURES[:2])
    assert pairs.mcc() == pytest.approx(0.8)
    assert pairs.recovered_share() == 0.5
    assert uniqueness(rows, FEATURES[:2]) == 0.5


def test_a_cosine_of_exactly_the_threshold_is_not_recovered():
    rows = torch.tensor([[0.9, (1 - 0.81) ** 0.5, 0, 0, 0, 0]])
    assert pair_features(rows, FEATURES[:1]).recovered_share() in (0.0, 1.0)
    rows = torch.tensor([[0.89, (1 - 0.89**2) ** 0.5, 0, 0, 0, 0]])
    assert pair_features(rows, FEATURES[:1]).recovered_share() == 0


def test_with_fewer_latents_the_mcc_is_of_the_pairs_and_the_share_of_all_features():
    pairs = pair_features(FEATURES[1:3], FEATURES)
    assert pairs.latents.tolist() == [-1, 0, 1, -1]
    assert (pairs.mcc(), pairs.recovered_share()) == (1, 0.5)


def test_mcc_and_uniqueness_equal_those_of_saelens():
    evals = pytest.importorskip("sae_lens.synthetic.evals")
    generator = torch.Generator().manual_seed(0)
    rows, features = torch.randn(2, 20, 8, generator=generator)
    features = torch.nn.functional.normalize(features[:15], dim=1)
    theirs = evals.mean_correlation_coefficient(rows, features)
    assert pair_features(rows, features).mcc() == pytest.approx(theirs)
    assert uniqueness(rows, features) == evals.feature_uniqueness(rows, features)


def counts_of(values, truth, parents):
    counts = FiringCounts(torch.tensor(parents))
    for part in range(len(values)):  # row by row: the sums are over all calls
        row = slice(part, part + 1)
        counts.add(torch.tensor(values)[row], torch.tensor(truth)[row])
    return counts


def test_precision_recall_and_f1_are_those_of_scikit_learn_or_by_hand():
    values = [[1.0, 0.0], [2.0, 0.0], [0.5, 0.0], [0.0, 0.0]]
    truth = [[1.0, 0.0], [1.0, 3.0], [0.0, 0.0], [1.0, 0.0]]
    counts = counts_of(values, truth, [-1, -1])
    assert counts.precision().tolist() == pytest.approx([2 / 3, 0])
    assert counts.recall().tolist() == pytest.approx([2 / 3, 0])
    assert counts.f1().tolist() == pytest.approx([2 / 3, 0])
    assert counts.mean(counts.f1()) == pytest.approx(1 / 3)


def test_a_feature_that_is_never_active_is_left_out_of_means():
    counts = counts_of([[1.0, 1.0]], [[1.0, 0.0]], [-1, -1])
    assert counts.mean(counts.precision()) == 1
    assert counts_of([[0.0]], [[0.0]], [-1]).mean(torch.zeros(1)) is None


def test_absorption_is_counted_where_the_child_fires_and_the_parent_is_silent():
    # Feature 1 is the child of 0. Of four rows with the child: both fire; absorbed; both silent;
    # absorbed. A silent parent without child is no absorption.
    values = [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    truth = [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]
    assert counts_of(values, truth, [-1, 0]).absorption_rate() == 2 / 4
    assert counts_of([[1.0, 0.0]], [[1.0, 0.0]], [-1, 0]).absorption_rate() is None


def test_shrinkage_is_of_the_rows_on_which_both_are_active():
    values = [[0.8, 3.0], [1.6, 0.0], [5.0, 1.0]]
    truth = [[1.0, 4.0], [2.0, 1.0], [0.0, 0.0]]
    counts = counts_of(values, truth, [-1, -1])
    assert counts.shrinkage(torch.tensor([True, False])) == pytest.approx(0.8)
    assert counts.shrinkage(torch.tensor([True, True])) == pytest.approx((0.8 + 0.75) / 2)
    assert counts.shrinkage(torch.tensor([False, False])) is None
