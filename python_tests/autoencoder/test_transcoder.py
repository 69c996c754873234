"""Transcoders of every architecture: terms and gradients against plain dense PyTorch, and units."""

import pytest
import torch
from plain_sae import left_gradients, make_batch, make_sae, make_targets, plain_gradients
from plain_sae import plain_terms as plain_topk_terms
from plain_thresholded import go, make_thresholded
from plain_thresholded import plain_gradients as plain_thresholded_gradients
from plain_thresholded import plain_terms as plain_thresholded_terms

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.initialization import sample_rows
from sae_fast.autoencoder.losses import total_variance
from sae_fast.config import SAEConfig
from sae_fast.ops import native

# The compiled kernels are float32; the reference takes float64, which shows a wrong formula.
DTYPE = torch.float32 if native.load() is not None else torch.float64
TOLERANCE = (
    {"rtol": 1e-4, "atol": 2e-5} if torch.float32 == DTYPE else {"rtol": 1e-9, "atol": 1e-11}
)
D_OUT = 7
DEAD = (1, 3, 8, 9, 20, 21, 22, 30, 39)
ALL_TERMS = {"reconstruction_coeff": 0.7, "l1_penalty_coeff": 0.3, "decorrelation_coeff": 2.0}
WITH_K = {
    "topk": dict(ALL_TERMS),
    "topk, as wide as its input": {"d_out": 12},
    "topk, wider": {"d_out": 31},
    "topk, one target": {"d_out": 1},
    "multi_topk": {**ALL_TERMS, "multi_topk": True},
    "groupmax": {**ALL_TERMS, "activation": "groupmax"},
    "abs_topk": {**ALL_TERMS, "activation": "abs_topk"},
    "batch_topk": {**ALL_TERMS, "arch": "batch_topk"},
    "matryoshka": {**ALL_TERMS, "arch": "matryoshka"},
}
JUMP = {"arch": "jumprelu", "pre_act_loss_coeff": 0.3}
THRESHOLDED = {
    "relu": {"arch": "relu", "reconstruction_coeff": 0.7},
    "relu, unit rows": {"arch": "relu", "decoder_norm": "unit"},
    "jumprelu": {**JUMP, "target_l0": 6.0},
    "jumprelu, tanh": {**JUMP, "sparsity_penalty": "tanh", "decoder_norm": "free"},
    "gated": {"arch": "gated", "reconstruction_coeff": 0.7},
    "gated, free rows": {"arch": "gated", "decoder_norm": "free", "decoder_init_norm": 0.5},
}
CASES = WITH_K | THRESHOLDED
WAYS = [("sparse", True), ("sparse", False), ("dense", True), ("dense", False)]


def make(case, *, with_skip=True, path="sparse", dtype=DTYPE, **more):
    fields = {"transcoder": True, "skip_connection": with_skip, "d_out": D_OUT, **CASES[case]}
    maker = make_thresholded if case in THRESHOLDED else make_sae
    options = {"path": path} if case in THRESHOLDED else {}
    return maker(dtype=dtype, dead=DEAD, **options, **{**fields, **more})


