"""Every term of the loss, and its gradient for every parameter, against plain dense PyTorch."""

import pytest
import torch
from plain_sae import PARAMETERS, left_gradients, make_batch, make_sae, plain_gradients, plain_terms

from sae_fast import ops
from sae_fast.autoencoder import losses
from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.autoencoder.architectures import make_architecture
from sae_fast.autoencoder.losses import total_variance
from sae_fast.config import SAEConfig
from sae_fast.ops import native
from sae_fast.ops.row_factors import merge_row_factors

# The compiled kernels are float32; the reference takes float64, which shows a wrong formula.
DTYPE = torch.float32 if native.load() is not None else torch.float64
TOLERANCE = (
    {"rtol": 1e-4, "atol": 1e-5} if torch.float32 == DTYPE else {"rtol": 1e-9, "atol": 1e-11}
)

ALL_TERMS = {"reconstruction_coeff": 0.7, "l1_penalty_coeff": 0.3, "decorrelation_coeff": 2.0}
DEAD = (1, 3, 8, 9, 20, 21, 22, 30, 39)
CASES = {
    "every term": (dict(ALL_TERMS), DEAD),
    "fewer dead latents than aux_k": (dict(ALL_TERMS), DEAD[:3]),
    "aux_k given": ({"aux_k": 2}, DEAD),
    "no dead latent": ({"l1_penalty_coeff": 0.3}, ()),
    "all latents dead": ({}, range(40)),
    "k is 1": ({"k": 1}, DEAD),
    "k is d_sae": ({"k": 40}, DEAD),
    "d_in is 1": ({"d_in": 1, "d_sae": 5, "k": 2}, (4,)),
    "batch_topk": ({**ALL_TERMS, "arch": "batch_topk"}, DEAD),
    "batch_topk, k is d_sae": ({"arch": "batch_topk", "k": 40}, DEAD),
    "gram_sum": ({**ALL_TERMS, "decorrelation": "gram_sum"}, DEAD),
    "chunked_max": ({**ALL_TERMS, "decorrelation": "chunked_max", "decorrelation_chunk": 9}, DEAD),
    "chunked_max in one chunk": ({**ALL_TERMS, "decorrelation": "chunked_max"}, DEAD),
    "abs_topk": ({**ALL_TERMS, "activation": "abs_topk"}, DEAD),
    "abs_topk, fewer dead latents than aux_k": ({"activation": "abs_topk"}, DEAD[:3]),
    "abs_topk, k is d_sae": ({"activation": "abs_topk", "k": 40}, DEAD),
    "groupmax": ({**ALL_TERMS, "activation": "groupmax"}, DEAD),
    "groupmax, one group": ({"activation": "groupmax", "k": 1}, DEAD),
    "groupmax, k is d_sae": ({"activation": "groupmax", "k": 40}, DEAD),
    "multi_topk": ({**ALL_TERMS, "multi_topk": True, "multi_topk_coeff": 0.4}, DEAD),
    "multi_topk, 4k is more than d_sae": ({"multi_topk": True, "k": 15}, DEAD),
    "multi_topk of abs_topk": ({"multi_topk": True, "activation": "abs_topk"}, DEAD),
    "matryoshka": ({**ALL_TERMS, "arch": "matryoshka"}, DEAD),
    "fvu": ({**ALL_TERMS, "loss_fn": "fvu"}, DEAD),
    "fvu of multi_topk": ({"loss_fn": "fvu", "multi_topk": True}, DEAD),
    "fvu of matryoshka": ({"loss_fn": "fvu", "arch": "matryoshka"}, DEAD),
    "matryoshka, k is d_sae": ({"arch": "matryoshka", "k": 40}, DEAD),
    "matryoshka with weights": (
        {
            "arch": "matryoshka",
            "matryoshka_prefixes": (1, 7, 8, 40),
            "matryoshka_weights": (2.0, 0.0, 0.5, 1.5),
        },
        DEAD,
    ),
}


@pytest.fixture(params=CASES, name="sae")
def make_case(request):
    fields, dead = CASES[request.param]
    return make_sae(dtype=DTYPE, dead=dead, **fields)


@pytest.mark.parametrize("dense_grad", [True, False])
def test_every_term_equals_plain_pytorch(sae, dense_grad):
    x = make_batch(sae)
    loss = sae.training_loss(x, dense_grad=dense_grad)
    for name, expected in plain_terms(sae, x).items():
        torch.testing.assert_close(loss.components[name], expected.detach(), **TOLERANCE)
    torch.testing.assert_close(
        loss.total.detach(), sum(plain_terms(sae, x).values()).detach(), **TOLERANCE
    )


