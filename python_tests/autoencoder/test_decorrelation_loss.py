"""The forms of decorrelation; test_training_loss.py tests their gradients."""

import pytest
import torch
from plain_sae import make_batch, make_sae

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.penalties import chunked_max, decorrelation_loss, random_chunks

NEXT = torch.tensor(3)


def rows(d_sae=50, d_in=8, seed=0):
    return torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))


def test_gram_sum_is_the_literal_sum_over_ordered_pairs():
    """Its expected value for a random dictionary is F (F − 1) / D, and F (F − D) / D the least."""
    W_dec = rows(400, 16)
    found = decorrelation_loss(W_dec, "gram_sum", NEXT, 2)
    assert float(found) == pytest.approx(400 * 399 / 16, rel=0.02)
    assert float(found) > 400 * (400 - 16) / 16
    mean = decorrelation_loss(W_dec, "gram_mean", NEXT, 2)
    torch.testing.assert_close(mean, found / (400 * 399))
    scaled = decorrelation_loss(W_dec, "gram_scaled", NEXT, 2, 16.0)
    torch.testing.assert_close(scaled, found / 400)


@pytest.mark.parametrize(("form", "is_noticed"), [("gram_sum", False), ("chunked_max", True)])
def test_equal_rows_are_noticed_by_their_nearest_and_not_by_the_sum(form, is_noticed):
    W_dec = rows(2000, 64)
    twins = W_dec.clone()
    twins[1] = twins[0]
    before, after = (decorrelation_loss(W, form, NEXT, 2000) for W in (W_dec, twins))
    assert bool((after - before) / before > 1e-3) is is_noticed


def test_chunked_max_is_zero_for_orthogonal_rows_and_one_for_pairs_of_equal_ones():
    axes = torch.eye(8)
    assert float(chunked_max(axes, NEXT, 4)) == 0
    assert float(chunked_max(torch.cat([axes, 3 * axes]), NEXT, 16)) == pytest.approx(1)


def test_chunked_max_looks_at_the_largest_cosine_not_the_largest_magnitude():
    W_dec = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]])
    expected = (0.36 + 0.36 + 0.36) / 3  # the second row's largest cosine is −0.6
    assert float(chunked_max(W_dec, NEXT, 3)) == pytest.approx(expected)


@pytest.mark.parametrize("d_sae", [1, 2])
def test_chunked_max_of_hardly_any_rows(d_sae):
    W_dec = rows(d_sae).requires_grad_()
    loss = chunked_max(W_dec, NEXT, 2)
    loss.backward()
    cosine = torch.cosine_similarity(W_dec[0], W_dec[-1], dim=0).detach()
    torch.testing.assert_close(loss.detach(), cosine.square() * (d_sae - 1))
    assert torch.isfinite(W_dec.grad).all()


@pytest.mark.parametrize(("d_sae", "chunk"), [(50, 7), (3, 2), (1, 2), (64, 64), (64, 1000)])
def test_chunks_hold_every_latent_once(d_sae, chunk):
    found = random_chunks(d_sae, NEXT, chunk)
    assert torch.cat(found).sort().values.tolist() == list(range(d_sae))
    sizes = [len(members) for members in found]
    assert all(min(chunk, d_sae) <= size < max(2 * chunk, d_sae + 1) for size in sizes)


def test_any_two_latents_share_a_chunk_equally_often():
    """In chunks of 5 of 20 latents a pair shares a chunk with probability 4/19."""
    together = torch.zeros(20, 20)
    n_draws = 3000
    for draw in range(n_draws):
        for members in random_chunks(20, torch.tensor(draw), 5):
            together[members[:, None], members] += 1
    shares = together[~torch.eye(20, dtype=torch.bool)] / n_draws
    deviation = (4 / 19 * 15 / 19 / n_draws) ** 0.5
    assert float((shares - 4 / 19).abs().max()) < 5 * deviation


def test_following_a_batch_draws_other_chunks():
    sae = make_sae(decorrelation="chunked_max", decorrelation_coeff=1.0, decorrelation_chunk=8)
    loss = sae.training_loss(make_batch(sae))
    again = sae.training_loss(make_batch(sae))
    assert torch.equal(again.components["decorr_loss"], loss.components["decorr_loss"])
    sae.after_step_(loss.code)
    after = sae.training_loss(make_batch(sae))
    assert not torch.equal(after.components["decorr_loss"], loss.components["decorr_loss"])


def test_draw_is_saved_where_there_are_chunks_only(tmp_path):
    sae = make_sae(decorrelation="chunked_max", decorrelation_coeff=1.0)
    sae.after_step_(sae.training_loss(make_batch(sae)).code)
    sae.save(tmp_path)
    assert int(SparseAutoencoder.from_pretrained(tmp_path).decorrelation_draw) == 1
    assert "decorrelation_draw" not in make_sae(decorrelation_coeff=1.0).state_dict()
