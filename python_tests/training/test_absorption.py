"""The mean over latents of the largest cosine of their decoder rows with others."""

import pytest
import torch

from sae_fast.evaluation import dictionary
from sae_fast.training import absorption
from sae_fast.training.absorption import mean_largest_cosine


def test_it_is_that_of_all_pairs(monkeypatch):
    monkeypatch.setattr(dictionary, "ROWS", 7)
    W_dec = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 3
    cosines = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=2)
    expected = (cosines - 3 * torch.eye(50)).amax(dim=1).mean()
    torch.testing.assert_close(mean_largest_cosine(W_dec), expected)


def test_latents_of_one_direction_and_none_are_one_and_zero():
    assert mean_largest_cosine(torch.ones(5, 3)).item() == pytest.approx(1)
    assert mean_largest_cosine(torch.eye(4)).item() == 0
    assert mean_largest_cosine(torch.ones(1, 3)).item() == 0
    assert mean_largest_cosine(torch.zeros(3, 3)).item() == 0


def test_of_a_large_dictionary_a_sample_stands_for_all(monkeypatch):
    monkeypatch.setattr(absorption, "SAMPLED_LATENTS", 100)
    W_dec = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    sampled = mean_largest_cosine(W_dec)
    monkeypatch.setattr(absorption, "SAMPLED_LATENTS", 1000)
    torch.testing.assert_close(sampled, mean_largest_cosine(W_dec), rtol=0.02, atol=0)
