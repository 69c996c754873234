"""encode and decode keep the shape of the tokens; x_hat has x's shape, dtype and device."""

import pytest
import torch
from every_model import FORMS, make_form, make_raw

SHAPES = {"one": (), "flat": (6,), "sequences": (2, 3), "many": (1, 2, 1, 3), "none": (2, 0)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", ["topk", "jumprelu", "relu, signed", "skip transcoder"])
def test_code_and_reconstruction_have_the_shape_of_the_tokens(form, shape):
    sae = make_form(form)
    x = make_raw(sae, *shape)
    code = sae.encode(x)
    width = sae.config.target_width
    assert code.shape == code.dense().shape == (*shape, 40)
    assert code.l0().shape == shape
    x_hat = sae.decode(code, x)
    assert x_hat.shape == sae(x).shape == (*shape, width)
    flat = x.reshape(-1, 12)
    assert torch.equal(code.dense().reshape(-1, 40), sae.encode(flat).dense())
    assert torch.equal(x_hat.reshape(-1, width), sae.decode(sae.encode(flat), flat))


@pytest.mark.parametrize("form", FORMS)
def test_sparse_and_dense_codes_are_decoded_equally_edited_or_not(form):
    sae = make_form(form)
    x = make_raw(sae, 2, 3)
    code = sae.encode(x)
    for own in (
        code,
        code.set(7, 4.0),
        code.set([0, 39], 0),
        code.scaled(3, 2.0).mask(latents=[3]),
    ):
        expected = sae.decode(own.dense(), x)
        torch.testing.assert_close(sae.decode(own, x), expected, rtol=1e-5, atol=1e-4)
    # A library product of one row may add in another order than a product of several.
    edited = code.set(7, 4.0)
    torch.testing.assert_close(sae.decode(edited, x)[1], sae.decode(edited[1], x[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["topk", "skip transcoder"])
def test_reconstruction_has_the_dtype_of_the_activations(form, dtype):
    sae = make_form(form)
    x = make_raw(sae, 2, 3).to(dtype)
    expected = sae.decode(sae.encode(x), x).to(dtype)
    for found in (sae(x), sae.forward_with_code(x)[0]):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_whole_numbers_are_reconstructed_as_numbers():
    sae = make_form("topk")
    x = make_raw(sae, 4).round()
    assert torch.equal(sae(x.int()), sae(x))


def test_probe_predicts_in_the_shape_of_the_tokens():
    sae = make_form("probe")
    x = make_raw(sae, 2, 3)
    assert torch.equal(
        sae.probe(sae.encode(x)).reshape(6, 3), sae.probe(sae.encode(x.reshape(6, 12)))
    )


def test_metrics_take_a_code_with_leading_shape():
    sae = make_form("topk")
    x = make_raw(sae, 2, 3)
    code, flat = sae.encode(x), x.reshape(6, 12)
    found = sae.compute_loss_components(x, sae(x), code)
    expected = sae.compute_loss_components(flat, sae(flat), sae.encode(flat))
    assert found == expected
    assert sae.get_activation_stats(code) == sae.get_activation_stats(sae.encode(flat))


def test_gradients_reach_activations_and_parameters_through_a_shaped_code():
    sae = make_form("topk").requires_grad_(True)
    x = make_raw(sae, 2, 3).requires_grad_()
    sae(x).square().sum().backward()
    found = [x.grad.clone(), *(p.grad.clone() for p in sae.parameters())]
    sae.zero_grad()
    x.grad = None
    flat = x.reshape(6, 12)
    sae.decode(sae.encode(flat)).square().sum().backward()
    for one, other in zip(found, [x.grad, *(p.grad for p in sae.parameters())], strict=True):
        assert torch.equal(one, other)


def test_row_factors_of_a_shaped_code_share_its_key():
    sae = make_form("topk").requires_grad_(True)
    code = sae.encode(make_raw(sae, 2, 3), dense_grad=False)
    sae.decode(code, dense_grad=False).square().sum().backward()
    keys = {W.row_factors[0].code_key for W in (sae.W_enc, sae.W_dec)}
    assert keys == {code.key}


def test_codes_in_other_forms_are_decoded():
    sae = make_form("jumprelu")
    x = make_raw(sae, 2, 3)
    for units in ("normalized", "raw"):
        code = sae.encode(x, units=units)
        expected = sae.decode(code)
        found = sae.decode(code.to_sparse(), units=units)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 1e-1)):
            found = sae.decode(code.to(dtype))
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=20 * tolerance)
            found = sae.decode(code.dense().to(dtype), units=units)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=20 * tolerance)


