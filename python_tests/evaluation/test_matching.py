"""The matching of two dictionaries: exact where it is small, close to exact by candidates."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from sae_fast.evaluation.matching import match

scipy_optimize = pytest.importorskip("scipy.optimize")


def unit(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def related(rows, width, seed, noise):
    """Return unit rows, and these rows in another order with noise of that norm."""
    a = unit(rows, width, seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return a, F.normalize(a[order] + noise * unit(rows, width, seed + 1), dim=1)


def largest_sum_by_trial(cosines):
    """Return the largest sum of a one-to-one matching, by trying all of them."""
    rows, columns = cosines.shape
    if rows > columns:
        return largest_sum_by_trial(cosines.t())
    return max(
        sum(float(cosines[row, column]) for row, column in enumerate(columns_of))
        for columns_of in itertools.permutations(range(columns), rows)
    )


def assert_one_to_one(matching, n_a, n_b):
    assert len(matching.rows) == len(matching.columns) == min(n_a, n_b)
    assert len(set(matching.columns.tolist())) == len(matching.columns)
    assert matching.rows.tolist() == sorted(set(matching.rows.tolist()))


def test_a_matching_by_hand():
    """The first row of B is the nearest one of both rows of A; 0.8 + 0.8 is more than 0.96."""
    a = torch.tensor([[2.0, 0.0], [0.6, 0.8]])
    b = torch.tensor([[0.8, 0.6], [0.0, 5.0]])  # cosines [[0.8, 0], [0.96, 0.8]]
    matching = match(a, b)
    assert matching.is_exact
    assert matching.rows.tolist() == [0, 1]
    assert matching.columns.tolist() == [0, 1]
    torch.testing.assert_close(matching.cosines, torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(matching.nearest_in_b, torch.tensor([0.8, 0.96]))
    torch.testing.assert_close(matching.nearest_in_a, torch.tensor([0.96, 0.8]))
    assert matching.mean() == pytest.approx(0.8)


@pytest.mark.parametrize(("n_a", "n_b"), [(5, 5), (4, 7), (7, 4)])
@pytest.mark.parametrize("exact_below", [100, 1])
def test_the_sum_is_the_largest_of_all_matchings(n_a, n_b, exact_below):
    """With all rows as candidates the matching by candidates is exact too."""
    a, b = unit(n_a, 3, 0), unit(n_b, 3, 1)
    matching = match(a, b, exact_below=exact_below, neighbours=7)
    assert_one_to_one(matching, n_a, n_b)
    wanted = largest_sum_by_trial((a @ b.t()).abs())
    found = match(a, b, absolute=True, exact_below=exact_below, neighbours=7)
    assert float(found.cosines.sum()) == pytest.approx(wanted, abs=1e-5)


def test_few_candidates_give_the_exact_matching_of_dictionaries_that_are_alike():
    a, b = related(300, 24, 0, 0.7)
    exact, sparse = match(a, b), match(a, b, exact_below=1, neighbours=8)
    assert not sparse.is_exact
    assert sparse.columns.tolist() == exact.columns.tolist()
    torch.testing.assert_close(sparse.cosines, exact.cosines)
    torch.testing.assert_close(sparse.nearest_in_b, exact.nearest_in_b)
    torch.testing.assert_close(sparse.nearest_in_a, exact.nearest_in_a)


@pytest.mark.parametrize(("n_a", "n_b"), [(200, 200), (150, 260), (260, 150)])
@pytest.mark.parametrize("exact_below", [100, 1])
def test_rows_without_a_candidate_left_are_matched_too(n_a, n_b, exact_below):
    """One neighbour a row leaves many over; they are matched at once or block by block."""
    a, b = unit(n_a, 8, 0), unit(n_b, 8, 1)
    exact, sparse = match(a, b), match(a, b, exact_below=exact_below, neighbours=1)
    assert_one_to_one(sparse, n_a, n_b)
    assert 0.9 * exact.mean() < sparse.mean() <= exact.mean() + 1e-6
    cosines = (a @ b.t())[sparse.rows, sparse.columns].float()
    torch.testing.assert_close(sparse.cosines, cosines, atol=1e-6, rtol=0)


def test_the_mean_is_as_scipy_computes_it_in_float64():
    a, b = unit(60, 16, 0), unit(60, 16, 1)
    rows, columns = scipy_optimize.linear_sum_assignment((a @ b.t()).numpy(), maximize=True)
    matching = match(3 * a, b / 7)  # of any norm
    wanted = (a @ b.t())[torch.from_numpy(rows), torch.from_numpy(columns)]
    assert matching.mean() == pytest.approx(float(wanted.mean()), abs=1e-6)


@pytest.mark.parametrize("exact_below", [1000, 1])
def test_no_cosine_is_above_1(exact_below):
    rows = unit(500, 48, 0)
    normal = F.normalize(rows.float(), dim=1)
    assert (normal @ normal.t()).max() > 1  # by rounding
    matching = match(rows, rows, exact_below=exact_below, neighbours=4)
    assert matching.cosines.max() == 1
    assert matching.nearest_in_a.max() == matching.nearest_in_b.max() == 1
    assert 1 - 1e-6 < matching.mean() <= 1
    opposite = match(rows, -rows, exact_below=exact_below, neighbours=500)
    assert opposite.cosines.min() >= -1


def test_a_direction_and_its_negative_match_by_absolute_cosine_only():
    a = torch.eye(3)
    assert match(a, -a, absolute=True).mean() == pytest.approx(1.0)
    assert match(a, -a).mean() == 0.0


def test_a_row_of_zeros_has_no_cosine():
    a = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    matching = match(a, torch.eye(2))
    assert matching.partners_of_a(2)[1].tolist() == [0.0, 1.0]


def test_rows_without_a_partner_are_told():
    partner, cosine = match(torch.eye(3), torch.eye(3)[1:]).partners_of_a(3)
    assert partner.tolist() == [-1, 0, 1]
    assert cosine[0].isnan()
    assert cosine[1:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "equal widths, got 3 and 4"),
        (torch.ones(0, 3), torch.ones(2, 3), r"a must be a matrix with rows, got shape \(0, 3\)"),
        (torch.ones(2, 3), torch.full((2, 3), torch.inf), "b must be finite"),
    ],
)
def test_dictionaries_that_cannot_be_matched_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        match(a, b)


def test_scipy_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match=r"needs scipy: install it \(pip install 'sae_fast\[eval"):
        match(torch.eye(2), torch.eye(2))
