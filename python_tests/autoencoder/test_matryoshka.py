"""The additions of Matryoshka to BatchTopK; test_training_loss.py tests terms and gradients."""

import pytest
import torch
from plain_sae import left_gradients, make_batch, make_sae

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.ops import native

DTYPE = torch.float32 if native.load() is not None else torch.float64
PREFIXES = (5, 6, 17, 40)


@pytest.fixture(name="sae")
def make_matryoshka():
    return make_sae(dtype=DTYPE, arch="matryoshka", matryoshka_prefixes=PREFIXES)


def errors_of_prefixes(sae, x):
    """Return Σ_d (x̂_g − x)² for every token and prefix, [N, G], from separate decodes."""
    code = sae.training_loss(x).code
    acts, W_dec = code.dense().detach(), sae.W_dec.detach()
    errors = [acts[:, :m] @ W_dec[:m] + sae.b_dec.detach() - x for m in PREFIXES]
    return torch.stack([error.square().sum(1) for error in errors], dim=1)


def test_recon_loss_is_the_sum_over_prefixes_not_their_mean(sae):
    x = make_batch(sae)
    expected = errors_of_prefixes(sae, x).sum(1).mean()
    torch.testing.assert_close(sae.training_loss(x).components["recon_loss"], expected)


def test_one_prefix_gives_the_loss_of_batch_topk():
    one = make_sae(arch="matryoshka", matryoshka_prefixes=(40,), dead=(1, 8), l1_penalty_coeff=0.1)
    other = make_sae(arch="batch_topk", dead=(1, 8), l1_penalty_coeff=0.1)
    x = make_batch(one)
    found, expected = one.training_loss(x).components, other.training_loss(x).components
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_fvu_and_l0_are_those_of_all_latents(sae):
    x = make_batch(sae)
    loss = sae.training_loss(x)
    variance = (x - x.mean(0)).square().sum()
    expected = errors_of_prefixes(sae, x)[:, -1].sum() / variance
    torch.testing.assert_close(loss.components["fvu"], expected)
    assert float(loss.components["l0"]) == 5.0


def test_latents_of_a_prefix_are_not_moved_by_the_errors_of_smaller_ones(sae):
    """If only the first prefix has a weight, the latents after it have no gradient."""
    first = make_sae(
        arch="matryoshka",
        matryoshka_prefixes=PREFIXES,
        matryoshka_weights=(1.0, 0.0, 0.0, 0.0),
        aux_k_coeff=0.0,
    )
    first.training_loss(make_batch(first), dense_grad=False).total.backward()
    left = left_gradients(first)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert left[name][:5].any()
        assert not left[name][5:].any()


def test_selection_is_one_over_all_latents(sae):
    x = make_batch(sae)
    other = make_sae(dtype=DTYPE, arch="batch_topk")
    expected = other.training_loss(x).code
    code = sae.training_loss(x).code
    assert torch.equal(code.indices, expected.indices)
    assert torch.equal(code.values, expected.values)


@pytest.mark.parametrize("dense_grad", [True, False])
def test_residual_is_differentiable_too(sae, dense_grad):
    x = make_batch(sae).requires_grad_()
    code = ops.encode_batch_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, 5, dense_grad=dense_grad)
    arguments = (code, sae.W_dec, sae.b_dec, x)
    modelled = ops.reconstruct_prefixes(*arguments, PREFIXES, dense_grad=dense_grad)
    side = torch.linspace(-1, 1, 30 * 4, dtype=DTYPE).view(30, 4)
    (modelled.residual.pow(3).sum() + (side * modelled.squared_errors).sum()).backward()
    found = {**left_gradients(sae), "x": x.grad}
    for parameter in sae.parameters():
        parameter.grad = None

    plain = x.detach().requires_grad_()
    pre_acts = (plain - sae.b_dec) @ sae.W_enc.t() + sae.b_enc
    acts = torch.where(code.dense().detach() > 0, pre_acts, 0.0)
    residuals = [acts[:, :m] @ sae.W_dec[:m] + sae.b_dec - plain for m in PREFIXES]
    squared = torch.stack([residual.square().sum(1) for residual in residuals], dim=1)
    (residuals[-1].pow(3).sum() + (side * squared).sum()).backward()
    expected = {name: sae.get_parameter(name).grad for name in found if name != "x"}
    expected["x"] = plain.grad
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-3)


def test_fewer_positive_entries_than_the_budget_leave_zeros_at_the_end(sae):
    """The entries that fill up the budget have index 0, after larger ones of the last row."""
    with torch.no_grad():
        sae.b_enc.sub_(3.0)
    x = make_batch(sae, 4)
    loss = sae.training_loss(x)
    assert int((loss.code.values == 0).sum()) > 0
    torch.testing.assert_close(
        loss.components["recon_loss"], errors_of_prefixes(sae, x).sum(1).mean()
    )


def test_no_tokens_have_no_errors(sae):
    x = torch.empty(0, 12, dtype=DTYPE)
    code = ops.encode_batch_topk(x, *sae.weights[:2], sae.b_dec, 5)
    modelled = ops.reconstruct_prefixes(code, sae.W_dec, sae.b_dec, x, PREFIXES)
    assert modelled.residual.shape == (0, 12)
    assert modelled.squared_errors.shape == (0, 4)


@pytest.mark.parametrize("prefixes", [(), (0, 40), (7, 7, 40), (41,), (3, 39)])
def test_prefixes_that_are_none_are_refused(sae, prefixes):
    x = make_batch(sae)
    code = sae.training_loss(x).code
    with pytest.raises(RuntimeError, match="prefixes must ascend from at least 1 to d_sae = 40"):
        ops.reconstruct_prefixes(code, sae.W_dec, sae.b_dec, x, prefixes)


def test_code_of_equal_rows_is_refused(sae):
    x = make_batch(sae)
    code = ops.encode_topk(x, *sae.weights[:2], sae.b_dec, 5)
    with pytest.raises(RuntimeError, match="code must have offsets"):
        ops.reconstruct_prefixes(code, sae.W_dec, sae.b_dec, x, PREFIXES)


def test_threshold_and_prefixes_are_saved_and_loaded(sae, tmp_path):
    sae = sae.float()
    sae.after_step_(sae.training_loss(make_batch(sae, 50)).code)
    sae.save(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    x = make_batch(sae, 20, seed=9)
    assert loaded.config == sae.config
    assert torch.equal(loaded(x), sae(x))


def test_folding_the_normalization_keeps_the_function(sae):
    sae = sae.float()
    sae.set_normalization_(torch.linspace(-2, 3, 12), 0.25)
    x = make_batch(sae, 50) * 4
    sae.after_step_(sae.training_loss(sae.normalize(x)).code)
    sae.threshold.mul_(0.999)  # not exactly the value of an entry, which rounding may put below
    torch.testing.assert_close(sae.fold_normalization()(x), sae(x), rtol=1e-4, atol=1e-4)
