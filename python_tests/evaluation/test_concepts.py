"""Purity of latents by hand, and probes against scikit-learn on dense codes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.evaluation.concepts import ConceptPass
from sae_fast.evaluation.definitions import DEFINITIONS, LATENTS
from sae_fast.evaluation.probing import ProbedRows, sparse_probing
from sae_fast.evaluation.purity import StrongestRows, token_rows

linear = pytest.importorskip("sklearn.linear_model")
metrics = pytest.importorskip("sklearn.metrics")


def _code(dense: Tensor, k: int) -> ops.SparseCode:
    values, indices = dense.topk(k, dim=1)
    return ops.SparseCode(values, indices.int(), dense.shape[1], units=ops.RAW)


def test_purity_by_hand() -> None:
    """Latent 0 is strongest on 7, 5 and 9, latent 1 on 9 and 5, latent 2 never; -1 is no number."""
    dense = torch.tensor(
        [[9.0, 0, 0], [8, 1, 0], [7, 2, 0], [6, 0, 0], [5, 0, 0], [99, 0, 0]], dtype=torch.float32
    )
    numbers = torch.tensor([7, 5, 9, 7, 9, -1])
    strongest = StrongestRows(3, numbers, top=3)
    for first in (0, 4):  # in two batches
        part = dense[first : first + 4]
        strongest.add(_code(part, 2), first)
    found = strongest.result()
    assert found.rows.tolist() == [3, 2, 0]
    assert found.numbers[:, 0].tolist() == [5, 5, -1]  # of equal counts the smaller
    thirds = math.log(3)
    assert found.entropy.tolist() == pytest.approx([thirds, math.log(2), math.nan], nan_ok=True)
    assert found.purity.tolist() == pytest.approx([1 / 3, 1 / 2, math.nan], nan_ok=True)
    assert found.commonest_share == pytest.approx(2 / 5)
    section = found.section("token")
    assert section == pytest.approx(
        {
            "token_purity": 1 / 3,
            "token_entropy": thirds,
            "token_pure_fraction": 0,
            "token_commonest_share": 2 / 5,
            "token_latents": 1,
        }
    )
    assert token_rows(found, {5: "five"})[:2] == [(0, 5, "five", 1 / 3), (0, 7, "", 1 / 3)]


def test_the_strongest_rows_are_the_ones_of_a_dense_code() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(300, 10, generator=generator).relu()
    strongest = StrongestRows(10, torch.randint(0, 5, (300,), generator=generator), top=7)
    for first in range(0, 300, 64):
        strongest.add(_code(dense[first : first + 64], 6), first)
    kept = torch.zeros_like(dense).scatter_(1, dense.topk(6, dim=1).indices, 1.0)
    values, rows = (dense * kept).topk(7, dim=0)
    found = strongest.result()
    torch.testing.assert_close(found.strengths, values.T.contiguous())
    torch.testing.assert_close(found.strongest, rows.T.contiguous())


def test_a_pure_latent_has_purity_1_and_entropy_0() -> None:
    numbers = torch.tensor([4, 4, 4, 1])
    strongest = StrongestRows(1, numbers, top=3)
    strongest.add(_code(torch.tensor([[3.0], [2.0], [5.0], [1.0]]), 1), 0)
    found = strongest.result()
    assert found.numbers[0, 0] == 4
    assert found.section("label")["label_pure_fraction"] == 1
    assert float(found.entropy[0]) == 0


def _planted(rows: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, codes and labels: latent 3 always tells label 1, latent 5 label 2 mostly."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    dense = torch.rand(rows, 8, generator=generator)
    dense[:, 3] = torch.where(labels == 1, 2.0, 0.0)
    noisy = torch.rand(rows, generator=generator) < 0.8
    dense[:, 5] = torch.where((labels == 2) & noisy, 3.0, 0.0)
    x = torch.randn(rows, 6, generator=generator) + labels[:, None]
    labels[::17] = -1
    return x, dense, labels


def test_probes_are_the_ones_of_scikit_learn_on_dense_codes() -> None:
    x, dense, labels = _planted()
    rows = ProbedRows(labels, torch.arange(400) // 5, limit=1000)
    for first in range(0, 400, 150):
        part = slice(first, first + 150)
        rows.add(x[part], _code(dense[part], 8), first)
    found = sparse_probing(rows)
    kept = labels != -1
    features, right = dense[kept].double().numpy(), labels[kept].numpy()
    tested = rows.tests
    documents = (torch.arange(400) // 5)[kept].numpy()
    assert not set(documents[tested]) & set(documents[~tested])
    assert {probe.label for probe in found.probes} == {0, 1, 2}
    for probe in found.probes:
        wanted = right == probe.label
        columns = x[kept].double().numpy()
        if probe.latents:
            train = features[~tested]
            apart = train[wanted[~tested]].mean(0) - train[~wanted[~tested]].mean(0)
            ranked = np.argsort(-np.abs(apart))[: len(probe.latents)]
            assert set(probe.latents) == set(ranked.tolist())
            columns = features[:, list(probe.latents)]
        scaled = columns / columns[~tested].std(axis=0)
        plain = linear.LogisticRegression(class_weight="balanced", max_iter=1000)
        plain.fit(scaled[~tested], wanted[~tested])
        guessed = plain.predict(scaled[tested])
        accuracy = metrics.balanced_accuracy_score(wanted[tested], guessed)
        assert probe.accuracy == pytest.approx(accuracy, abs=1e-9)
    single = {p.label: p for p in found.probes if len(p.latents) == 1}
    assert single[1].latents == (3,)
    assert single[1].accuracy == 1
    assert single[2].latents == (5,)
    assert found.section["probe_1_latents_accuracy"] == pytest.approx(
        sum(probe.accuracy for probe in single.values()) / 3
    )
    assert found.section["probe_train_rows"] + found.section["probe_test_rows"] == int(kept.sum())


def test_rows_to_probe_are_taken_evenly() -> None:
    x, dense, labels = _planted()
    rows = ProbedRows(labels, None, limit=100)
    rows.add(x, _code(dense, 8), 0)
    codes, taken = rows.arrays()
    labelled = (labels != -1).nonzero().flatten()[::4]
    np.testing.assert_array_equal(taken, x[labelled].numpy())
    np.testing.assert_allclose(codes.toarray(), dense[labelled].numpy())


def test_too_few_labels_are_told_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    x, dense, labels = _planted(40)
    columns = {"labels/kind": labels}
    watch = ConceptPass(8, columns, "labels/kind", top=2, probe_rows=100)
    watch(x, _code(dense, 8))
    found = watch.result()
    assert "sparse_probing" not in found.sections
    assert "probing needs a label with 10 rows to train on" in caplog.text
    assert found.latents.keys() <= LATENTS.keys()
    assert found.sections["purity"].keys() <= DEFINITIONS["purity"].keys()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(5), "must hold whole numbers, one for each kind of row, got float32"),
        (torch.full((5,), -1), "holds no label, every row has -1"),
    ],
)
def test_labels_that_are_none_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptPass(8, {"x": labels}, "x", top=2, probe_rows=1)
