"""A SparseCode as an array of tokens: its shape, indexing, conversions and edits."""

import copy
import dataclasses
import pickle

import pytest
import torch
from op_samples import make_code

from sae_fast.ops import SparseCode

LEADING = (4, 5)


@pytest.fixture(params=["topk", "csr"])
def code(request):
    made = make_code(20, 70, 6, csr=request.param == "csr")
    return SparseCode(made.values, made.indices, 70, made.offsets, leading=LEADING, units="raw")


def test_shape_length_dtype_and_device_are_those_of_the_dense_array(code):
    dense = code.dense()
    assert code.shape == dense.shape == (4, 5, 70)
    assert len(code) == len(dense)
    assert (code.dtype, code.device) == (dense.dtype, dense.device)


def test_flat_code_has_one_leading_size(code):
    flat = code.flatten()
    assert flat.shape == (20, 70)
    assert flat.flatten() is flat
    assert torch.equal(flat.dense(), code.dense().reshape(20, 70))
    assert flat.shaped((2, 10)).shape == (2, 10, 70)


def test_reshaped_code_keeps_its_identity(code):
    assert code.flatten().key is code.key
    assert code.shaped((20, 1)).key is code.key


def test_another_number_of_tokens_is_no_shape_of_a_code(code):
    with pytest.raises(ValueError, match=r"leading must have 20 tokens, got shape \(3, 7\)"):
        code.shaped((3, 7))


