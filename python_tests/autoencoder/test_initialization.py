import pytest
import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.initialization import geometric_median
from sae_fast.config import SAEConfig


def make(seed=0, sample=None, **fields):
    sae = SparseAutoencoder(SAEConfig(d_in=8, d_sae=20, k=4, **fields))
    sae.initialize_(torch.Generator().manual_seed(seed), sample)
    return sae


@pytest.fixture(name="sample")
def make_sample():
    return torch.randn(100, 8, generator=torch.Generator().manual_seed(5)) + 2.0


def test_orthogonal_rows_are_orthonormal_within_blocks_of_d_in():
    W_dec = make(decoder_init="orthogonal").W_dec.detach()
    for block in W_dec.split(8):
        torch.testing.assert_close(block @ block.t(), torch.eye(len(block)), rtol=0, atol=1e-5)


def test_seed_decides_the_start():
    assert torch.equal(make(seed=1).W_dec, make(seed=1).W_dec)
    assert not torch.equal(make(seed=1).W_dec, make(seed=2).W_dec)


def test_b_dec_starts_at_the_mean(sample):
    torch.testing.assert_close(
        make(sample=sample, b_dec_init="mean").b_dec.detach(), sample.mean(0)
    )


def test_b_dec_starts_at_the_geometric_median(sample):
    b_dec = make(sample=sample, b_dec_init="geometric_median").b_dec.detach()
    torch.testing.assert_close(b_dec, geometric_median(sample))


def test_b_dec_starts_at_zero_whatever_the_sample(sample):
    assert not make(sample=sample).b_dec.any()


def test_centre_without_a_sample_is_refused():
    with pytest.raises(ValueError, match="b_dec_init = 'mean' needs a sample"):
        make(b_dec_init="mean")


def test_geometric_median_is_not_moved_by_an_outlier():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1e6, 1e6]])
    assert geometric_median(points).norm() < 2


def test_geometric_median_has_no_shorter_sum_of_distances_nearby(sample):
    median = geometric_median(sample)
    best = (sample - median).norm(dim=1).sum()
    steps = 0.01 * torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert all((sample - median - step).norm(dim=1).sum() > best for step in steps)


def test_geometric_median_of_equal_points_is_that_point():
    torch.testing.assert_close(geometric_median(torch.full((5, 3), 2.0)), torch.full((3,), 2.0))
