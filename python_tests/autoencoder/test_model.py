import copy

import pytest
import torch
from plain_sae import make_batch, make_sae

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig


def set_some_normalization(sae):
    mean = torch.linspace(-2, 3, sae.config.d_in)
    sae.set_normalization_(mean, 0.25)
    return mean


def test_new_model_has_short_rows_along_unit_rows_and_zero_biases():
    sae = SparseAutoencoder(SAEConfig(d_in=12, d_sae=40, k=4))
    torch.testing.assert_close(sae.W_enc, 0.3 * sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_model_of_open_size_is_refused():
    with pytest.raises(ValueError, match="d_in must be given"):
        SparseAutoencoder(SAEConfig())


def test_forward_reconstructs_in_raw_units_and_the_shape_of_its_input():
    sae = make_sae()
    mean = set_some_normalization(sae)
    x = make_batch(sae, 6) * 4 + mean
    normalized = (x - mean) * 0.25
    values, indices = ((normalized - sae.b_dec) @ sae.W_enc.t() + sae.b_enc).topk(5)
    acts = torch.zeros(6, 40).scatter(1, indices, values.relu())
    expected = (acts @ sae.W_dec + sae.b_dec) / 0.25 + mean
    torch.testing.assert_close(sae(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sae(x.reshape(2, 3, 12)), expected.reshape(2, 3, 12), rtol=1e-5, atol=1e-5
    )


def test_decode_of_encode_is_forward():
    sae = make_sae()
    set_some_normalization(sae)
    x = make_batch(sae)
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x))


@pytest.mark.parametrize(
    "fields", [{}, {"arch": "relu", "k": None}, {"transcoder": True, "d_out": 7}]
)
def test_dense_code_is_decoded_as_the_sparse_one(fields):
    sae = make_sae(**fields)
    if not sae.config.transcoder:
        set_some_normalization(sae)
    code = sae.encode(make_batch(sae, 6))
    torch.testing.assert_close(sae.decode(code.dense()), sae.decode(code), rtol=1e-5, atol=1e-5)
    dense = code.dense().reshape(2, 3, 40)
    assert torch.equal(sae.decode(dense).flatten(0, 1), sae.decode(code.dense()))


def test_dense_code_is_decoded_with_its_skip_connection():
    sae = make_sae(transcoder=True, d_out=7, skip_connection=True)
    x = make_batch(sae, 6).reshape(2, 3, 12)
    code = sae.encode(x)
    expected = sae.decode(code, x).reshape(2, 3, 7)
    found = sae.decode(code.dense().reshape(2, 3, 40), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="x must be given"):
        sae.decode(code.dense())


def test_gradients_of_a_dense_code_are_those_of_its_matrix_product():
    sae = make_sae(dtype=torch.float64)
    h = torch.rand(4, 40, dtype=torch.float64).requires_grad_()
    weight = torch.rand(4, 12, dtype=torch.float64)
    (sae.decode(h) * weight).sum().backward()
    torch.testing.assert_close(h.grad, weight @ sae.W_dec.t())
    torch.testing.assert_close(sae.W_dec.grad, h.t() @ weight)
    torch.testing.assert_close(sae.b_dec.grad, weight.sum(0))


def test_dense_code_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"h must have d_sae = 40 columns, got shape \(3, 12\)"):
        make_sae().decode(torch.zeros(3, 12))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"normalize_activations": "none"},
        {"arch": "relu", "k": None},
        {"transcoder": True, "d_out": 7},
    ],
)
def test_one_unit_of_a_code_value_adds_the_direction_of_its_latent(fields):
    sae = make_sae(**fields).requires_grad_(False)
    if sae.config.transcoder:
        sae.set_target_normalization_(torch.linspace(-1, 1, 7), 0.2)
    if sae.config.normalize_activations != "none":
        set_some_normalization(sae)
    h = sae.encode(make_batch(sae, 3)).dense()
    before = sae.decode(h)
    h[:, 11] += 1
    added = sae.decode(h) - before
    direction = sae.direction(11)
    torch.testing.assert_close(added, direction.expand_as(added), rtol=1e-4, atol=1e-5)
    assert torch.equal(sae.direction(torch.tensor([[11, 4]]))[0, 0], direction)
    assert torch.equal(sae.fold_normalization().direction(11), sae.W_dec[11])


@pytest.mark.parametrize("precision", ["screened", "bf16"])
def test_weights_changed_through_data_are_those_of_the_next_call(precision):
    sae = make_sae()
    x = make_batch(sae)
    sae.encode(x, precision=precision)
    sae.W_enc.data.mul_(torch.rand(len(sae.W_enc), 1) * 4)
    sae.W_dec.data.neg_()
    sae.b_dec.data.add_(1)
    code, expected = (model.encode(x, precision=precision) for model in (sae, copy.deepcopy(sae)))
    assert torch.equal(code.indices, expected.indices)
    assert torch.equal(code.values, expected.values)
    assert torch.equal(sae.decode(code), copy.deepcopy(sae).decode(expected))


