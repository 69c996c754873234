"""Whole trainings: a planted dictionary is found, dead latents come back, runs repeat."""

import pytest
import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.training.optimizer.row_optimizer import DenseOptimizer, RowOptimizer

D_IN, N_FEATURES, ACTIVE = 32, 48, 3


def planted(seed=0):
    """Return a dictionary of unit features and a function that draws sparse combinations."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(
        torch.randn(N_FEATURES, D_IN, generator=generator), dim=1
    )

    def draw(n_tokens):
        chosen = torch.rand(n_tokens, N_FEATURES, generator=generator).topk(ACTIVE).indices
        amounts = 1 + torch.rand(n_tokens, ACTIVE, generator=generator)
        return torch.zeros(n_tokens, N_FEATURES).scatter(1, chosen, amounts) @ features * 3

    return features, draw


def train(kind, n_steps, *, lr=1e-2, prepare=None, **fields):
    features, draw = planted()
    config = {
        "d_in": D_IN,
        "d_sae": N_FEATURES,
        "k": ACTIVE,
        "normalize_activations": "none",
        **fields,
    }
    sae = SparseAutoencoder(SAEConfig(**config))
    sae.initialize_(torch.Generator().manual_seed(1))
    if prepare is not None:
        prepare(sae)
    optimizer = kind(sae)
    losses = []
    for step in range(n_steps):
        loss = sae.training_loss(draw(512), dense_grad=kind.dense_grad)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step(lr * min(1.0, (step + 1) / 10, (n_steps - step) / (0.2 * n_steps)))
        sae.update_fired_(loss.code, 512)
        losses.append(float(loss.total.detach()))
    return sae, features, losses


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, because steps this small wait for threads longer than they compute."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def mean_max_cosine(sae, features):
    return float((features @ sae.W_dec.detach().t()).max(1).values.mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
def test_planted_dictionary_is_recovered(kind):
    sae, features, losses = train(kind, 300)
    assert losses[-1] < 0.1 * losses[0]
    assert mean_max_cosine(sae, features) > 0.9


def kill_half(sae):
    """Make half of the latents too weak to be among the k largest, though sometimes above 0."""
    with torch.no_grad():
        sae.W_enc[: N_FEATURES // 2] *= 0.05
    sae.tokens_since_fired[: N_FEATURES // 2] = 10**9


def silence_half(sae):
    """Make the pre-activations of half of the latents negative for all tokens."""
    kill_half(sae)
    with torch.no_grad():
        sae.b_enc[: N_FEATURES // 2] = -1.0


def count_dead(sae):
    return int(sae.dead_mask().sum())


@pytest.mark.parametrize("prepare", [kill_half, silence_half])
def test_dead_latents_revive_with_aux_k(prepare):
    sae, _, _ = train(RowOptimizer, 200, dead_after_tokens=2048, aux_k_coeff=1.0, prepare=prepare)
    assert count_dead(sae) < N_FEATURES // 8


def test_dead_latents_stay_dead_without_aux_k():
    sae, _, _ = train(RowOptimizer, 100, dead_after_tokens=2048, aux_k_coeff=0.0, prepare=kill_half)
    assert count_dead(sae) >= N_FEATURES // 2


def test_same_seed_gives_bitwise_equal_losses():
    assert train(RowOptimizer, 20)[2] == train(RowOptimizer, 20)[2]
