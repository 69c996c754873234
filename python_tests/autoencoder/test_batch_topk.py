import pytest
import torch
from plain_sae import make_batch, make_sae

from sae_fast.autoencoder import SparseAutoencoder


def follow(sae, *batches):
    for x in batches:
        sae.after_step_(sae.training_loss(x).code)


def least_active(sae, x):
    values = sae.training_loss(x).code.values
    return values[values > 0].min().detach()


@pytest.fixture(name="sae")
def make_batch_topk():
    return make_sae(arch="batch_topk")


def test_a_batch_has_k_latents_a_token_on_average(sae):
    x = make_batch(sae, 200)
    code = sae.training_loss(x).code
    assert int((code.values > 0).sum()) == 200 * 5
    assert code.l0().min() < 5 < code.l0().max()


def test_threshold_averages_the_least_active_values_of_the_latest_batches(sae):
    batches = [make_batch(sae, 50, seed) for seed in range(20)]
    expected = torch.zeros(())
    for number, x in enumerate(batches, 1):
        rate = min(1.0, 16 / number)
        expected = expected + rate * (least_active(sae, x) - expected)
        follow(sae, x)
    torch.testing.assert_close(sae.threshold, expected)
    assert int(sae.threshold_updates) == 20


def test_threshold_is_that_of_k_while_a_larger_k_is_trained(sae):
    x = make_batch(sae, 200)
    code = sae.training_loss(x, k=8).code
    assert int(code.n_listed) == 200 * 8
    sae.after_step_(code)
    largest = code.values.detach().sort(descending=True).values
    assert float(sae.threshold) == float(largest[200 * 5 - 1])


def test_old_batches_are_forgotten(sae):
    sae.threshold.fill_(1000.0)
    sae.threshold_updates.fill_(10_000)
    x = make_batch(sae, 50)
    follow(sae, x)
    expected = 1000.0 + (least_active(sae, x) - 1000.0) / 100
    torch.testing.assert_close(sae.threshold, expected)


def test_batch_where_nothing_fires_leaves_the_threshold_alone(sae):
    follow(sae, make_batch(sae, 50))
    before = sae.threshold.clone()
    with torch.no_grad():
        sae.b_enc.sub_(1e6)
    follow(sae, make_batch(sae, 50))
    assert torch.equal(sae.threshold, before)
    assert int(sae.threshold_updates) == 1


def test_code_of_a_token_does_not_depend_on_its_batch(sae):
    x = make_batch(sae, 60)
    follow(sae, x)
    together = sae.encode(x).dense()
    alone = torch.cat([sae.encode(row[None]).dense() for row in x])
    assert torch.equal(together, alone)
    pre_acts = (x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    expected = torch.where(pre_acts > sae.threshold, pre_acts, 0.0)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


def test_untrained_model_selects_by_the_batch(sae):
    x = make_batch(sae, 60)
    assert torch.equal(sae.encode(x).dense(), sae.training_loss(x).code.dense())


def test_threshold_is_saved_and_loaded(sae, tmp_path):
    follow(sae, make_batch(sae, 50))
    sae.save(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.threshold, sae.threshold)
    x = make_batch(sae, 20, seed=9)
    assert torch.equal(loaded(x), sae(x))


def test_folding_the_normalization_keeps_the_function(sae):
    sae.set_normalization_(torch.linspace(-2, 3, 12), 0.25)
    x = make_batch(sae, 50) * 4
    follow(sae, sae.normalize(x))
    sae.threshold.mul_(0.99)  # off the batch's least value, which rounding would let pass or not
    folded = sae.fold_normalization()
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.threshold, sae.threshold / 0.25)


def test_a_new_start_forgets_the_threshold(sae):
    follow(sae, make_batch(sae, 50))
    sae.initialize_()
    assert float(sae.threshold) == 0
    assert int(sae.threshold_updates) == 0
