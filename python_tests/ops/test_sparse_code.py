import dataclasses
import subprocess
import sys

import pytest
import torch
from op_samples import Code, make_code, make_problem

from sae_fast import ops
from sae_fast.ops import SparseCode

pytestmark = pytest.mark.usefixtures("default_device")


def sparse(code: Code, d_sae: int) -> SparseCode:
    return SparseCode(code.values, code.indices, d_sae, code.offsets)


@pytest.fixture(params=["topk", "csr"])
def code(request, default_device):
    return make_code(20, 70, 6, csr=request.param == "csr")


def test_dense_holds_the_values_at_their_indices(code):
    assert torch.equal(sparse(code, 70).dense().double(), code.dense(70))


@pytest.mark.slow
def test_dense_makes_its_array_once():
    """Measured as the growth of the highest memory use of a process."""
    made = "SparseCode(torch.rand(256, 4), torch.zeros(256, 4, dtype=torch.int32), 2**18)"
    script = f"""
import torch
from sae_fast.ops import SparseCode
torch.set_num_threads(1)
def highest():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
code = {made}
before = highest()
dense = code.dense()
print((highest() - before) / dense.untyped_storage().nbytes())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert float(result.stdout) < 1.5, result.stderr


def test_dense_is_differentiable(code):
    values = code.values.clone().requires_grad_()
    SparseCode(values, code.indices, 70, code.offsets).dense().square().sum().backward()
    assert torch.equal(values.grad, 2 * code.values)


def test_l0_counts_what_fires_and_not_what_is_listed(code):
    assert torch.equal(sparse(code, 70).l0(), (code.dense(70) > 0).sum(1))


def test_fired_names_latents_with_a_positive_value_anywhere(code):
    assert torch.equal(sparse(code, 70).fired(), (code.dense(70) > 0).any(0))


@pytest.mark.parametrize("has_view", [False, True])
def test_fired_is_the_same_with_the_latent_major_view(code, has_view):
    values = code.values.abs()
    values[..., 0] = 0
    tested = SparseCode(values, code.indices, 70, code.offsets)
    if has_view:
        tested.latent_major()
    assert torch.equal(tested.fired(), (tested.dense() > 0).any(0))


@pytest.mark.parametrize("has_view", [False, True])
def test_nan_and_negative_values_do_not_fire(has_view):
    values = torch.tensor([[torch.nan, -1.0, 2.0]])
    indices = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    code = SparseCode(values, indices, 4)
    if has_view:
        code.latent_major()
    assert code.l0().tolist() == [1]
    assert code.fired().tolist() == [False, False, True, False]


def test_rows_are_counted_in_both_layouts(code):
    assert sparse(code, 70).n_rows == 20


def test_code_without_rows_or_entries_has_shapes():
    for offsets, shape in ((None, (0, 3)), (torch.zeros(1, dtype=torch.int64), (0,))):
        code = SparseCode(torch.zeros(shape), torch.zeros(shape, dtype=torch.int32), 5, offsets)
        assert code.dense().shape == (0, 5)
        assert code.l0().shape == (0,)
        assert not code.fired().any()


def test_latent_major_is_computed_once_for_a_code(code):
    first = sparse(code, 70)
    assert first.latent_major() is first.latent_major()
    for found, expected in zip(first.latent_major(), ops.latent_major(*code, 70), strict=True):
        assert torch.equal(found, expected)


def test_factors_of_one_code_share_its_key():
    problem = make_problem().requires_grad()
    code = ops.encode_topk(*problem.encoder, 5, dense_grad=False)
    found = ops.reconstruct(code, problem.W_dec, None, problem.x, dense_grad=False)
    found.squared_error.sum().backward()
    keys = {problem.W_enc.row_factors[0].code_key, problem.W_dec.row_factors[0].code_key}
    assert keys == {code.key}
    other = ops.encode_topk(*problem.encoder, 5, dense_grad=False)
    assert other.key is not code.key


def test_sink_of_factors_has_its_keys_before_the_backward():
    problem = make_problem().requires_grad()
    dead = torch.ones(len(problem.W_enc), dtype=torch.bool)
    code = ops.encode_topk(*problem.encoder, 5, dead_mask=dead, k_aux=3, dense_grad=False)
    assert code.values.grad_fn.sink.keys == (code.key, code.aux.key)


def test_code_with_replaced_values_has_a_key_and_a_view_of_its_own():
    code = sparse(make_code(20, 70, 6), 70)
    active = code.latent_major()[0][-1]
    other = dataclasses.replace(code, values=torch.zeros(20, 6))
    assert other.key is not code.key
    assert active > 0
    assert other.latent_major()[0][-1] == 0
