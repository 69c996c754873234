"""The superposition task: its data, and the scores of planted dictionaries."""

import pytest
import torch

from sae_fast import SAEConfig, SparseAutoencoder
from sae_fast.config.ground_truth import SuperpositionConfig
from sae_fast.ground_truth.superposition import Dictionary, Superposition

pytest.importorskip("scipy")


def planted(tmp_path, **settings):
    """Return a task whose features are the axes, and a model that has found all of them."""
    fields = {"features": 32, "d_in": 32, "parents": 4, "active": 4.0, "d_sae": 32}
    sizes = {"rows": 100, "heldout_rows": 2000}
    task = Superposition(SuperpositionConfig(**fields, **sizes, **settings))
    task.prepare(tmp_path, lambda step, total: None)
    task.dictionary.features = torch.eye(32)
    task.heldout_rows = task.truth.clone()
    config = SAEConfig(arch="relu", d_in=32, d_sae=32, normalize_activations="none")
    sae = SparseAutoencoder(config)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(32)[order])
        sae.W_dec.copy_(torch.eye(32)[order])
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.zero_()
    return task, sae, order


def test_the_true_dictionary_has_perfect_scores(tmp_path):
    task, sae, _ = planted(tmp_path)
    scores = task.score(sae).scores
    names = ("mcc", "recovered", "uniqueness", "precision", "recall", "f1", "shrinkage")
    assert [scores[name] for name in names] == pytest.approx([1] * len(names))
    assert scores["absorption_rate"] == 0


def test_values_that_are_too_small_are_shrinkage_in_any_units(tmp_path):
    task, sae, _ = planted(tmp_path)
    with torch.no_grad():
        sae.W_enc.mul_(0.4)
        sae.W_dec.mul_(2)
    assert task.score(sae).scores["shrinkage"] == pytest.approx(0.8)
    mean, scale = torch.zeros(32), torch.tensor(3.0)
    sae = SparseAutoencoder(SAEConfig(arch="relu", d_in=32, d_sae=32))
    sae.set_normalization_(mean, scale)
    with torch.no_grad():
        sae.W_enc.copy_(0.8 * torch.eye(32))
        sae.W_dec.copy_(torch.eye(32))
    assert task.score(sae).scores["shrinkage"] == pytest.approx(0.8)


def test_planted_absorption_is_found(tmp_path):
    task, sae, order = planted(tmp_path)
    places = order.argsort()  # the latent of each feature
    parents = task.dictionary.parents
    with torch.no_grad():
        for child in (parents >= 0).nonzero().squeeze(1).tolist():
            sae.W_enc[places[parents[child]], child] = -1000  # silences the parent's latent
    scores = task.score(sae).scores
    assert scores["absorption_rate"] == 1
    assert scores["recall"] < 1
    assert scores["precision"] == 1


def test_children_come_with_their_parent_and_one_at_a_time():
    config = SuperpositionConfig(active=8.0)
    dictionary = Dictionary(config)
    active = dictionary.draw(20_000) != 0
    is_child = dictionary.parents >= 0
    assert int(is_child.sum()) == 16 * 3
    assert bool(active[:, dictionary.parents[is_child]][active[:, is_child]].all())
    for parent in range(16):
        own = active[:, dictionary.parents == parent]
        assert int(own.sum(1).max()) == 1
        share = float(own.any(1).sum() / active[:, parent].sum())
        assert share == pytest.approx(0.6, abs=0.06)
    assert float(active.sum(1).double().mean()) == pytest.approx(8, abs=0.1)
    rates = active.double().mean(0)
    assert torch.allclose(rates, dictionary.probabilities, atol=0.015)


def test_features_of_a_group_are_correlated_and_magnitudes_have_heavy_tails():
    dictionary = Dictionary(SuperpositionConfig(correlation=0.6))
    coefficients = dictionary.draw(20_000)
    active = (coefficients != 0).double()
    found = torch.corrcoef(active.t())
    first = 16 * 4  # the features in groups of 8
    inside = torch.stack([found[first + i, first + i + 1] for i in range(0, 96, 8)])
    outside = torch.stack([found[first + i, first + i + 8] for i in range(0, 88, 8)])
    assert float(inside.min()) > 0.1
    assert float(outside.abs().max()) < 0.05
    magnitudes = coefficients[coefficients != 0].double()
    assert float(magnitudes.mean()) == pytest.approx(1, abs=0.02)
    assert float(magnitudes.log().std()) == pytest.approx(0.7, abs=0.02)


def test_more_rows_leave_the_heldout_rows_as_they_are(tmp_path):
    few, many = (
        Superposition(SuperpositionConfig(rows=rows, heldout_rows=50)) for rows in (10, 30)
    )
    for task in (few, many):
        task.prepare(tmp_path, lambda step, total: None)
    assert torch.equal(few.heldout_rows, many.heldout_rows)
    assert len(many.rows) == 30
