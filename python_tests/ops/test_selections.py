"""encode_abs_topk and encode_groupmax against their plain forms in float64."""

import pytest
import torch
from encoding_oracle import pre_activations
from op_samples import Problem
from tolerances import close

from sae_fast import ops
from sae_fast.ops.reference.chunks import CHUNK_ELEMENTS

SELECTIONS = {"abs_topk": ops.encode_abs_topk, "groupmax": ops.encode_groupmax}


def arguments(n_rows=50, d_in=20, d_sae=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_rows, d_in), (d_sae, d_in), (d_sae,), (d_in,)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def oracle(tensors, precision="fp32"):
    """Return pre-activations [N, F] in float64, and the magnitude of their terms."""
    x, W_enc, b_enc, b_dec = tensors
    return pre_activations(Problem(x, W_enc, b_enc, W_enc, b_dec), precision)


def chosen(pre_acts, k, selection):
    """Return the mask [N, F] of the selected latents."""
    if selection == "groupmax":
        groups = pre_acts.unflatten(1, (k, -1))
        return (groups == groups.amax(dim=2, keepdim=True)).flatten(1)
    places = pre_acts.abs().topk(k, dim=1).indices
    return torch.zeros_like(pre_acts, dtype=torch.bool).scatter(1, places, True)


@pytest.mark.parametrize("k", [1, 6, 60])
@pytest.mark.parametrize("precision", ["screened", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_code_is_that_of_the_plain_form(selection, precision, k):
    tensors = arguments()
    code = SELECTIONS[selection](*tensors, k, precision=precision)
    pre_acts, magnitude = oracle(tensors, precision)
    expected = torch.where(chosen(pre_acts, k, selection), pre_acts, 0.0)
    if selection == "groupmax":
        expected = expected.relu()
    close(code.dense(), expected, terms=20, magnitude=magnitude)
    assert code.values.shape == code.indices.shape == (50, k)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_aux_is_chosen_among_the_dead(selection):
    tensors = arguments()
    dead = torch.zeros(60, dtype=torch.bool)
    dead[[3, 4, 17, 30, 59]] = True
    code = SELECTIONS[selection](*tensors, 6, dead_mask=dead, k_aux=3)
    is_signed = selection == "abs_topk"
    pre_acts, magnitude = (matrix[:, dead] for matrix in oracle(tensors))
    scores = pre_acts.abs() if is_signed else pre_acts
    values = pre_acts.gather(1, scores.topk(3, dim=1).indices)
    expected = values if is_signed else values.relu()
    close(code.aux.values, expected, terms=20, magnitude=magnitude.amax(1, keepdim=True))
    assert dead[code.aux.indices.long()].all()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_room_for_more_dead_latents_than_there_are_is_left_empty(selection):
    tensors = arguments()
    dead = torch.zeros(60, dtype=torch.bool)
    dead[17] = True
    aux = SELECTIONS[selection](*tensors, 6, dead_mask=dead, k_aux=4).aux
    assert aux.indices[:, 0].eq(17).all()
    assert not aux.values[:, 1:].any()


def test_abs_topk_is_ordered_by_magnitude_positive_and_lower_index_first():
    x = torch.ones(1, 1)
    W_enc = torch.tensor([[-2.0], [1.0], [2.0], [-3.0], [0.0], [-2.0], [2.0]])
    zeros = torch.zeros(7), torch.zeros(1)
    code = ops.encode_abs_topk(x, W_enc, *zeros, 6)
    assert code.indices.tolist() == [[3, 2, 6, 0, 5, 1]]
    assert code.values.tolist() == [[-3.0, 2.0, 2.0, -2.0, -2.0, 1.0]]


def test_abs_topk_keeps_nan_and_has_no_negative_zero():
    x = torch.tensor([[1.0], [torch.nan], [0.0]])
    zeros = torch.zeros(4), torch.zeros(1)
    W_enc = torch.tensor([[1.0], [-1.0], [2.0], [0.5]])
    values = ops.encode_abs_topk(x, W_enc, *zeros, 2).values
    assert values[1].isnan().all()
    assert not torch.signbit(values[2]).any()


def test_groupmax_takes_the_lower_index_of_equal_values():
    x = torch.ones(1, 1)
    W_enc = torch.tensor([[1.0], [2.0], [2.0], [-1.0], [-1.0], [-1.0]])
    code = ops.encode_groupmax(x, W_enc, torch.zeros(6), torch.zeros(1), 2)
    assert code.indices.tolist() == [[1, 3]]
    assert code.values.tolist() == [[2.0, 0.0]]


def test_groupmax_in_chunks_is_groupmax():
    d_sae = 8192
    n_rows = CHUNK_ELEMENTS // d_sae + 3
    tensors = arguments(n_rows, 4, d_sae)
    code = ops.encode_groupmax(*tensors, 64)
    alone = ops.encode_groupmax(tensors[0][-2:], *tensors[1:], 64)
    assert torch.equal(code.indices[-2:], alone.indices)
    torch.testing.assert_close(code.values[-2:], alone.values)


@pytest.mark.parametrize("dense_grad", [True, False])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradient_equals_autograd(selection, dense_grad):
    tensors = arguments()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    code = SELECTIONS[selection](*leaves, 6, dense_grad=dense_grad)
    side = torch.linspace(-1, 1, 300).view(50, 6)
    (side * code.values).sum().backward()
    found = [leaf.grad for leaf in leaves]
    if not dense_grad:
        (factor,) = leaves[1].row_factors
        entries = (factor.coefficients, factor.indices, factor.offsets)
        found[1] = ops.accumulate_rows(*entries, factor.dense - factor.shift, 60)[0]
    plain = [tensor.double().requires_grad_() for tensor in tensors]
    pre_acts = (plain[0] - plain[3]) @ plain[1].t() + plain[2]
    values = pre_acts.gather(1, code.indices.long())
    if selection == "groupmax":
        values = values.relu()
    (side * values).sum().backward()
    for gradient, leaf in zip(found, plain, strict=True):
        close(gradient, leaf.grad, terms=300, magnitude=100.0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_tokens_have_an_empty_code(selection):
    x, *others = arguments()
    dead = torch.ones(60, dtype=torch.bool)
    code = SELECTIONS[selection](x[:0], *others, 6, dead_mask=dead, k_aux=2)
    assert code.values.shape == (0, 6)
    assert code.aux.values.shape == (0, 2)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_bad_argument_is_named(selection):
    x, W_enc, b_enc, b_dec = arguments()
    with pytest.raises(RuntimeError, match="b_enc must have shape"):
        SELECTIONS[selection](x, W_enc, b_enc[:-1], b_dec, 6)
    with pytest.raises(RuntimeError, match="precision must be"):
        SELECTIONS[selection](x, W_enc, b_enc, b_dec, 6, precision="int4")


@pytest.mark.parametrize("k", [0, 7, 61])
def test_groups_of_unequal_size_are_refused(k):
    with pytest.raises(RuntimeError, match=f"k must divide d_sae = 60, got {k}"):
        ops.encode_groupmax(*arguments(), k)


@pytest.mark.parametrize("has_view", [True, False])
def test_negative_value_fires_in_a_signed_code_only(has_view):
    values = torch.tensor([[1.0, -2.0], [0.0, -0.5]])
    indices = torch.tensor([[0, 2], [3, 4]], dtype=torch.int32)
    for signed, fired, l0 in (
        (True, [True, False, True, False, True], [2, 1]),
        (False, [True, False, False, False, False], [1, 0]),
    ):
        code = ops.SparseCode(values, indices, 5, signed=signed)
        if has_view:
            code.latent_major()
        assert code.fired().tolist() == fired
        assert code.l0().tolist() == l0