def test_kept_copies_change_no_result():
    sae = make_sae()
    x = make_batch(sae)
    expected = sae(x)
    with sae.kept_copies():
        assert torch.equal(sae(x), expected)
        assert torch.equal(sae(x), expected)


def test_half_precision_activations_are_taken():
    sae = make_sae()
    x = make_batch(sae).half()
    assert torch.equal(sae(x), sae(x.float()).half())


def test_no_tokens_give_no_reconstruction():
    sae = make_sae()
    assert sae(torch.empty(0, 12)).shape == (0, 12)


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"x must have d_in = 12 columns, got shape \(3, 7\)"):
        make_sae().encode(torch.zeros(3, 7))


def test_normalization_where_none_is_configured_is_refused():
    sae = make_sae(normalize_activations="none")
    with pytest.raises(ValueError, match="normalize_activations = 'none'"):
        sae.set_normalization_(torch.zeros(12), 1.0)


@pytest.mark.parametrize(
    ("mean", "scale", "message"),
    [
        (torch.zeros(7), 1.0, r"mean must have shape \(12,\), got \(7,\)"),
        (torch.zeros(12), 0.0, "scale greater than 0, got scale 0"),
        (torch.zeros(12), float("nan"), "scale greater than 0, got scale nan"),
        (torch.full((12,), torch.inf), 1.0, "mean must be finite"),
    ],
)
def test_bad_normalization_is_refused(mean, scale, message):
    with pytest.raises(ValueError, match=message):
        make_sae().set_normalization_(mean, scale)


def test_folded_model_is_the_same_function_without_normalization():
    sae = make_sae(dead=(3,))
    mean = set_some_normalization(sae)
    folded = sae.fold_normalization()
    x = make_batch(sae) * 4 + mean
    assert folded.config.normalize_activations == "none"
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        folded.encode(x).dense(), sae.encode(x).dense() / 0.25, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(folded.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))


def test_latent_that_fires_counts_silent_tokens_from_zero():
    sae = make_sae()
    sae.tokens_since_fired.fill_(7)
    x = make_batch(sae, 3)
    code = sae.encode(x)
    sae.update_fired_(code, 3)
    fired = (code.dense() > 0).any(0)
    assert fired.any()
    assert torch.equal(sae.tokens_since_fired, torch.where(fired, 0, 10))


def test_listed_latent_with_value_zero_has_not_fired():
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    sae.update_fired_(sae.encode(make_batch(sae)), 30)
    assert torch.equal(sae.tokens_since_fired, torch.full((40,), 30))


def test_latent_is_dead_from_dead_after_tokens_on():
    sae = make_sae()
    sae.tokens_since_fired[:3] = torch.tensor([99, 100, 101])
    assert sae.dead_mask()[:4].tolist() == [False, True, True, False]


def test_same_seed_gives_the_same_start():
    first, second = make_sae(seed=3), make_sae(seed=3)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_state_dict_round_trip_is_exact():
    sae, other = make_sae(seed=3, dead=(2,)), make_sae(seed=4)
    set_some_normalization(sae)
    other.load_state_dict(sae.state_dict())
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize(
    "call",
    [
        lambda sae, x: sae(x),
        lambda sae, x: sae.encode(x),
        lambda sae, x: sae.decode(sae.encode(torch.from_numpy(x)).dense().detach().numpy()),
        lambda sae, x: sae.training_loss(x),
        lambda sae, x: sae.get_reconstruction_error(x, x),
    ],
)
def test_an_array_is_refused_in_a_line_that_names_the_remedy(call):
    sae = make_sae()
    x = make_batch(sae).numpy()
    with pytest.raises(TypeError, match=r"must be a tensor, got ndarray: torch\.from_numpy makes"):
        call(sae, x)
    with pytest.raises(TypeError, match=r"x must be a tensor, got list"):
        sae.encode(x.tolist())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "SparseAutoencoder(topk, d_in=12, d_sae=40, k=5)"),
        ({"arch": "relu", "k": None}, "SparseAutoencoder(relu, d_in=12, d_sae=40)"),
        (
            {"transcoder": True, "d_out": 7},
            "SparseAutoencoder(topk, d_in=12, d_out=7, d_sae=40, k=5)",
        ),
    ],
)
def test_repr_names_architecture_and_sizes(fields, text):
    sae = make_sae(**fields)
    assert repr(sae) == text
    assert repr(sae.bfloat16()) == text.replace(")", ", bfloat16)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.to("meta"), "x must hold numbers, got a tensor on the meta device"),
        (
            lambda x: x.to_sparse(),
            r"x is a sparse tensor, sparse_coo: x\.to_dense",
        ),
        (
            lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            r"x is quantised, torch\.qint8: x\.dequantize\(\) can be taken",
        ),
        (lambda x: x + 0j, "x must be real numbers, got torch.complex64"),
    ],
    ids=["meta", "sparse", "quantised", "complex"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates quantised tensors
@pytest.mark.parametrize("call", ["encode", "__call__", "run"])
def test_activations_of_another_kind_are_refused_by_name(call, make, message):
    sae = SparseAutoencoder(SAEConfig(d_in=8, d_sae=16, k=2))
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(sae, call)(make(torch.randn(3, 8)))
