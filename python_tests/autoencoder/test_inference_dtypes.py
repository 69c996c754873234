"""Models in bfloat16, float16 and float64 for inference."""

import pytest
import torch
from every_model import FORMS, make_form, make_raw

NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("form", FORMS)
def test_double_is_the_same_function_in_float64(form):
    sae = make_form(form)
    x = make_raw(sae, 5, 4)
    wide = make_form(form).double()
    assert wide.dtype == torch.float64
    code, x_hat = wide.encode(x), wide(x.double())
    assert code.dtype == x_hat.dtype == torch.float64
    expected = sae.encode(x).dense()
    torch.testing.assert_close(code.dense().float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_hat.float(), sae(x), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(wide.decode(code.dense(), x), wide.decode(code, x))
    if sae.config.has_probe:
        torch.testing.assert_close(wide.probe(code).float(), sae.probe(sae.encode(x)))


def test_float64_code_is_exact():
    sae = make_form("topk", torch.float64)
    x = make_raw(sae, 9)
    rows = (x - sae.activation_mean) * sae.activation_scale - sae.b_dec
    values, indices = (rows @ sae.W_enc.t() + sae.b_enc).topk(5)
    code = sae.encode(x)
    assert torch.equal(code.indices.long(), indices)
    torch.testing.assert_close(code.values, values.relu(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["topk", "abs_topk", "groupmax", "relu", "jumprelu", "gated"])
def test_gradients_of_float64_activations_agree_with_finite_differences(form):
    sae = make_form(form, torch.float64)
    x = make_raw(sae, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae.decode(sae.encode(x)), (x,), eps=1e-5)
    assert torch.autograd.gradcheck(lambda x: sae.encode(x).dense(), (x,), eps=1e-5)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("form", FORMS)
def test_narrow_model_is_the_float32_model_of_its_rounded_parameters(form, dtype):
    narrow, x = make_form(form).to(dtype), make_raw(make_form(form), 5, 4)
    rounded = make_form(form)
    with torch.no_grad():
        for tensor, own in zip(rounded.parameters(), narrow.parameters(), strict=True):
            assert own.dtype == dtype
            tensor.copy_(own)
    assert narrow.dtype == dtype
    code = narrow.encode(x)
    assert torch.equal(code.dense(), rounded.encode(x).dense())
    torch.testing.assert_close(narrow(x), rounded(x), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(
        narrow.decode(code.dense(), x), rounded.decode(code, x), rtol=1e-5, atol=1e-3
    )
    if narrow.config.has_probe:
        torch.testing.assert_close(narrow.probe(code), rounded.probe(code))


@pytest.mark.parametrize("dtype", NARROW)
def test_mean_scale_and_thresholds_stay_float32_in_16_bits(dtype):
    sae = make_form("batch_topk")
    before = {name: tensor.clone() for name, tensor in sae.named_buffers()}
    sae.to(dtype)
    for name, tensor in sae.named_buffers():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == before[name].dtype
    assert sae.float().dtype == torch.float32


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16()])
def test_narrow_activations_go_through_a_narrow_model(convert):
    sae = convert(make_form("jumprelu"))
    x = make_raw(sae, 2, 3)
    assert x.dtype == sae.dtype
    assert sae(x).dtype == x.dtype
    assert sae.encode(x).dtype == torch.float32
    assert sae(x).isfinite().all()


def test_kept_copies_of_a_narrow_model_change_no_result():
    sae = make_form("topk").bfloat16()
    x = make_raw(sae, 20)
    expected = sae(x)
    with sae.kept_copies():
        assert torch.equal(sae(x), expected)
        assert torch.equal(sae(x), expected)
        sae.W_enc.mul_(2)
        sae.b_dec.add_(0.5)
        changed = sae(x)
    assert torch.equal(sae(x), changed)
    assert not torch.equal(changed, expected)


def test_gradients_reach_the_parameters_of_a_narrow_model():
    sae = make_form("topk").bfloat16().requires_grad_(True)
    x = make_raw(sae, 6).float()
    sae(x).square().sum().backward()
    wide = make_form("topk").bfloat16().float().requires_grad_(True)
    wide(x).square().sum().backward()
    for one, other in zip(sae.parameters(), wide.parameters(), strict=True):
        assert one.grad.dtype == torch.bfloat16
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=2e-2, atol=1e-2)


def test_training_a_narrow_model_is_refused():
    sae = make_form("topk").bfloat16()
    with pytest.raises(ValueError, match=r"training needs float32 parameters, got bfloat16"):
        sae.training_loss(torch.randn(6, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_model_is_saved_and_read_as_its_rounded_parameters(tmp_path, dtype):
    sae = make_form("jumprelu").to(dtype)
    sae.save(tmp_path)
    loaded = type(sae).from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    x = make_raw(loaded, 4)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-3)
    again = type(sae).from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(again(x), sae(x))
