import copy
import io

import pytest
import torch
from op_samples import LOW, PRECISIONS, make_problem, update_scalars
from tolerances import close

from sae_fast import ops
from sae_fast.ops.working_copies import (
    copies_to_refresh,
    decoder_copy,
    encoder_copy,
    frozen_copy,
)

pytestmark = pytest.mark.usefixtures("default_device")


@pytest.fixture
def W(default_device):
    """Make a weight matrix whose working copies are kept."""
    matrix = torch.nn.Parameter(make_problem().W_dec)
    with ops.kept_copies(matrix):
        yield matrix


@pytest.fixture
def unkept(default_device):
    return torch.nn.Parameter(make_problem().W_dec)


def same_tensors(first, second):
    return all(a is b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_encoder_copy_is_made_once(W, precision):
    assert same_tensors(encoder_copy(W, precision), encoder_copy(W, precision))


def test_encoder_copy_is_made_anew_for_another_precision(W):
    first = encoder_copy(W, "screened")
    assert not same_tensors(first, encoder_copy(W, "fp32"))


CHANGES = {
    "in place": lambda W: W.mul_(2),
    "copy_": lambda W: W.copy_(torch.ones_like(W)),
    "one element": lambda W: W[0].zero_(),
    "new storage": lambda W: setattr(W, "data", torch.ones_like(W)),
    "normalize_rows_": ops.normalize_rows_,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_copies_follow_changes_of_the_parameter(W, change):
    encoder, decoder = encoder_copy(W, "bf16"), decoder_copy(W, "bf16")
    with torch.no_grad():
        change(W)
    assert not same_tensors(encoder, encoder_copy(W, "bf16"))
    assert decoder_copy(W, "bf16") is not decoder
    assert torch.equal(decoder_copy(W, "bf16"), W.detach().bfloat16())


def by_data(W):
    W.data.mul_(torch.rand(len(W), 1) * 4)


def by_two_rebindings(W):
    """Rebind twice: the second brings back an old address, and neither changes the version."""
    first, other = W.data, torch.rand_like(W)
    W.data = other
    encode(W)
    first.copy_(torch.rand_like(first))
    W.data = first


def by_shared_memory(W):
    W.detach().numpy()[:] = torch.rand(W.shape).numpy()


UNCOUNTED = {
    "data": by_data,
    "data rebound twice": by_two_rebindings,
    "NumPy": by_shared_memory,
}


def encode(W, precision="screened"):
    """Return a code of 30 tokens, its reconstruction, and the gradient of the code's sum for W."""
    problem = make_problem(30)
    code = ops.encode_topk(problem.x, W, *problem.encoder[2:], 5, precision=precision)
    factored = ops.encode_topk(
        *(problem.x, W, problem.b_enc, problem.b_dec, 5), precision=precision, dense_grad=False
    )
    return code.values, code.indices, factored.indices, ops.decode(code, W)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("change", UNCOUNTED.values(), ids=UNCOUNTED)
def test_a_change_that_nothing_counts_is_seen_by_the_next_call(unkept, change, precision):
    if change is by_shared_memory and unkept.is_cuda:
        pytest.skip("NumPy shares memory with CPU tensors only")
    with ops.kept_copies(unkept):
        encode(unkept, precision)
    encode(unkept, precision)
    change(unkept)
    expected = encode(unkept.detach().clone(), precision)
    assert all(map(torch.equal, encode(unkept, precision), expected))
    with ops.kept_copies(unkept):
        assert all(map(torch.equal, encode(unkept, precision), expected))


def test_nothing_is_kept_outside_the_context(unkept):
    with ops.kept_copies(unkept):
        encoder_copy(unkept, "bf16")
    assert encoder_copy(unkept, "bf16") == (None, None, None)
    assert decoder_copy(unkept, "bf16") is not decoder_copy(unkept, "bf16")
    assert copies_to_refresh(unkept, "bf16") == (None, None, None)


def test_copies_of_a_session_last_until_its_next_context(unkept):
    session = object()
    with ops.kept_copies(unkept, session=session):
        first = encoder_copy(unkept, "bf16")
    with ops.kept_copies(unkept):
        assert not same_tensors(first, encoder_copy(unkept, "bf16"))
    with ops.kept_copies(unkept, session=session):
        assert same_tensors(first, encoder_copy(unkept, "bf16"))
        with ops.kept_copies(unkept):
            assert same_tensors(first, encoder_copy(unkept, "bf16"))


def test_frozen_copy_is_the_vector_before_its_update(unkept):
    b = unkept[0].detach().clone()
    before = b.clone()
    outside = frozen_copy(b)
    with ops.kept_copies(b):
        inside = frozen_copy(b)
        assert frozen_copy(b) is inside
        b.add_(1)
        assert torch.equal(frozen_copy(b), before + 1)
    assert torch.equal(inside, before)
    assert torch.equal(outside, before)


def test_change_through_data_is_seen_after_drop_copies(W):
    decoder_copy(W, "bf16")
    W.data.mul_(2)
    ops.drop_copies(W)
    assert torch.equal(decoder_copy(W, "bf16"), W.detach().bfloat16())


@pytest.mark.parametrize("precision", LOW)
def test_decoder_copy_is_the_rounded_matrix(W, precision):
    rounded = decoder_copy(W, precision)
    assert rounded is decoder_copy(W, precision)
    assert torch.equal(rounded, W.detach().to(LOW[precision]))
    assert not rounded.requires_grad


def test_decoder_copy_in_full_precision_is_the_matrix_itself(W):
    assert decoder_copy(W, "screened").data_ptr() == W.data_ptr()


def test_only_a_current_copy_of_the_precision_is_refreshed(W):
    assert copies_to_refresh(W, "bf16") == (None, None, None)
    rounded = decoder_copy(W, "bf16")
    assert copies_to_refresh(W, "bf16")[2] is rounded
    assert copies_to_refresh(W, "fp16") == (None, None, None)
    with torch.no_grad():
        W.add_(1)
    assert copies_to_refresh(W, "bf16") == (None, None, None)


def update(W, precision):
    zeros = torch.zeros_like(W)
    empty = torch.zeros(0, dtype=torch.int32)
    lists = torch.zeros(len(W) + 1, dtype=torch.int64), empty, torch.zeros(0)
    factors = (*lists, torch.zeros(0, W.shape[1]), None)
    measured = ops.row_gradient_norm(*factors, None, torch.ones_like(W))
    ops.fused_update_(
        *(W, zeros, zeros.clone(), *factors, torch.ones_like(W), *measured[1:], update_scalars()),
        **{"project": False, "unit_norm": False, "precision": precision},
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_update_keeps_the_encoder_copy_current(W, precision):
    before = encoder_copy(W, precision)
    update(W, precision)
    assert same_tensors(before, encoder_copy(W, precision))
    fresh = torch.ops.sae_fast.pack_encoder(W.detach().clone(), precision)
    assert torch.equal(before[0], fresh[0])
    assert torch.equal(before[2], fresh[2])
    if W.is_cuda:  # two kernels add up the lengths in different orders; they only bound errors
        close(before[1], fresh[1].double(), terms=W.shape[1])
    else:
        assert torch.equal(before[1], fresh[1])


@pytest.mark.parametrize("precision", LOW)
def test_update_keeps_the_decoder_copy_current(W, precision):
    before = decoder_copy(W, precision)
    update(W, precision)
    assert decoder_copy(W, precision) is before
    assert torch.equal(before, W.detach().to(LOW[precision]))


def test_update_in_another_precision_leaves_no_stale_copy(W):
    decoder_copy(W, "bf16")
    update(W, "fp16")
    assert torch.equal(decoder_copy(W, "bf16"), W.detach().bfloat16())


def test_encoding_in_another_precision_leaves_a_copy_in_place(W):
    training = encoder_copy(W, "bf16")
    encoder_copy(W, "screened")
    assert same_tensors(training, encoder_copy(W, "bf16"))
    assert same_tensors(training, copies_to_refresh(W, "bf16"))


def test_update_forgets_the_copies_that_it_does_not_refresh(W):
    evaluation = encoder_copy(W, "screened")
    training = encoder_copy(W, "bf16")
    update(W, "bf16")
    assert same_tensors(training, encoder_copy(W, "bf16"))
    assert copies_to_refresh(W, "screened") == (None, None, None)
    assert not same_tensors(evaluation, encoder_copy(W, "screened"))


def test_update_is_seen_by_autograd(W):
    problem = make_problem()
    code = ops.encode_topk(*problem.encoder, 5)
    x_hat = ops.decode(code, W)
    update(W, "fp32")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (x_hat.sum() + code.values.sum()).backward()


@pytest.mark.parametrize("dense_grad", [True, False])
def test_copies_do_not_travel_with_the_parameter(W, dense_grad):
    encoder_copy(W, "bf16")
    file = io.BytesIO()
    torch.save(W, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(W), loaded):
        assert encoder_copy(other, "bf16") == (None, None, None)  # nor does kept_copies
        with ops.kept_copies(other):
            assert copies_to_refresh(other, "bf16") == (None, None, None)
            assert torch.equal(other, W)
            encoder_copy(other, "bf16")


def test_inference_tensors_are_encoded_without_a_kept_copy():
    with torch.inference_mode():
        problem = make_problem()
        code = ops.encode_topk(*problem.encoder, 5)
        x_hat = ops.decode(code, problem.W_dec, problem.b_dec, precision="bf16")
    assert x_hat.isfinite().all()
