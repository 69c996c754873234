"""Properties over shapes, ties and special values that hypothesis chooses."""

import pytest
import torch
from device_ops import public
from encoding_oracle import check_largest, integers, largest, pre_activations
from example_settings import examples
from hypothesis import example, given
from hypothesis import strategies as st
from op_samples import PRECISIONS, Code, make_code, make_problem, ops, update_scalars
from tolerances import close

pytestmark = pytest.mark.usefixtures("ops_on_device")

quick = examples(25)


@st.composite
def shapes(draw):
    """Draw N, D, F, k: small and odd."""
    n, d_in = draw(st.integers(0, 20)), draw(st.integers(1, 40))
    d_sae = draw(st.integers(1, 200))
    return n, d_in, d_sae, draw(st.integers(1, d_sae))


seeds = st.integers(0, 10_000)


def permuted(problem, order):
    return problem._replace(W_enc=problem.W_enc[order], b_enc=problem.b_enc[order])


@quick
@given(shapes(), st.sampled_from(PRECISIONS), seeds, st.booleans())
@example((1, 1, 1, 1), "screened", 0, True)
@example((0, 3, 65, 65), "screened", 0, True)
def test_topk_of_ties_is_exact(shape, precision, seed, with_dead):
    n, d_in, d_sae, k = shape
    problem = integers(n, d_in, d_sae, bound=1, seed=seed)
    dead = torch.rand(d_sae, generator=torch.Generator().manual_seed(seed)) < 0.4
    k_aux = min(k, int(dead.sum())) if with_dead else 0
    mask = dead if with_dead else None
    code = public.encode_topk(*problem.encoder, k, precision=precision, dead_mask=mask, k_aux=k_aux)
    pre_acts = pre_activations(problem, precision)[0]
    values, indices = largest(pre_acts, k)
    assert torch.equal(code.indices.long(), indices)
    assert torch.equal(code.values.double(), values)
    if with_dead:
        values, indices = largest(pre_acts[:, dead], k_aux)
        assert torch.equal(code.aux.indices.long(), dead.nonzero().flatten()[indices])
        assert torch.equal(code.aux.values.double(), values)


@quick
@given(shapes(), st.sampled_from(PRECISIONS), seeds, st.floats(-6, 6))
def test_topk_is_the_largest_up_to_rounding(shape, precision, seed, magnitude):
    n, d_in, d_sae, k = shape
    problem = make_problem(n, d_in, d_sae, seed)
    scale = 10.0**magnitude if precision != "fp16" else 1.0
    problem = problem._replace(x=problem.x * scale)
    code = public.encode_topk(*problem.encoder, k, precision=precision)
    check_largest(code.values, code.indices, problem, precision)


SPECIAL = st.sampled_from([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-45, -1e-45])


@quick
@given(shapes(), st.sampled_from(PRECISIONS), seeds, st.lists(SPECIAL, min_size=1, max_size=5))
def test_special_biases_have_their_place_in_the_order(shape, precision, seed, special):
    n, d_in, d_sae, k = shape
    problem = integers(n, d_in, d_sae, bound=1, seed=seed)
    problem = problem._replace(x=problem.b_dec.expand(n, d_in).clone())  # only biases are left
    place = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[: len(special)]
    problem.b_enc[place] = torch.tensor(special)[: len(place)]
    code = public.encode_topk(*problem.encoder, k, precision=precision)
    values, indices = largest(problem.b_enc.double().expand(n, d_sae), k)
    assert torch.equal(code.indices.long(), indices)
    torch.testing.assert_close(code.values.double(), values, rtol=0, atol=0, equal_nan=True)


@quick
@given(shapes(), st.sampled_from(PRECISIONS), seeds)
def test_permuting_tokens_permutes_the_code(shape, precision, seed):
    n, d_in, d_sae, k = shape
    problem = integers(n, d_in, d_sae, bound=3, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    code = public.encode_topk(*problem.encoder, k, precision=precision)
    moved = problem._replace(x=problem.x[order])
    found = public.encode_topk(*moved.encoder, k, precision=precision)
    assert torch.equal(found.values, code.values[order])
    assert torch.equal(found.indices, code.indices[order])


@quick
@given(shapes(), st.sampled_from(PRECISIONS), seeds)
def test_permuting_latents_permutes_the_indices(shape, precision, seed):
    n, d_in, d_sae, k = shape
    problem = integers(n, d_in, d_sae, bound=3, seed=seed)
    problem = problem._replace(b_enc=torch.linspace(0, 0.5, d_sae).mul(2**20).round() / 2**20)
    order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))
    code = public.encode_topk(*problem.encoder, k, precision=precision)
    moved = permuted(problem, order)
    found = public.encode_topk(*moved.encoder, k, precision=precision)
    assert torch.equal(order[found.indices.long()], code.indices.long())
    assert torch.equal(found.values, code.values)


@quick
@given(shapes(), st.sampled_from(PRECISIONS), seeds)
def test_threshold_of_ties_is_exact(shape, precision, seed):
    n, d_in, d_sae, _ = shape
    problem = integers(n, d_in, d_sae, bound=1, seed=seed)
    threshold = torch.randint(
        -2, 4, (d_sae,), generator=torch.Generator().manual_seed(seed)
    ).float()
    code = public.encode_threshold(*problem.encoder, threshold, precision=precision)
    pre_acts = pre_activations(problem, precision)[0]
    keep = (pre_acts > threshold) & (pre_acts > 0)
    assert torch.equal(code.indices.long(), keep.nonzero()[:, 1])
    assert torch.equal(code.values.double(), pre_acts[keep])
    assert torch.equal(code.l0(), keep.sum(1))