def assert_equals_plain_pytorch(sae, plain_terms, gradients, dense_grad, device="cpu"):
    x, targets = make_batch(sae).to(device), make_targets(sae).to(device)
    sae.to(device)
    loss = sae.training_loss(x, targets, dense_grad=dense_grad)
    expected = plain_terms(sae, x, targets)
    for name, term in expected.items():
        torch.testing.assert_close(loss.components[name], term.detach(), **TOLERANCE)
    torch.testing.assert_close(loss.total.detach(), sum(expected.values()).detach(), **TOLERANCE)
    loss.total.backward()
    left, found = left_gradients(sae), gradients(sae, x, targets=targets)
    assert left.keys() == found.keys()
    assert ("W_skip" in left) == sae.config.skip_connection
    for name, gradient in found.items():
        assert gradient.any()
        torch.testing.assert_close(
            left[name], gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dense_grad", [True, False])
@pytest.mark.parametrize("with_skip", [True, False])
@pytest.mark.parametrize("case", WITH_K)
def test_terms_and_gradients_with_k_equal_plain_pytorch(case, with_skip, dense_grad):
    sae = make(case, with_skip=with_skip)
    assert_equals_plain_pytorch(sae, plain_topk_terms, plain_gradients, dense_grad)


@pytest.mark.parametrize(("path", "dense_grad"), WAYS)
@pytest.mark.parametrize("with_skip", [True, False])
@pytest.mark.parametrize("case", THRESHOLDED)
def test_terms_and_gradients_with_thresholds_equal_plain_pytorch(
    case, with_skip, path, dense_grad, device
):
    sae = make(case, with_skip=with_skip, path=path)
    plain = plain_thresholded_terms, plain_thresholded_gradients
    assert_equals_plain_pytorch(sae, *plain, dense_grad, device)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_skip_connection_in_low_precision_is_near_the_exact_one(precision):
    sae = make("relu", dtype=torch.float32)  # which has no selection that rounding could change
    x, targets = make_batch(sae), make_targets(sae)
    loss = sae.training_loss(x, targets, precision=precision, dense_grad=False)
    loss.total.backward()
    exact = plain_thresholded_gradients(sae, x, targets=targets)["W_skip"]
    scale = float(exact.abs().max())
    torch.testing.assert_close(sae.W_skip.grad, exact, rtol=0, atol=0.02 * scale)
    assert not torch.equal(sae.W_skip.grad, exact)


def test_micro_batches_leave_the_sum_of_their_gradients():
    sae = make("topk")
    pairs = [(make_batch(sae, n, n), make_targets(sae, n, n)) for n in (30, 11)]
    with sae.kept_copies():
        for x, targets in pairs:
            sae.training_loss(x, targets, dense_grad=False).total.backward()
    (shifts,) = {id(factor.shift) for factor in sae.W_enc.row_factors}
    assert shifts  # one, so that they are merged without a copy
    expected = [plain_gradients(sae, x, targets=targets) for x, targets in pairs]
    for name, gradient in left_gradients(sae).items():
        torch.testing.assert_close(gradient, expected[0][name] + expected[1][name], **TOLERANCE)


def test_fvu_is_of_the_variance_of_the_targets():
    sae = make("topk")
    x, targets = make_batch(sae), make_targets(sae) + 3.0
    error = (targets - sae(x)).detach().square().sum()
    fvu = sae.training_loss(x, targets).components["fvu"]
    torch.testing.assert_close(fvu, error / total_variance(targets), **TOLERANCE)


@pytest.mark.parametrize("side", ["x", "targets"])
def test_nan_on_either_side_shows_in_loss_and_variance(side):
    sae = make("topk")
    batch = {"x": make_batch(sae), "targets": make_targets(sae)}
    batch[side][3, 0] = torch.nan
    loss = sae.training_loss(**batch)
    assert loss.total.isnan()
    assert loss.variance.isnan()


def test_the_bias_of_the_decoder_is_not_subtracted_from_the_input():
    sae = make("topk", d_out=12)
    x = make_batch(sae)
    before = sae.encode(x).dense()
    with torch.no_grad():
        sae.b_dec.add_(1.0)
    assert torch.equal(sae.encode(x).dense(), before)


@pytest.mark.parametrize("with_skip", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_folding_the_normalization_keeps_the_function(case, with_skip):
    sae = make(case, with_skip=with_skip, dtype=torch.float32)
    sae.set_normalization_(torch.linspace(-2, 3, 12), 0.25)
    sae.set_target_normalization_(torch.linspace(-50, 10, sae.config.d_out), 0.05)
    x = 4 * make_batch(sae, 50)
    if case in ("batch_topk", "matryoshka"):
        sae.after_step_(sae.training_loss(sae.normalize(x), make_targets(sae, 50)).code)
    folded = sae.fold_normalization()
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-4, atol=2e-3)
    code, expected = folded.encode(x).dense(), 20 * sae.encode(x).dense()
    torch.testing.assert_close(code, expected, rtol=1e-4, atol=2e-3)
    assert folded.config.normalize_activations == "none"
    assert torch.equal(folded.normalize(x), x)


def test_a_probe_predicts_the_same_once_the_normalization_is_folded():
    sae = make("topk", dtype=torch.float32, probe_loss_coeff=1.0, probe_labels="a", probe_classes=3)
    with torch.no_grad():
        sae.W_probe.normal_()
    sae.set_target_normalization_(torch.zeros(D_OUT), 0.05)
    x = make_batch(sae)
    folded = sae.fold_normalization()
    torch.testing.assert_close(folded.probe(folded.encode(x)), sae.probe(sae.encode(x)))


def test_the_prediction_is_in_the_units_of_the_targets():
    sae = make("topk", dtype=torch.float32)
    mean = torch.linspace(5, 6, D_OUT)
    sae.set_target_normalization_(mean, 0.5)
    x = make_batch(sae, 6).reshape(2, 3, 12)
    y_hat = sae(x)
    assert y_hat.shape == (2, 3, D_OUT)
    rows = x.reshape(-1, 12)
    inner = ops.decode(sae.encode(x), sae.W_dec, sae.b_dec) + rows @ sae.W_skip.t()
    torch.testing.assert_close(y_hat.reshape(-1, D_OUT), inner / 0.5 + mean)


def test_measures_are_of_the_targets_in_their_units():
    sae = make("relu", dtype=torch.float32)
    sae.set_normalization_(torch.linspace(-2, 3, 12), 0.25)
    sae.set_target_normalization_(torch.linspace(5, 6, D_OUT), 0.5)
    x, normalised = make_batch(sae), make_targets(sae)
    y = normalised / 0.5 + sae.target_mean
    trained = sae.training_loss(sae.normalize(x), normalised)
    measured = sae.compute_loss_components(y, sae(x), sae.encode(x))
    for name in ("recon_loss", "l1_loss"):
        assert measured[name] == pytest.approx(float(trained.components[name]), rel=1e-4)
    assert sae.get_reconstruction_error(y, sae(x))["fvu"] == pytest.approx(
        float(trained.components["fvu"]), rel=1e-4
    )


@pytest.mark.parametrize("case", CASES)
def test_saved_models_are_read_back_equal(case, tmp_path):
    sae = make(case, dtype=torch.float32)
    sae.set_target_normalization_(torch.linspace(5, 6, sae.config.d_out), 0.5)
    sae.save(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.config == sae.config
    assert again.state_dict().keys() == sae.state_dict().keys()
    x = make_batch(sae)
    assert torch.equal(again(x), sae(x))
    if case in THRESHOLDED:
        go(again, "sparse")
    loss = again.training_loss(x, make_targets(sae))
    assert torch.equal(loss.total, sae.training_loss(x, make_targets(sae)).total)


@pytest.mark.parametrize("method", ["random", "orthogonal", "kaiming", "active_subspace"])
def test_encoder_and_decoder_start_apart_with_unit_decoder_rows(method):
    config = SAEConfig(
        d_in=12,
        d_sae=40,
        k=5,
        transcoder=True,
        d_out=D_OUT,
        decoder_init=method,
        skip_connection=True,
    )
    sae = SparseAutoencoder(config)
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(12, 3, generator=generator)).Q.t()
    line = torch.linalg.qr(torch.randn(D_OUT, 2, generator=generator)).Q.t()
    sample = torch.randn(200, 3, generator=generator) @ plane
    targets = torch.randn(200, 2, generator=generator) @ line
    assert sample_rows(config) == (96 if method == "active_subspace" else 0)
    sae.initialize_(torch.Generator().manual_seed(1), sample, targets)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert not sae.W_skip.any()
    if method == "kaiming":
        assert sae.W_enc.detach().abs().max() <= 12**-0.5
    else:
        torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.ones(40))
    if method == "active_subspace":
        torch.testing.assert_close(sae.W_enc @ plane.t() @ plane, sae.W_enc.detach())
        torch.testing.assert_close(sae.W_dec @ line.t() @ line, sae.W_dec.detach())
    if method == "orthogonal":
        torch.testing.assert_close(sae.W_enc[:12] @ sae.W_enc[:12].t(), torch.eye(12))
        torch.testing.assert_close(sae.W_dec[:7] @ sae.W_dec[:7].t(), torch.eye(7))


