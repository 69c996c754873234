"""The counts of an evaluation on held-out rows."""

import pytest
import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.metrics import evaluate, largest_ordinary_norm


def _one_latent_a_row() -> SparseAutoencoder:
    """Make a model of rows that are unit vectors: latent j fires if entry j is 1."""
    config = SAEConfig(d_in=4, d_sae=4, k=1, normalize_activations="none", aux_k_coeff=0.0)
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    return sae


def test_explained_variance_is_told_in_both_forms() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=generator) * 2 + torch.tensor([5.0, 0.0, 0.0, -3.0])
    sae = _one_latent_a_row()
    measured = evaluate(sae, rows.split(64))
    wide, error = rows.double(), (sae(rows) - rows).detach().double()
    fvu = float(error.square().sum() / (wide - wide.mean(0)).square().sum())
    assert measured["heldout_explained_variance"] == pytest.approx(1 - fvu)
    overall = float(1 - error.square().mean() / wide.var())
    assert measured["heldout_explained_variance_overall"] == pytest.approx(overall)


def test_a_latent_that_fires_on_exactly_the_threshold_share_is_alive() -> None:
    # Latent 0 fires on 7 of 10,000 rows, latent 1 on 6, latent 3 on none. 0.0007 * 10,000 > 7.
    latents = torch.cat([torch.zeros(7), torch.ones(6), torch.full((9_987,), 2.0)]).long()
    rows = torch.eye(4)[latents]
    sae = _one_latent_a_row()
    dead = {rate: evaluate(sae, [rows], dead_rate=rate) for rate in (0.0, 0.0006, 0.0007, 0.0008)}
    shares = [measured["heldout_dead_fraction"] for measured in dead.values()]
    assert shares == [0.25, 0.25, 0.5, 0.75]


def _with_loud_rows(share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 4, generator=generator)
    rows[: int(share * 1000)] = torch.tensor([300.0, 0.0, 0.0, 0.0])
    return rows[torch.randperm(1000, generator=generator)]


def test_the_fvu_of_ordinary_rows_is_told_where_a_few_rows_decide_it() -> None:
    rows, sae = _with_loud_rows(0.005), _one_latent_a_row()
    limit = largest_ordinary_norm(rows.split(64))
    measured = evaluate(sae, rows.split(64), ordinary_norm=limit)
    kept = rows[rows.norm(dim=1).argsort()[:990]].double()
    error = (sae(kept.float()).detach().double() - kept).square().sum()
    expected = float(error / (kept - kept.mean(0)).square().sum())
    assert measured["heldout_ordinary_fvu"] == pytest.approx(expected)
    assert measured["heldout_fvu"] < 0.1 * expected


def test_the_fvu_of_ordinary_rows_is_not_told_where_it_is_much_alike() -> None:
    rows, sae = _with_loud_rows(0.0), _one_latent_a_row()
    limit = largest_ordinary_norm(rows.split(64))
    assert "heldout_ordinary_fvu" not in evaluate(sae, rows.split(64), ordinary_norm=limit)