@quick
@given(shapes(), seeds, st.booleans())
def test_decode_of_a_code_is_the_dense_product(shape, seed, csr):
    n, d_in, d_sae, k = shape
    problem, code = make_problem(n, d_in, d_sae, seed), make_code(n, d_sae, k, csr=csr, seed=seed)
    dense, rows = code.dense(d_sae), problem.W_dec.double()
    x_hat = ops.decode(*code, problem.W_dec, None)
    close(x_hat, dense @ rows, terms=k, magnitude=dense.abs() @ rows.abs())


@quick
@given(shapes(), seeds, st.booleans())
def test_decode_backward_is_the_adjoint_of_decode(shape, seed, csr):
    n, d_in, d_sae, k = shape
    problem, code = make_problem(n, d_in, d_sae, seed), make_code(n, d_sae, k, csr=csr, seed=seed)
    x_hat = ops.decode(*code, problem.W_dec, None)
    grad_values = ops.decode_backward(problem.x, *code[1:], problem.W_dec)
    forward = (x_hat.double() * problem.x.double()).sum()
    backward = (code.values.double() * grad_values.double()).sum()
    size = (code.dense(d_sae) @ problem.W_dec.double().abs() * problem.x.double().abs()).sum()
    close(backward, forward, terms=n * k * d_in, magnitude=size, dtype=torch.float32)


@quick
@given(shapes(), seeds, st.booleans())
def test_accumulate_rows_is_the_adjoint_of_decode_in_the_weights(shape, seed, csr):
    n, d_in, d_sae, k = shape
    problem, code = make_problem(n, d_in, d_sae, seed), make_code(n, d_sae, k, csr=csr, seed=seed)
    rows, sums = ops.accumulate_rows(*code, problem.x, d_sae)
    matrix = code.dense(d_sae).t()
    size = matrix.abs() @ problem.x.double().abs()
    close(rows, matrix @ problem.x.double(), terms=n, magnitude=size)
    close(sums, matrix.sum(1), terms=n)


@quick
@given(shapes(), seeds, st.booleans())
def test_latent_major_is_a_permutation_of_the_active_entries(shape, seed, csr):
    n, _, d_sae, k = shape
    code = make_code(n, d_sae, k, csr=csr, seed=seed)
    latent_offsets, entries, rows = (t.long() for t in ops.latent_major(*code, d_sae))
    active = int(latent_offsets[-1])  # on CUDA the entries of value 0 follow
    entries, rows = entries[:active], rows[:active]
    values, indices = code.values.flatten(), code.indices.flatten()
    assert torch.equal(entries.sort().values, (values != 0).nonzero().flatten())
    assert torch.equal(indices[entries], indices[entries].sort().values)
    latents = torch.arange(d_sae).repeat_interleave(latent_offsets.diff())
    assert torch.equal(indices[entries].long(), latents)
    rebuilt = torch.zeros(n, d_sae, dtype=torch.float64)
    rebuilt[rows, latents] = values[entries].double()
    assert torch.equal(rebuilt, code.dense(d_sae))


@quick
@given(shapes(), seeds, st.booleans())
def test_norm_and_update_agree_with_the_dense_gradient(shape, seed, project):
    n, d_in, d_sae, k = shape
    problem, code = make_problem(n, d_in, d_sae, seed), make_code(n, d_sae, k, seed=seed)
    latent_offsets, entries, rows = ops.latent_major(*code, d_sae)
    factors = (latent_offsets, rows, code.values.flatten()[entries], problem.x, problem.b_dec)
    W = problem.W_dec.clone()
    onto = W if project else None
    squared_norm, sums, cached, slots = ops.row_gradient_norm(*factors, onto, None)
    matrix = code.dense(d_sae).t()
    centred = (problem.x - problem.b_dec).double()
    grad = matrix @ centred
    size = matrix.abs() @ (problem.x.double().abs() + problem.b_dec.double().abs())
    if project:
        grad = grad - (grad * W.double()).sum(1, keepdim=True) * W.double()
        size = size + (size * W.double().abs()).sum(1, keepdim=True)
    terms, total = n + d_in, size.square().sum()
    close(squared_norm, grad.square().sum(), terms=terms, magnitude=total, dtype=torch.float32)
    moments = torch.zeros_like(W), torch.zeros_like(W)
    switches = ("adam", project, project, None, None, None, "fp32")
    cache = (sums, cached, slots, update_scalars(grad_scale=1.0), None)
    ops.fused_update_(W, *moments, None, None, *factors, None, *cache, *switches)
    close(moments[0], 0.1 * grad, terms=terms, magnitude=size)
    close(moments[1], 0.001 * grad.square(), terms=terms, magnitude=0.01 * size.square())
    if project:
        norms = torch.linalg.vector_norm(W.double(), dim=1)
        close(norms, torch.ones(d_sae, dtype=torch.float64), terms=d_in, dtype=torch.float32)


@pytest.mark.parametrize("csr", [True, False])
def test_entries_of_value_zero_change_nothing(csr):
    problem, code = make_problem(), make_code(20, 70, 6, csr=csr)
    moved = torch.where(code.values == 0, 69 - code.indices, code.indices)
    other = Code(code.values, moved, code.offsets)
    found, expected = (ops.decode(*c, problem.W_dec, problem.b_dec) for c in (other, code))
    close(found, expected.double(), magnitude=1.0)
    found, expected = (ops.accumulate_rows(*c, problem.x, 70)[0] for c in (other, code))
    close(found, expected.double(), magnitude=1.0)
