"""The guided terms of a dense code equal the terms of a sparse code with equal values."""

import pytest
import torch

from sae_fast import ops
from sae_fast.autoencoder.penalties import temporal_smoothness_loss
from sae_fast.autoencoder.probe import predictions


@pytest.fixture
def codes():
    """Return a sparse code, a dense code with its values, and the leaf of both."""
    generator = torch.Generator().manual_seed(0)
    x, W_enc = (torch.randn(n, 12, generator=generator) for n in (30, 40))
    zeros = torch.zeros(40)
    sparse = ops.encode_threshold(x, W_enc, zeros, torch.zeros(12), zeros)
    dense = sparse.dense()
    return sparse, ops.DenseCode(dense, (dense > 0).sum())


def test_temporal_loss_is_the_same(codes):
    starts = torch.rand(30, generator=torch.Generator().manual_seed(1)) < 0.2
    sparse, dense = (temporal_smoothness_loss(code, starts) for code in codes)
    assert float(dense) > 0
    torch.testing.assert_close(sparse, dense)


def test_predictions_are_the_same(codes):
    generator = torch.Generator().manual_seed(2)
    own = {
        "W_probe": torch.randn(40, 3, generator=generator),
        "b_probe": torch.randn(3, generator=generator),
    }
    sparse, dense = (predictions(own, code) for code in codes)
    torch.testing.assert_close(sparse, dense)