def test_the_bias_starts_at_the_centre_of_the_targets():
    fields = {"d_in": 12, "d_sae": 40, "k": 5, "transcoder": True, "d_out": D_OUT}
    sae = SparseAutoencoder(SAEConfig(**fields, b_dec_init="mean"))
    x, targets = make_batch(sae, 50), make_targets(sae, 50)
    sae.initialize_(None, x, targets)
    torch.testing.assert_close(sae.b_dec.detach(), targets.mean(0))


def test_relation_slots_can_be_those_of_a_transcoder():
    fields = {"n_relations": 3, "slots_mode": "separate_activation", "transcoder": True}
    sae = make_thresholded("slots", dtype=DTYPE, d_out=D_OUT, **fields)
    x, targets = make_batch(sae), make_targets(sae)
    relations = torch.arange(len(x)) % 3
    found = sae.training_loss(x, targets, relations=relations).components
    scores = (x @ sae.W_enc.t() + sae.b_enc)[:, -3:]
    target = D_OUT**0.5 / 2
    wanted = target * torch.nn.functional.one_hot(relations, 3)
    distance = (scores - wanted).square().sum(1).mean().detach()
    assert sae.config.slot_target == pytest.approx(target)
    # The error of predicting the mean, over the squared error of a slot that is off by the target.
    assert sae.config.alignment_coeff == pytest.approx(D_OUT / target**2)
    torch.testing.assert_close(found["alignment_loss"], 4 * distance, **TOLERANCE)
    error = (sae(x) - targets).square().sum(1).mean().detach()
    torch.testing.assert_close(found["recon_loss"], error, **TOLERANCE)