@pytest.mark.parametrize("dense_grad", [True, False])
def test_gradient_of_the_loss_equals_autograd_for_every_parameter(sae, dense_grad):
    x = make_batch(sae)
    sae.training_loss(x, dense_grad=dense_grad).total.backward()
    expected = plain_gradients(sae, x)
    left = left_gradients(sae)
    for name in PARAMETERS:
        torch.testing.assert_close(
            left[name], expected[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dense_grad", [True, False])
@pytest.mark.parametrize(
    ("term", "coefficients"),
    [
        ("recon_loss", {"reconstruction_coeff": 1.0, "aux_k_coeff": 0.0}),
        ("l1_loss", {"reconstruction_coeff": 0.0, "aux_k_coeff": 0.0, "l1_penalty_coeff": 0.3}),
        (
            "decorr_loss",
            {"reconstruction_coeff": 0.0, "aux_k_coeff": 0.0, "decorrelation_coeff": 2.0},
        ),
        ("aux_loss", {"reconstruction_coeff": 0.0, "aux_k_coeff": 1.0}),
        (
            "multi_topk_loss",
            {"reconstruction_coeff": 0.0, "aux_k_coeff": 0.0, "multi_topk": True},
        ),
    ],
)
def test_gradient_of_one_term_equals_autograd_for_every_parameter(term, coefficients, dense_grad):
    sae = make_sae(dtype=DTYPE, dead=DEAD, **coefficients)
    x = make_batch(sae)
    sae.training_loss(x, dense_grad=dense_grad).total.backward()
    expected = plain_gradients(sae, x, term)
    left = left_gradients(sae)
    for name in PARAMETERS:
        torch.testing.assert_close(
            left[name], expected[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dense_grad", [True, False])
def test_aux_k_reaches_encoder_and_decoder_of_dead_latents_only(dense_grad):
    sae = make_sae(dtype=DTYPE, dead=DEAD, reconstruction_coeff=0.0, aux_k_coeff=1.0)
    sae.training_loss(make_batch(sae), dense_grad=dense_grad).total.backward()
    left = left_gradients(sae)
    dead = sae.dead_mask()
    for name in ("W_enc", "b_enc", "W_dec"):
        row_is_moved = left[name].reshape(40, -1).abs().sum(1) > 0
        assert row_is_moved[dead].all()
        assert not row_is_moved[~dead].any()
    assert not left["b_dec"].any()


@pytest.mark.parametrize("dense_grad", [True, False])
@pytest.mark.parametrize("precision", ["screened", "bf16"])
@pytest.mark.parametrize(("n_dead", "k_aux"), [(0, 4), (1, 2), (3, 4), (3, 6), (5, 6), (9, 6)])
def test_room_for_more_dead_latents_than_there_are_changes_nothing(
    device, dense_grad, precision, n_dead, k_aux
):
    found = []
    for given in (None, k_aux):
        sae = make_sae(dead=DEAD[:n_dead], **ALL_TERMS).to(device)
        x = make_batch(sae).to(device)
        loss = sae.training_loss(x, precision=precision, dense_grad=dense_grad, k_aux=given)
        loss.total.backward()
        left = left_gradients(sae.cpu()) if dense_grad else _left_factors(sae)
        found.append([loss.total.detach(), *loss.components.values(), *left.values()])
    assert [torch.equal(*pair) for pair in zip(*found, strict=True)] == [True] * len(found[0])


def _left_factors(sae):
    """Return the gradients of the biases, and of the matrices as the optimiser computes them."""
    left = {"b_enc": sae.b_enc.grad, "b_dec": sae.b_dec.grad}
    merged = merge_row_factors(sae.W_enc, sae.W_dec)
    for name, factors in zip(("W_enc", "W_dec"), merged, strict=True):
        view = (factors.latent_offsets, factors.rows, factors.coefficients)
        norm, sums, _, _ = ops.row_gradient_norm(*view, factors.dense, factors.shift)
        left |= {f"{name} norm": norm, f"{name} sums": sums}
    return left


def test_micro_batches_leave_the_sum_of_their_gradients():
    sae = make_sae(dtype=DTYPE, dead=DEAD, **ALL_TERMS)
    batches = [make_batch(sae, n_tokens, seed) for n_tokens, seed in ((30, 1), (7, 2))]
    for x in batches:
        sae.training_loss(x, dense_grad=False).total.backward()
    expected = [plain_gradients(sae, x) for x in batches]
    left = left_gradients(sae)
    for name in PARAMETERS:
        torch.testing.assert_close(left[name], expected[0][name] + expected[1][name], **TOLERANCE)


def test_components_add_up_to_the_loss():
    sae = make_sae(dtype=DTYPE, dead=DEAD, **ALL_TERMS)
    loss = sae.training_loss(make_batch(sae))
    parts = sum(value for name, value in loss.components.items() if name.endswith("_loss"))
    torch.testing.assert_close(loss.total.detach(), parts)


def test_fvu_is_the_unexplained_share_of_the_variance_about_the_mean():
    sae = make_sae(dtype=DTYPE)
    x = make_batch(sae) + 3.0
    fvu = sae.training_loss(x).components["fvu"]
    error = x - sae(x).detach()
    torch.testing.assert_close(
        fvu, error.square().sum() / (x - x.mean(0)).square().sum(), **TOLERANCE
    )


def test_loss_fn_fvu_is_the_share_that_is_logged_and_does_not_depend_on_the_units():
    sae = make_sae(loss_fn="fvu", b_dec_init="zero")
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x = make_batch(sae)
    found, larger = (sae.training_loss(rows).components for rows in (x, 1000 * x))
    assert found["recon_loss"].item() == pytest.approx(found["fvu"].item(), rel=1e-5)
    assert larger["recon_loss"].item() == pytest.approx(found["recon_loss"].item(), rel=1e-4)


def test_loss_fn_fvu_of_equal_rows_is_zero():
    sae = make_sae(loss_fn="fvu")
    loss = sae.training_loss(make_batch(sae)[:1].expand(7, -1).contiguous())
    loss.total.backward()
    assert loss.components["recon_loss"] == 0
    assert sae.W_dec.grad.isfinite().all()


def test_l0_counts_values_above_zero_not_listed_indices():
    sae = make_sae(dtype=DTYPE)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    assert float(sae.training_loss(make_batch(sae)).components["l0"]) == 0.0


def test_aux_loss_of_a_residual_without_variance_is_zero():
    sae = make_sae(dtype=DTYPE, dead=range(40))
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    x = make_batch(sae)[:1].expand(30, -1)
    loss = sae.training_loss(x)
    assert float(loss.components["aux_loss"]) == 0.0
    loss.total.backward()
    assert torch.isfinite(sae.W_enc.grad).all()


def test_nan_input_shows_in_the_loss():
    sae = make_sae(dtype=DTYPE)
    x = make_batch(sae)
    x[3, 4] = torch.nan
    assert sae.training_loss(x).total.isnan()


def test_total_can_be_combined_with_any_loss_on_the_code():
    sae = make_sae(dtype=DTYPE)
    x = make_batch(sae)
    loss = sae.training_loss(x)
    (loss.total + loss.code.values.square().mean()).backward()
    assert torch.isfinite(sae.W_enc.grad).all()


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0, 1000.0])
def test_total_variance_is_exact_far_from_the_origin(offset):
    x = torch.randn(5000, 70, generator=torch.Generator().manual_seed(0)) + offset
    wide = x.double()
    expected = (wide - wide.mean(0)).square().sum()
    torch.testing.assert_close(total_variance(x).double(), expected, rtol=2e-6, atol=0)


def test_total_variance_of_equal_rows_is_rounding_at_most():
    x = torch.full((500, 7), 3.3)
    assert float(total_variance(x)) < 1e-6 * float(x.square().sum())


@pytest.mark.skipif(native.load() is None, reason="the reference's sums follow torch's threads")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decorrelation": "gram_sum"},
        {"decorrelation": "chunked_max", "decorrelation_chunk": 300},
        {"multi_topk": True},
        {"activation": "abs_topk"},
        {"activation": "groupmax", "k": 40},
        {"arch": "batch_topk"},
        {"arch": "matryoshka"},
    ],
)
def test_loss_and_gradient_do_not_depend_on_the_number_of_threads(fields):
    found = []
    threads = torch.get_num_threads()
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        sae = make_sae(dead=DEAD, **{"d_sae": 2000, "k": 32, **ALL_TERMS, **fields})
        loss = sae.training_loss(make_batch(sae, 3000) + 2.0, dense_grad=False)
        loss.total.backward()
        found.append(
            [loss.total.detach(), *loss.components.values(), *left_gradients(sae).values()]
        )
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))


