"""Strengths of functions in planes of waves, with planted waves of known phase."""

import math

import pytest
import torch

from sae_fast.ground_truth.adding_transformer import AddingTransformer, all_pairs, train_adding
from sae_fast.ground_truth.fourier import (
    key_frequencies,
    marginals,
    match_frequencies,
    power,
    strengths,
)

P = 13
T = torch.arange(P, dtype=torch.float64)


def wave(frequency, phase=0.0):
    return torch.cos(2 * math.pi * frequency * T / P + phase)


@pytest.mark.parametrize("phase", [0.0, 0.3, math.pi / 4, 2.0])
def test_a_wave_has_strength_1_in_its_plane_whatever_phase_size_and_mean(phase):
    found = strengths(5 + 0.2 * wave(4, phase))
    expected = torch.zeros(6, dtype=torch.float64)
    expected[3] = 1
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_sum_of_two_waves_is_shared_by_their_lengths():
    found = strengths(3 * wave(1, 0.7) + 4 * wave(6, 0.1))
    assert found.tolist() == pytest.approx([0.6, 0, 0, 0, 0, 0.8], abs=1e-12)
    random = strengths(torch.randn(5, P, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(random.square().sum(1), torch.ones(5, dtype=torch.float64))


def test_constant_functions_have_no_strength():
    assert strengths(torch.tensor([[0.0], [0.1], [1e9]]).expand(3, P)).abs().max() == 0


def test_half_of_a_wave_as_relu_leaves_it_has_the_strength_of_its_fourier_series():
    # On the circle max(0, cos) has its mean 1/pi, 1/2 at its frequency, and 2/(3 pi), 2/(15 pi), …
    # at the even multiples; p is large enough for the sum to be near the integral.
    p = 1009
    t = torch.arange(p, dtype=torch.float64)
    found = strengths(torch.cos(2 * math.pi * 5 * t / p).clamp_min(0))
    whole = 1 / 4 - 1 / math.pi**2  # variance
    assert float(found[4]) == pytest.approx(math.sqrt(1 / 8 / whole), abs=1e-4)


def test_key_frequencies_are_those_with_the_power_of_the_embedding():
    directions = torch.eye(4, dtype=torch.float64)
    embedding = 2 * wave(2)[:, None] * directions[0] + wave(2, math.pi / 2)[:, None] * directions[1]
    embedding = embedding + wave(5, 0.4)[:, None] * directions[2] + 7
    shares = power(embedding)
    assert shares.tolist() == pytest.approx([0, 5 / 6, 0, 0, 1 / 6, 0], abs=1e-12)
    assert key_frequencies(embedding) == [2, 5]


def test_marginals_are_the_means_by_a_by_b_and_by_their_sum():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(P, P, 2, generator=generator)
    by_a, by_b, by_sum = marginals(values)
    assert torch.allclose(by_a, values.mean(1).t().double(), atol=1e-6)
    assert torch.allclose(by_b, values.mean(0).t().double(), atol=1e-6)
    expected = sum(values[a, (3 - a) % P] for a in range(P)) / P
    assert torch.allclose(by_sum[:, 3], expected.double(), atol=1e-6)


def test_a_planted_latent_of_the_sum_is_found_and_others_are_not():
    a, b = all_pairs(P)
    values = torch.zeros(P * P, 3, dtype=torch.float64)
    values[:, 0] = 1 + torch.cos(2 * math.pi * 3 * (a + b) / P + 1.1)
    values[:, 1] = 1 + torch.cos(2 * math.pi * 2 * a / P)
    found = strengths(marginals(values.view(P, P, 3)))
    assert float(found[2, 0, 2]) == pytest.approx(1)
    assert float(found[0, 1, 1]) == pytest.approx(1)
    assert float(found[2, 1].max()) < 1e-9  # averaged over a, its mean by a + b is constant
    assert float(found[:, 2].max()) == 0


def test_each_key_frequency_gets_a_latent_of_its_own():
    found = torch.tensor([[0.9, 0.0, 0.8], [0.7, 0.0, 0.1], [0.0, 1.0, 0.0]])
    assert match_frequencies(found, [1, 3]) == ([1, 0], pytest.approx([0.7, 0.8]))
    assert match_frequencies(found[:1], [1, 3]) == ([0, -1], pytest.approx([0.9, 0]))


def test_the_transformer_is_a_causal_block_read_at_the_last_token():
    generator = torch.Generator().manual_seed(0)
    model = AddingTransformer(5, 8, 2, 16, generator)
    a, b = all_pairs(5)
    tokens = torch.stack([a, b, torch.full_like(a, 5)], 1)
    x = model.embedding[tokens] + model.positions
    heads = [(x @ w).view(25, 3, 2, 4).transpose(1, 2) for w in (model.query, model.key)]
    value = (x @ model.value).view(25, 3, 2, 4).transpose(1, 2)
    attended = torch.nn.functional.scaled_dot_product_attention(*heads, value, is_causal=True)
    stream = x + attended.transpose(1, 2).reshape(25, 3, 8) @ model.output
    mlp = (stream @ model.W_in + model.b_in).relu() @ model.W_out + model.b_out
    assert torch.allclose(model.activations(a, b), (stream + mlp)[:, -1], atol=1e-5)
    assert torch.allclose(model.activations(a, b, "mlp_out"), mlp[:, -1], atol=1e-5)


def trained():
    generator = torch.Generator().manual_seed(1)
    model = AddingTransformer(5, 16, 2, 32, generator)
    seen = []
    progress = lambda step, total: seen.append((step, total))  # noqa: E731
    curve = train_adding(model, 0.7, 60, 1e-2, 0.1, generator, progress)
    assert seen[-1] == (60, 60)
    return curve


def test_training_learns_the_pairs_it_sees_and_repeats_to_the_bit():
    curve, again = trained(), trained()
    assert torch.equal(curve, again)
    assert curve.shape == (60, 4)
    assert float(curve[-1, 1]) < 0.1 < float(curve[0, 1])
