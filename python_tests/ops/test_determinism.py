import pytest
import torch
from device_ops import ops
from op_samples import (
    LOW,
    LOW_MOMENTS,
    ONE_MOMENT,
    Code,
    in_latent_major,
    kept_rows,
    make_code,
    make_codes,
    make_problem,
    update_arguments,
)

from sae_fast import ops as public
from sae_fast.ops.native import build_info
from sae_fast.ops.registry import NATIVE
from sae_fast.ops.row_factors import weighted_row_sum

pytestmark = pytest.mark.usefixtures("ops_on_device")

N, D, F, K = 130, 70, 900, 20
PROBLEM = make_problem(N, D, F)
CODES = {"topk": make_code(N, F, K), "csr": make_code(N, F, K, csr=True)}
# With one latent in every row its sum is much longer than the others.
HEAVY = Code(torch.ones(N, 2), torch.stack([torch.zeros(N), torch.arange(N)], 1).int(), None)
DEAD = torch.arange(F) % 4 == 0


def encode_topk(precision):
    return lambda: ops.encode_topk(
        *PROBLEM.encoder, K, precision, DEAD, 9, *ops.pack_encoder(PROBLEM.W_enc, precision)
    )


def encode_batch_topk(precision):
    return lambda: ops.encode_batch_topk(
        *PROBLEM.encoder, K, precision, DEAD, 9, *ops.pack_encoder(PROBLEM.W_enc, precision)
    )


def encode_threshold():
    threshold = torch.full((F,), 1.0)
    return ops.encode_threshold(*PROBLEM.encoder, threshold, "screened", None, None, None)


def update(moments=torch.float32, rule="adam"):
    lists = in_latent_major(HEAVY, F)
    arguments = (*lists, PROBLEM.x, None, PROBLEM.W_dec, PROBLEM.W_enc)
    updated = update_arguments(*arguments, PROBLEM.W_dec, moments=moments, rule=rule)
    ops.fused_update_(*updated)
    squared_norm, sums, cached, cache_slots = ops.row_gradient_norm(*arguments)
    state = [tensor for tensor in updated[:5] if tensor is not None]
    return *state, squared_norm, sums, cache_slots, kept_rows(cached, cache_slots)


def training_step(dense_grad):
    problem = PROBLEM.to(ops.device).requires_grad()
    dead = DEAD.to(ops.device)
    code = public.encode_topk(*problem.encoder, K, dead_mask=dead, dense_grad=dense_grad)
    found = public.reconstruct(code, problem.W_dec, problem.b_dec, problem.x, dense_grad=dense_grad)
    found.squared_error.mean().backward()
    factors = [f.coefficients for W in problem for f in getattr(W, "row_factors", [])]
    return found.squared_error, *(t.grad for t in problem if t.grad is not None), *factors


def bias_times_rows():
    problem = PROBLEM.to(ops.device)
    return (weighted_row_sum(problem.b_enc, problem.W_enc),)


def decorrelation():
    return ops.decorrelation(PROBLEM.W_dec)


def correlation(n, d_sae, active):
    """Return correlations of dense and sparse codes, for few and for many tokens."""
    h, split = make_codes(n, d_sae, active=active), d_sae // 3
    outputs = ops.code_correlation(h, split)
    one = torch.tensor(1.0)
    return *outputs, ops.code_correlation_backward(one, one, h, split, *outputs[3:])


def dense_products(precision):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(s, generator=generator) for s in ((70, 1700), (1700, 900)))
    return lambda: (
        ops.dense_product(left, right, right[0], True, precision),
        ops.dense_product(left.t(), left, None, False, precision),
    )


CALLS = {
    **{f"encode_topk {p}": encode_topk(p) for p in ("screened", "fp32", "bf16", "fp16")},
    **{f"encode_batch_topk {p}": encode_batch_topk(p) for p in ("screened", "bf16")},
    "encode_threshold": encode_threshold,
    "fused_update_": update,
    **{f"fused_update_ {dtype}": lambda d=dtype: update(d) for dtype in LOW_MOMENTS},
    **{f"fused_update_ {rule}": lambda r=rule: update(rule=r) for rule in ONE_MOMENT},
    "decorrelation": decorrelation,
    "code_correlation few tokens": lambda: correlation(30, 5000, 0.05),
    "code_correlation many tokens": lambda: correlation(N, F, 1.0),
    "dense step": lambda: training_step(True),
    "factored step": lambda: training_step(False),
    "heavy rows": lambda: ops.accumulate_rows(*HEAVY, PROBLEM.x, F),
    "weighted_row_sum": bias_times_rows,
}
for layout, code in CODES.items():
    CALLS[f"decode {layout}"] = lambda c=code: (ops.decode(*c, PROBLEM.W_dec, None),)
    CALLS[f"reconstruct {layout}"] = lambda c=code: ops.reconstruct(
        *c, PROBLEM.W_dec, PROBLEM.b_dec, PROBLEM.x
    )
    CALLS[f"accumulate_rows {layout}"] = lambda c=code: ops.accumulate_rows(*c, PROBLEM.x, F)
    CALLS[f"latent_major {layout}"] = lambda c=code: ops.latent_major(*c, F)


def same_bits(first, second):
    return len(first) == len(second) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)
    )


# On other processors torch computes them.
TILE_CALLS = {f"dense_product {p}": dense_products(p) for p in ("screened", "bf16")}
THREADS = CALLS | (TILE_CALLS if build_info().get("instruction_set") == "amx" else {})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_result_is_the_same_on_every_run(call):
    first = call()
    assert all(same_bits(first, call()) for _ in range(3))


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not NATIVE, reason="the reference leaves products to torch, which splits sums")
@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("call", THREADS.values(), ids=THREADS)
def test_result_does_not_depend_on_the_number_of_threads(call):
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(call())
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("precision", ["screened", "fp32", "bf16", "fp16"])
@pytest.mark.skipif(not NATIVE, reason="the reference's product depends on the shape of the batch")
def test_row_of_the_code_does_not_depend_on_the_rest_of_the_batch(precision, device):
    if device.type == "cuda" and precision in LOW:
        pytest.skip("on CUDA the product is a library's, whose rounding depends on the batch")
    whole = encode_topk(precision)()
    options = (K, precision, DEAD, 9, None, None, None)
    for rows in (slice(0, 1), slice(37, 41), slice(100, None)):
        part = ops.encode_topk(PROBLEM.x[rows], *PROBLEM.encoder[1:], *options)
        assert same_bits(part, [out[rows] for out in whole])