TOKENS = torch.arange(20).reshape(LEADING)
INDICES = {
    "first": 0,
    "last": -1,
    "token": (2, 3),
    "slice": slice(1, 3),
    "column": (slice(None), -1),
    "ellipsis": (..., 2),
    "new axis": (None, 1),
    "list": [3, 0, 3],
    "tensor": torch.tensor([[1, 2], [3, 0]]),
    "pairs": (torch.tensor([0, 1]), torch.tensor([4, 2])),
    "mask": TOKENS % 3 == 0,
    "nothing": slice(0, 0),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_indexing_by_token_is_indexing_of_the_dense_array(code, index):
    found, expected = code[index], code.dense().reshape(20, 70)[TOKENS[index]]
    assert found.shape == expected.shape
    assert torch.equal(found.dense(), expected)
    assert found.units == "raw"


def test_iteration_gives_the_codes_of_the_first_dimension(code):
    assert [part.shape for part in code] == [(5, 70)] * 4
    assert torch.equal(torch.stack([part.dense() for part in code]), code.dense())


def test_index_of_a_latent_is_refused_with_the_way_to_its_values(code):
    with pytest.raises(IndexError, match=r"code\.latent\(j\) gives the values of latent j"):
        code[1, 2, 3]


def test_code_of_one_token_has_no_length(code):
    with pytest.raises(TypeError, match="a single token"):
        len(code[0, 0])


def test_values_of_a_latent_are_a_column_of_the_dense_array(code):
    for latent in (0, 69, int(code.indices.flatten()[3])):
        assert torch.equal(code.latent(latent), code.dense()[..., latent])
    several = [69, 3, int(code.indices.flatten()[3])]
    assert torch.equal(code.latent(several), code.dense()[..., several])
    assert torch.equal(code.latent(torch.tensor(3)), code.latent(3))
    assert code[0, 0].latent(several).shape == (3,)


def test_sparse_tensor_holds_the_values_other_than_zero(code):
    sparse = code.to_sparse()
    assert sparse.shape == code.shape
    assert torch.equal(sparse.to_dense(), code.dense())
    assert (sparse.values() != 0).all()
    assert torch.equal(code[0, 0].to_sparse().to_dense(), code.dense()[0, 0])


def test_counts_have_the_shape_of_the_tokens(code):
    assert torch.equal(code.l0(), (code.dense() > 0).sum(-1))


@pytest.mark.parametrize("arguments", [(torch.float64,), ("cpu", torch.float64)])
def test_values_change_their_dtype_and_nothing_else(code, arguments):
    found = code.to(*arguments)
    assert found.dtype == torch.float64
    assert torch.equal(found.dense(), code.dense().double())
    assert found.indices.dtype == torch.int32
    assert torch.equal(found.to(code.values).dense(), code.dense())
    assert torch.equal(found.cpu().dense(), found.dense())


def test_converted_and_detached_codes_take_their_aux_along(code):
    aux = SparseCode(torch.ones(20, 2), torch.zeros(20, 2, dtype=torch.int32), 70)
    whole = dataclasses.replace(code, values=code.values.requires_grad_(), aux=aux)
    assert whole.to(torch.float64).aux.dtype == torch.float64
    assert not whole.detach().dense().requires_grad
    assert whole.detach().aux is not None


def edited(dense, latents, function):
    """Return a copy of the dense array with columns replaced by a function of them."""
    dense = dense.clone()
    dense[..., latents] = function(dense[..., latents])
    return dense


def some_latents(code):
    """Return a latent that is listed often and two of which one is listed nowhere."""
    often = int(code.indices.flatten().mode().values)
    counts = torch.bincount(code.indices.flatten(), minlength=70)
    return often, int(counts.argmin())


@pytest.mark.parametrize("value", [0, 2.5, -1.0])
def test_set_gives_a_latent_a_value_for_every_token(code, value):
    for latent in some_latents(code):
        found = code.set(latent, value)
        expected = edited(code.dense(), latent, lambda x: torch.full_like(x, value))
        assert torch.equal(found.dense(), expected)
        assert torch.equal(found.latent(latent), expected[..., latent])
        found.check()


def test_set_takes_a_value_for_every_token_and_several_latents(code):
    latents = list(some_latents(code))
    by_token = torch.randn(*LEADING)
    found = code.set(latents[0], by_token)
    assert torch.equal(found.dense(), edited(code.dense(), latents[0], lambda x: by_token))
    by_latent = torch.tensor([3.0, -4.0])
    for given in (by_latent, by_latent * torch.ones(*LEADING, 2), by_token[..., None]):
        found = code.set(torch.tensor(latents), given)
        expected = edited(code.dense(), latents, lambda x, given=given: given.expand_as(x))
        assert torch.equal(found.dense(), expected)
    assert torch.equal(code.set(latents, 0).dense(), edited(code.dense(), latents, lambda x: 0 * x))


def test_scaled_multiplies_the_values_of_latents(code):
    latents = list(some_latents(code))
    assert torch.equal(
        code.scaled(latents[0], -3.0).dense(), edited(code.dense(), latents[0], lambda x: x * -3)
    )
    factors = torch.rand(*LEADING, 2)
    found = code.scaled(latents, factors)
    assert torch.equal(found.dense(), edited(code.dense(), latents, lambda x: x * factors))


def test_edits_to_negative_values_count_as_active(code):
    latent = some_latents(code)[0]
    found = code.set(latent, -1.0)
    assert torch.equal(found.l0(), (found.dense() != 0).sum(-1)) or not (code.values < 0).any()
    assert found.fired()[latent]


def test_mask_keeps_tokens_and_latents(code):
    tokens = torch.rand(LEADING, generator=torch.Generator().manual_seed(0)) > 0.5
    latents = torch.arange(70) % 3 == 0
    dense = code.dense()
    assert torch.equal(code.mask(tokens=tokens).dense(), dense * tokens[..., None])
    assert torch.equal(code.mask(tokens=tokens[:, :1]).dense(), dense * tokens[:, :1, None])
    assert torch.equal(code.mask(latents=latents).dense(), dense * latents)
    assert torch.equal(code.mask(latents=latents.nonzero().flatten()).dense(), dense * latents)
    both = code.mask(tokens=tokens, latents=latents)
    assert torch.equal(both.dense(), dense * latents * tokens[..., None])
    assert torch.equal(code.mask().dense(), dense)


def test_edits_leave_the_code_itself_alone(code):
    before = code.dense()
    latent = some_latents(code)[0]
    for other in (code.set(latent, 5.0), code.scaled(latent, 5.0), code.mask(latents=[latent])):
        assert other.key is not code.key
        assert (other.units, other.shape) == (code.units, code.shape)
    assert torch.equal(code.dense(), before)


def test_gradients_pass_through_edits(code):
    latents = list(some_latents(code))
    values = code.values.double().requires_grad_()
    given = torch.randn(*LEADING, 2, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(*LEADING, dtype=torch.float64, requires_grad=True)

    def function(values, given, factor):
        own = dataclasses.replace(code, values=values)
        found = (
            own.scaled(latents[0], factor).set(latents[1], given[..., 0])[1:].dense().sum((0, 1))
        )
        return found + own.set(latents, given).mask(latents=range(60)).dense().sum((0, 1))

    assert torch.autograd.gradcheck(function, (values, given, factor))


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (70, "latent must be 0 to 69, got 70"),
        (-1, "latent must be 0 to 69, got -1"),
        ([3, 99], "latent must be 0 to 69, got 99"),
        ([3, 3], "latent must name each latent once"),
        (1.5, "latent must be a whole number, got 1.5"),
        (torch.tensor([1.0]), "latent must be whole numbers, got a tensor of torch.float32"),
    ],
)
def test_edit_of_no_latent_is_refused(code, latent, message):
    for edit in (lambda: code.set(latent, 1.0), lambda: code.scaled(latent, 2.0)):
        with pytest.raises(IndexError, match=message):
            edit()


def test_values_that_do_not_broadcast_are_refused(code):
    with pytest.raises(ValueError, match=r"value must broadcast to shape \(4, 5\), got \(7,\)"):
        code.set(3, torch.ones(7))
    with pytest.raises(ValueError, match=r"factor must broadcast to shape \(4, 5, 2\)"):
        code.scaled([3, 4], torch.ones(3))
    with pytest.raises(ValueError, match=r"tokens must broadcast to shape \(4, 5\), got \(3,\)"):
        code.mask(tokens=[True, False, True])
    with pytest.raises(ValueError, match=r"latents must have shape \(70,\), got \(3,\)"):
        code.mask(latents=torch.tensor([True, False, True]))


def test_repr_names_shape_and_units_without_the_numbers(code):
    text = f"SparseCode(shape=(4, 5, 70), {code.n_listed} entries, raw units"
    assert repr(code).startswith(text)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda code: pickle.loads(pickle.dumps(code))]
)
def test_code_is_copied_whole(code, duplicate):
    code.latent_major()
    other = duplicate(code)
    assert torch.equal(other.dense(), code.dense())
    assert (other.shape, other.units, other.precision) == (code.shape, code.units, code.precision)