def test_a_gpu_makes_a_mean_in_one_call_and_a_zero_once(monkeypatch):
    x = torch.arange(10.0)
    assert losses.deterministic_mean(x) == 4.5
    assert losses.constant_zero(x) is not losses.constant_zero(x)
    monkeypatch.setattr(losses, "is_on_gpu", lambda x: True)
    assert losses.deterministic_mean(x) == 4.5
    with torch.inference_mode():
        zero = losses.constant_zero(x)
    assert zero is losses.constant_zero(x)
    assert zero == 0
    assert not zero.is_inference()
    assert losses.constant_zero(x.double()).dtype == torch.float64


def test_a_step_knows_the_dead_latents_only_where_it_trains_them():
    with_aux_k = make_architecture(SAEConfig(d_in=4, d_sae=8, arch="topk", k=2))
    without = make_architecture(SAEConfig(d_in=4, d_sae=8, arch="topk", k=2, aux_k_coeff=0.0))
    assert with_aux_k.reads_dead_mask(StepSettings(k_aux=None))
    assert with_aux_k.reads_dead_mask(StepSettings(k_aux=3))
    assert not with_aux_k.reads_dead_mask(StepSettings(k_aux=0))
    assert not without.reads_dead_mask(StepSettings(k_aux=None))
    relu = make_architecture(SAEConfig(d_in=4, d_sae=8, arch="relu"))
    assert relu.reads_dead_mask(StepSettings(k_aux=0))
    assert not with_aux_k.acts_after_step
    assert make_architecture(SAEConfig(d_in=4, d_sae=8, arch="batch_topk", k=2)).acts_after_step