def test_dense_code_of_a_training_step_is_decoded_and_probed():
    sae = make_form("probe", arch="jumprelu", k=None)
    x = make_raw(sae, 6)
    code = sae.training_loss(sae.normalize(x), labels=torch.zeros(6, dtype=torch.int64)).code
    assert type(code).__name__ == "DenseCode"
    torch.testing.assert_close(sae.decode(code), sae.decode(code.dense()))
    torch.testing.assert_close(sae.probe(code), sae.probe(code.listed()))


class TestRun:
    @pytest.mark.parametrize("form", FORMS)
    def test_run_gives_reconstruction_code_and_losses(self, form):
        sae = make_form(form)
        x = make_raw(sae, 2, 3)
        targets = torch.randn(2, 3, 7) if sae.config.transcoder else None
        x_hat, code, losses = sae.run(x, targets)
        assert torch.equal(x_hat, sae(x))
        assert torch.equal(code.dense(), sae.encode(x).dense())
        wanted = x if targets is None else targets
        expected = sae.compute_loss_components(wanted, x_hat, code)
        expected |= sae.get_reconstruction_error(wanted, x_hat)
        expected["l0"] = float((code.dense() != 0).sum(-1).double().mean())
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-5)

    def test_losses_are_those_before_rounding_to_the_dtype_of_the_activations(self):
        sae = make_form("topk")
        x = make_raw(sae, 2, 3).bfloat16()
        assert sae.run(x).x_hat.dtype == torch.bfloat16
        assert sae.run(x).losses["mse"] == sae.run(x.float()).losses["mse"]

    def test_loss_of_a_trainable_model_can_be_minimised(self):
        sae = make_form("topk").requires_grad_(True)
        sae.run(make_raw(sae, 6)).loss.backward()
        assert sae.W_enc.grad.any()
        assert sae.W_dec.grad.any()

    def test_targets_go_with_transcoders_only(self):
        with pytest.raises(ValueError, match="targets must be given"):
            make_form("transcoder").run(torch.zeros(2, 12))
        with pytest.raises(ValueError, match="targets belong to a transcoder"):
            make_form("topk").run(torch.zeros(2, 12), torch.zeros(2, 12))


@pytest.mark.parametrize(
    "call",
    [
        lambda sae, pair: sae(pair),
        lambda sae, pair: sae.encode(pair),
        lambda sae, pair: sae.run(pair),
        lambda sae, pair: sae.decode(pair),
    ],
)
def test_a_tuple_is_refused_with_the_part_to_name(call):
    sae = make_form("topk")
    pair = make_raw(sae, 2, 3), None
    with pytest.raises(TypeError, match=r"got a tuple of 2 \(Tensor, NoneType\): name the part"):
        call(sae, pair)


def test_unpacking_a_call_names_the_calls_that_give_more():
    sae = make_form("topk")
    with pytest.raises(TypeError, match=r"x_hat, code, losses = sae\.run\(x\) the losses too"):
        _x_hat, _code = sae(make_raw(sae, 2))


def test_code_of_another_model_is_refused():
    sae = make_form("topk")
    code = sae.encode(make_raw(sae, 2, 3))
    with pytest.raises(ValueError, match="code must have 50 latents as the model has, got 40"):
        make_form("topk", d_sae=50).decode(code)


def test_reconstruction_returns_to_the_device_of_the_activations(cuda_device):
    sae = make_form("topk").to(cuda_device)
    x = make_raw(sae, 2, 3).cpu()
    assert sae(x).device == x.device
    assert sae.encode(x).device == sae.device
    assert sae.encode(x).cpu().dense().device == x.device
    torch.testing.assert_close(sae(x.to(cuda_device)).cpu(), sae(x))
