"""A comparison of dictionaries: figures by hand, units, dead latents, tables of latents."""

import csv
import io

import pytest
import torch
import torch.nn.functional as F

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.comparison import Dictionary, compare

pytest.importorskip("scipy")

# Three dictionaries of 3, 3 and 2 latents. The cosines of A and B are 1, 0.8 and 0.6 by pair.
A = torch.eye(4)[:3]
B = torch.tensor([[0.0, 0.8, 0.0, 0.6], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.6, -0.8]])
C = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 0.0]])


def three():
    return compare({"a": A, "b": B, "c": C})


def test_figures_by_hand():
    figures = three().to_dict()
    first = figures["pairs"][0]
    assert (first["a"], first["b"], first["matched"], first["is_exact"]) == ("a", "b", 3, True)
    assert first["pw_mcc"] == pytest.approx((1 + 0.8 + 0.6) / 3)
    assert first["shared_at_0.7_of_a"] == pytest.approx(2 / 3)
    assert first["shared_at_0.9_of_b"] == pytest.approx(1 / 3)
    with_c = figures["pairs"][1]  # matched: 1 and, of what is left, 0
    assert with_c["pw_mcc"] == pytest.approx(0.5)
    assert with_c["shared_at_0.7_of_a"] == pytest.approx(1 / 3)
    assert with_c["shared_at_0.7_of_b"] == pytest.approx(1 / 2)
    assert with_c["nearest_of_b"] == pytest.approx(0.5)
    mean = sum(pair["pw_mcc"] for pair in figures["pairs"]) / 3
    assert figures["mean"]["pw_mcc"] == pytest.approx(mean)


def test_latents_that_all_dictionaries_share():
    comparison = compare({"a": A, "b": B, "a again": A.flip(0)})
    assert comparison.shared_by_all("a", 0.7) == pytest.approx(2 / 3)
    assert comparison.shared_by_all("a", 0.9) == pytest.approx(1 / 3)


def test_the_matrix_counts_latents_of_the_row():
    shares = three().matrix(0.7)
    assert float(shares[0, 2]) == pytest.approx(1 / 3)
    assert float(shares[2, 0]) == pytest.approx(1 / 2)
    means = three().matrix()
    assert torch.equal(means, means.t())
    assert means.diagonal().tolist() == [1.0, 1.0, 1.0]


def test_dead_latents_are_counted_and_left_out_of_the_mean_of_the_alive():
    dead = torch.tensor([True, False, False])
    pair = compare({"a": Dictionary(A, dead), "b": B}).to_dict()
    assert [entry["dead"] for entry in pair["dictionaries"]] == [1, None]
    assert pair["pairs"][0]["pw_mcc_alive"] == pytest.approx((0.8 + 0.6) / 2)
    all_dead = compare({"a": Dictionary(A, dead | True), "b": B})
    assert all_dead.to_dict()["pairs"][0]["pw_mcc_alive"] is None
    assert "| none |" in all_dead.table()


def model(seed, normalize="mean_centred", d_sae=12):
    config = SAEConfig(d_in=8, d_sae=d_sae, k=2, normalize_activations=normalize)
    sae = SparseAutoencoder(config)
    sae.initialize_(torch.Generator().manual_seed(seed))
    return sae


def test_a_model_equals_itself_with_its_normalisation_folded_in():
    sae = model(0, SAEConfig().normalize_activations)
    sae.set_normalization_(torch.randn(8), 0.01)
    assert compare({"a": sae, "b": sae.fold_normalization()}).mean_pw_mcc() == pytest.approx(1.0)


def test_rows_of_a_model_are_compared_in_the_units_of_the_activations():
    sae = model(0, SAEConfig().normalize_activations)
    sae.set_normalization_(torch.zeros(8), 0.5)
    directions = Dictionary.of(sae).directions
    torch.testing.assert_close(directions, sae.W_dec.detach() / 0.5)


def test_every_latent_has_a_row_in_the_table():
    comparison = three()
    rows = list(csv.DictReader(io.StringIO(comparison.latents_csv())))
    assert [(row["dictionary"], row["latent"]) for row in rows] == [
        *(("a", str(latent)) for latent in range(3)),
        *(("b", str(latent)) for latent in range(3)),
        *(("c", str(latent)) for latent in range(2)),
    ]
    assert (rows[0]["b:partner"], rows[0]["b:cosine"], rows[0]["a:cosine"]) == ("1", "1.0", "")
    table = comparison.latents()["a"]
    assert table["b:partner"] == [1, 0, 2]
    assert table["b:cosine"] == pytest.approx([1.0, 0.8, 0.6])
    assert table["c:partner"][2] == 0
    assert sum(partner is None for partner in table["c:partner"]) == 1
    unmatched = table["c:partner"].index(None)
    assert table["least_cosine"][unmatched] is None


def test_an_unknown_pair_is_refused():
    with pytest.raises(KeyError, match="a and a are no pair"):
        three().partners("a", "a")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": A}, "two dictionaries or more must be given, got 1"),
        ({"a": A, "b": torch.eye(5)}, "must have one width: a has 4, b has 5"),
    ],
)
def test_dictionaries_that_cannot_be_compared_are_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        compare(sources)


def test_random_dictionaries_share_nothing_from_0_9():
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(64, 32, generator=generator), dim=1) for _ in range(2))
    comparison = compare({"a": a, "b": b})
    assert comparison.shared("a", "b", 0.9) == 0.0
    assert comparison.shared("a", "b", -1.0) == 1.0