def test_both_widths_may_come_from_the_data():
    config = SAEConfig(arch="jumprelu", transcoder=True, skip_connection=True)
    assert not config.is_complete
    assert not config.with_d_in(8).is_complete
    config = config.with_d_in(8, 4)
    assert (config.d_in, config.d_out, config.d_sae, config.target_width) == (8, 4, 64, 4)
    assert config.is_complete
    assert config.sparsity_penalty_coeff == 4.0
    assert SAEConfig(d_in=8).target_width == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skip_connection": True}, "skip_connection belongs to a transcoder and must be left out"),
        ({"d_out": 5}, "d_out belongs to a transcoder and must be left out .* got 5"),
        ({"transcoder": True, "d_out": -1}, "d_out must be at least 1, or 0 to take it from"),
    ],
)
def test_settings_of_no_transcoder_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(d_in=8, **fields)


def test_a_transcoder_of_another_width_is_refused():
    with pytest.raises(ValueError, match="d_out must be 6, the width of the targets, got 7"):
        SAEConfig(transcoder=True, d_out=7).with_d_in(8, 6)
    with pytest.raises(ValueError, match="d_out must be given, directly or by the data"):
        SparseAutoencoder(SAEConfig(transcoder=True, d_in=8, d_sae=16))


def test_targets_that_do_not_go_with_the_model_are_one_line():
    transcoder, sae = make("topk"), make_sae(dtype=DTYPE)
    x, targets = make_batch(sae), make_targets(transcoder)
    with pytest.raises(ValueError, match="targets must be given: the model is a transcoder"):
        transcoder.training_loss(x)
    with pytest.raises(ValueError, match="targets belong to a transcoder, and this model is none"):
        sae.training_loss(x, x)
    with pytest.raises(
        ValueError, match=r"targets must have d_out = 7 columns, got shape \(30, 12\)"
    ):
        transcoder.training_loss(x, x)
    with pytest.raises(
        ValueError, match="targets must have 30 rows, one for each row of x, got 29"
    ):
        transcoder.training_loss(x, targets[1:])
    with pytest.raises(ValueError, match="x must be given: the model has a skip connection"):
        transcoder.decode(transcoder.encode(x))
    with pytest.raises(ValueError, match="targets belong to a transcoder, and this model is none"):
        sae.set_target_normalization_(torch.zeros(12), 1.0)
    with pytest.raises(ValueError, match=r"mean must have shape \(7,\), got \(12,\)"):
        transcoder.set_target_normalization_(torch.zeros(12), 1.0)


def test_decoding_without_a_skip_connection_needs_no_input():
    sae = make("topk", with_skip=False)
    x = make_batch(sae)
    assert torch.equal(sae.decode(sae.encode(x)), sae(x))


@pytest.mark.skipif(native.load() is None, reason="the reference's sums follow torch's threads")
def test_loss_and_gradient_do_not_depend_on_the_number_of_threads():
    found = []
    threads = torch.get_num_threads()
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        sae = make("topk", with_skip=False, dtype=torch.float32, d_sae=2000, k=32)
        loss = sae.training_loss(make_batch(sae, 3000), make_targets(sae, 3000), dense_grad=False)
        loss.total.backward()
        found.append([loss.total.detach(), *left_gradients(sae).values()])
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))
