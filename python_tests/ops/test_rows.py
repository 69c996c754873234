import pytest
import torch
from op_samples import (
    EXACT,
    LOW,
    PRECISIONS,
    Code,
    in_latent_major,
    make_code,
    make_problem,
    ops,
    place,
    scalars_arguments,
    update_arguments,
    update_scalars,
)
from tolerances import close

from sae_fast import ops as public
from sae_fast.ops.registry import NATIVE

pytestmark = pytest.mark.usefixtures("ops_on_device")

DTYPES = [torch.float32, *LOW.values()]
SHAPES = [  # N, D, F, k
    pytest.param(0, 8, 64, 4, id="no rows"),
    pytest.param(3, 5, 9, 0, id="no entries"),
    pytest.param(1, 1, 1, 1, id="all ones"),
    pytest.param(33, 37, 257, 12, id="odd"),
    pytest.param(20, 1, 70, 70, id="d_in 1"),
    pytest.param(300, 96, 1000, 32, id="larger"),
    pytest.param(500, 16, 3, 2, id="few latents"),
]
LAYOUTS = [pytest.param(False, id="topk"), pytest.param(True, id="csr")]
TERMS = [  # shift, projection, extra gradient
    pytest.param((False, False, False), id="bare"),
    pytest.param((True, False, False), id="shift"),
    pytest.param((False, True, False), id="projected"),
    pytest.param((True, True, True), id="all"),
]


def signed(code):
    """Make coefficients of either sign, like gradients."""
    sign = torch.where(torch.arange(code.values.numel()) % 3 == 0, -1.0, 1.0)
    return code._replace(values=code.values * sign.view(code.values.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("csr", LAYOUTS)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_accumulate_rows_sums_the_entries_of_every_latent(n, d_in, d_sae, k, csr, dtype):
    code = signed(make_code(n, d_sae, k, csr=csr))
    dense = make_problem(n, d_in, d_sae).x.to(dtype)
    rows, sums = ops.accumulate_rows(*code, dense, d_sae)
    assert rows.dtype == sums.dtype == torch.float32
    matrix = code.dense(d_sae).t()
    magnitude = matrix.abs() @ dense.double().abs()
    close(rows, matrix @ dense.double(), terms=n, magnitude=magnitude)
    close(sums, matrix.sum(1), terms=n, magnitude=matrix.abs().sum(1))


@pytest.mark.parametrize("csr", LAYOUTS)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_latent_major_lists_the_entries_by_latent_and_position(n, d_in, d_sae, k, csr, device):
    code = make_code(n, d_sae, k, csr=csr)
    if code.values.numel() > 3:
        code.values.view(-1)[:3] = torch.tensor([torch.nan, -0.0, -1.0])
    latent_offsets, entries, rows = ops.latent_major(*code, d_sae)
    latents, values = code.indices.flatten().tolist(), code.values.flatten().tolist()
    expected = sorted((latents[p], p) for p in range(len(values)) if values[p] != 0)
    active = len(expected)
    if device.type == "cpu":
        assert entries.shape == rows.shape == (active,)
    else:  # their number is known only on the device, so there is room for all
        assert entries.shape == rows.shape == (len(values),)
        zeros = [p for p in range(len(values)) if values[p] == 0]
        assert sorted(entries[active:].tolist()) == zeros
    assert entries[:active].tolist() == [position for _, position in expected]
    counts = torch.bincount(
        torch.tensor([j for j, _ in expected], dtype=torch.int64), minlength=d_sae
    )
    assert latent_offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    if csr:
        row_of = torch.arange(n).repeat_interleave(code.offsets.diff()).tolist()
    else:
        row_of = [position // k for position in range(n * k)]
    assert rows[:active].tolist() == [row_of[position] for _, position in expected]


@pytest.mark.parametrize("csr", LAYOUTS)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_coefficients_are_ordered_and_summed_by_latent(n, d_in, d_sae, k, csr):
    code = make_code(n, d_sae, k, csr=csr)
    latent_offsets, entries, _ = ops.latent_major(*code, d_sae)
    coefficients = signed(code).values
    ordered = ops.gather_entries(coefficients, entries)
    assert torch.equal(ordered, coefficients.flatten()[entries])
    sums = ops.latent_sums(latent_offsets, entries, coefficients)
    matrix = signed(code).dense(d_sae)
    close(sums, matrix.sum(0), terms=n, magnitude=matrix.abs().sum(0))


def gradient_case(n, d_in, d_sae, k, terms, dtype=torch.float32, csr=False):
    """Make arguments of row_gradient_norm, W, and the gradient in float64 with its magnitude."""
    shift, project, extra = terms
    problem = make_problem(n, d_in, d_sae)
    code = signed(make_code(n, d_sae, k, csr=csr))
    dense = problem.x.to(dtype)
    b_dec = problem.b_dec if shift else None
    W = problem.W_dec
    extra_grad = 0.1 * problem.W_enc if extra else None
    matrix = code.dense(d_sae).t()
    centred = dense.double() - (b_dec.double() if shift else 0.0)
    grad, magnitude = matrix @ centred, matrix.abs() @ centred.abs()
    if extra:
        grad, magnitude = grad + extra_grad.double(), magnitude + extra_grad.double().abs()
    if project:
        rows = W.double()
        grad = grad - (grad * rows).sum(1, keepdim=True) * rows
        along = (magnitude * rows.abs()).sum(1, keepdim=True)
        magnitude = magnitude + along * rows.abs()
    lists = in_latent_major(code, d_sae)
    arguments = (*lists, dense, b_dec, W if project else None, extra_grad)
    return arguments, W, grad, magnitude, matrix


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_row_gradient_norm_is_the_norm_of_the_dense_gradient(n, d_in, d_sae, k, dtype, terms):
    arguments, _, grad, magnitude, matrix = gradient_case(n, d_in, d_sae, k, terms, dtype)
    squared_norm, sums, _, _ = ops.row_gradient_norm(*arguments)
    assert squared_norm.dtype == torch.float64
    total = magnitude.square().sum()
    expected = grad.square().sum()
    close(squared_norm, expected, terms=n + d_in, magnitude=total, dtype=torch.float32)
    close(sums, matrix.sum(1), terms=n, magnitude=matrix.abs().sum(1))


def adamw(W, exp_avg, exp_avg_sq, grad, step, *, project):
    """Take a step of torch.optim.AdamW in float64, with the settings of `update_arguments`."""
    parameter = torch.nn.Parameter(W.double())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    moments = {"exp_avg": exp_avg.double(), "exp_avg_sq": exp_avg_sq.double()}
    optimizer.state[parameter] = {"step": torch.tensor(float(step - 1)), **moments}
    parameter.grad = 0.5 * grad
    optimizer.step()
    if project:
        with torch.no_grad():
            norms = torch.linalg.vector_norm(parameter, dim=1, keepdim=True)
            parameter.div_(norms.clamp_min(1e-12))
    return parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"]


@pytest.mark.parametrize("step", [1, 3, 100_000])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_fused_update_is_the_five_separate_steps(n, d_in, d_sae, k, terms, step):
    arguments, W, grad, magnitude, _ = gradient_case(n, d_in, d_sae, k, terms)
    updated = update_arguments(*arguments, W, step=step)
    before = [tensor.clone() for tensor in updated[:3]]
    ops.fused_update_(*updated)
    W, exp_avg, exp_avg_sq = updated[:3]
    expected_W, expected_avg, expected_sq = adamw(*before, grad, step, project=terms[1])
    size = 0.1 * before[1].abs() + magnitude
    close(exp_avg, expected_avg, terms=n + d_in, magnitude=before[1].abs() + magnitude)
    close(exp_avg_sq, expected_sq, terms=n + d_in, magnitude=before[2] + size.square())
    # The step is lr · m / √v; rounding of m and v changes it by the same relative amount.
    root = expected_sq.sqrt() / (1 - 0.999**step) ** 0.5
    first = (before[1].abs() + magnitude) / (1 - 0.9**step)
    moved = 1e-2 * first / root * (1 + size.square() / expected_sq)
    close(W, expected_W, terms=n + d_in, magnitude=before[0].abs() + moved.clamp_max(1e6))


@pytest.mark.parametrize("step", [1, 3, 100_000])
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_update_of_a_vector_is_adamw(size, step):
    generator = torch.Generator().manual_seed(0)
    w, exp_avg, grad = (torch.randn(size, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(size, generator=generator) + 0.1
    expected = adamw(w, exp_avg, exp_avg_sq, grad.double(), step, project=False)
    moments = w, exp_avg, exp_avg_sq
    ops.update_vector_(*moments, grad, update_scalars(step=step), "adam")
    for found, wanted in zip(moments, expected, strict=True):
        close(found, wanted, magnitude=wanted.abs() + 1)


def test_vector_without_gradient_follows_its_moments():
    found, expected = ([torch.ones(5), torch.ones(5), torch.ones(5)] for _ in range(2))
    ops.update_vector_(*found, None, update_scalars(), "adam")
    ops.update_vector_(*expected, torch.zeros(5), update_scalars(), "adam")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], torch.ones(5))


@pytest.mark.parametrize("squared_norm", [torch.nan, torch.inf, 1e90])
@pytest.mark.parametrize("skip", [False, True])
def test_norm_that_is_not_finite_changes_no_parameter(squared_norm, skip):
    arguments = scalars_arguments(squared_norm, skip=skip)
    norm, scalars = ops.update_scalars(*arguments)
    assert not norm.isfinite()
    assert scalars.isnan().all()
    assert arguments[3].item() == 2
    assert arguments[4].item() == (-1 if skip else 2)
    problem = make_problem()
    lists = in_latent_major(make_code(20, 70, 6), 70)
    updated = list(update_arguments(*lists, problem.x, None, problem.W_dec, None, problem.W_dec))
    copies = ops.pack_encoder(updated[0], "bf16")
    updated[-4:] = [*copies, "bf16"]
    updated[place("fused_update_", "scalars")] = scalars
    before = [tensor.clone() for tensor in (*updated[:3], *copies)]
    ops.fused_update_(*updated)
    ops.update_vector_(*updated[:3], problem.W_enc, scalars, "adam")
    for tensor, old in zip((*updated[:3], *copies), before, strict=True):
        assert torch.equal(tensor, old)


def test_halted_run_makes_no_further_step():
    arguments = scalars_arguments(torch.nan)
    ops.update_scalars(*arguments)
    norm, scalars = ops.update_scalars(torch.tensor(4.0).double(), *arguments[1:])
    assert norm.item() == 2
    assert scalars.isnan().all()
    assert (arguments[3].item(), arguments[4].item()) == (2, 2)


def test_step_after_a_skipped_one_is_as_if_that_had_not_been():
    arguments = scalars_arguments(torch.nan, skip=True)
    ops.update_scalars(*arguments)
    _, scalars = ops.update_scalars(torch.tensor(1.0).double(), *arguments[1:])
    _, expected = ops.update_scalars(*scalars_arguments(1.0, skip=True))
    assert torch.equal(scalars, expected)
    assert arguments[3].item() == 3


@pytest.mark.parametrize("step", [1, 2, 50, 10**6])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0, 0.25])
@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 1e6])
def test_update_scalars_are_adamws_rounded_once(step, loss_scale, grad_clip):
    arguments = list(scalars_arguments(9.0 * loss_scale**2, step=step, grad_clip=grad_clip))
    arguments[2] = torch.tensor(loss_scale)
    norm, scalars = ops.update_scalars(*arguments)
    clip = min(1.0, grad_clip / (3.0 + 1e-6)) if grad_clip else 1.0
    corrections = 1 - 0.9**step, (1 - 0.999**step) ** 0.5
    expected = [clip / loss_scale, 1 - 1e-3, 1 - 0.9, 0.999, 1 - 0.999]
    expected += [1e-2 / corrections[0], corrections[1], 1e-8, 0, 0, 0]
    assert norm.item() == 3
    assert arguments[3].item() == step
    torch.testing.assert_close(scalars, torch.tensor(expected), rtol=2e-7, atol=0)


@pytest.mark.parametrize("terms", TERMS)
def test_fused_update_does_not_depend_on_what_was_cached(terms):
    arguments, W, _, magnitude, _ = gradient_case(60, 20, 300, 8, terms)
    cached, bare = (update_arguments(*arguments, W) for _ in range(2))
    bare = list(bare)
    cached_rows, slots = place("fused_update_", "cached"), place("fused_update_", "cache_slots")
    bare[cached_rows], bare[slots] = torch.empty(0, 20), torch.full_like(bare[slots], -1)
    ops.fused_update_(*cached)
    ops.fused_update_(*bare)
    size = magnitude + cached[1].abs()
    close(bare[1], cached[1].double(), terms=80, magnitude=size)
    close(bare[2], cached[2].double(), terms=80, magnitude=size.square())
    close(bare[0], cached[0].double(), terms=80, magnitude=1.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fused_update_leaves_the_encoder_copy_as_if_packed_anew(precision, device):
    arguments, W, *_ = gradient_case(60, 21, 300, 8, (True, False, False))
    updated = list(update_arguments(*arguments, W))
    copies = ops.pack_encoder(W, precision)
    updated[-4:] = [*copies, precision]
    ops.fused_update_(*updated)
    packed, stats, rounded = ops.pack_encoder(updated[0], precision)
    assert torch.equal(copies[0], packed)
    assert torch.equal(copies[2], rounded)
    if device.type == "cpu":
        assert torch.equal(copies[1], stats)
    else:  # two kernels add up the lengths in different orders; they only bound errors
        close(copies[1], stats.double(), terms=21)


@pytest.mark.parametrize("precision", LOW)
def test_fused_update_rounds_the_decoder_copy(precision):
    arguments, W, *_ = gradient_case(60, 21, 300, 8, (False, True, False))
    updated = list(update_arguments(*arguments, W))
    rounded = W.to(LOW[precision])
    updated[-4:] = [None, None, rounded, precision]
    ops.fused_update_(*updated)
    assert torch.equal(rounded, updated[0].to(LOW[precision]))


def test_silent_latents_still_follow_their_moments():
    problem = make_problem(10, 8, 50)
    code = Code(torch.ones(10, 1), torch.zeros(10, 1, dtype=torch.int32), None)
    arguments = (*in_latent_major(code, 50), problem.x, None, None, None)
    updated = update_arguments(*arguments, problem.W_enc)
    before = [tensor.clone() for tensor in updated[:3]]
    ops.fused_update_(*updated)
    expected = adamw(*before, torch.zeros(50, 8, dtype=torch.float64), 3, project=False)
    for found, wanted in zip(updated[:3], expected, strict=True):
        close(found[1:], wanted[1:], magnitude=wanted[1:].abs() + 0.01)


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (200, 96), (0, 4)])
def test_normalize_rows_gives_unit_rows(shape):
    W = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.normalize(W.double(), dim=1)
    ops.normalize_rows_(W)
    close(W, expected, terms=shape[1], magnitude=1.0)


def test_normalize_rows_leaves_zero_rows_and_divides_tiny_ones_by_the_bound():
    W = torch.zeros(3, 4)
    W[1] = 1e-13
    W[2] = torch.nan
    ops.normalize_rows_(W)
    assert torch.equal(W[0], torch.zeros(4))
    close(W[1], torch.full((4,), 0.1, dtype=torch.float64), terms=4)
    assert W[2].isnan().all()


@pytest.mark.parametrize("csr", LAYOUTS)
def test_inputs_of_row_sums_need_not_be_contiguous(csr):
    code, dense = make_code(20, 70, 6, csr=csr), make_problem().x
    expected = ops.accumulate_rows(*code, dense, 70)
    spaced = torch.stack([code.values, code.values + 1], dim=-1)[..., 0]
    found = ops.accumulate_rows(spaced, *code[1:], dense.t().contiguous().t(), 70)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("precision", EXACT)
def test_update_through_the_wrapper_keeps_encoding_exact(precision, device):
    problem = make_problem(40, 24, 200).to(device)
    W_enc = torch.nn.Parameter(problem.W_enc.clone())
    biases = problem.b_enc, problem.b_dec
    for step in range(1, 4):
        public.encode_topk(problem.x, W_enc, *biases, 8, precision=precision)
        arguments, _, *_ = gradient_case(40, 24, 200, 8, (True, False, False))
        arguments = [None if a is None else a.to(device) for a in arguments]
        measured = public.row_gradient_norm(*arguments)
        zeros = torch.zeros_like(W_enc), torch.zeros_like(W_enc)
        switches = {"project": False, "unit_norm": False, "precision": precision}
        scalars = update_scalars(1.0, step).to(device)
        factors = (*arguments[:5], arguments[6], *measured[1:], scalars)
        public.fused_update_(W_enc, *zeros, *factors, **switches)
        code = public.encode_topk(problem.x, W_enc, *biases, 8, precision=precision)
        fresh = public.encode_topk(problem.x, W_enc.detach().clone(), *biases, 8, precision="fp32")
        assert torch.equal(code.values, fresh.values)
        assert torch.equal(code.indices, fresh.indices)


@pytest.mark.skipif(not NATIVE, reason="the reference keeps no rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_kept_by_the_norm_are_those_of_accumulate_rows_to_the_bit(dtype):
    """Latents are summed in groups, token block by token block, if that saves reading."""
    n, d_in, d_sae = 700, 400, 300
    code = make_code(n, d_sae, 20)
    dense = torch.randn(n, d_in, generator=torch.Generator().manual_seed(2)).to(dtype)
    lists = in_latent_major(code, d_sae)
    squared_norm, sums, cached, slots = ops.row_gradient_norm(*lists, dense, None, None, None)
    rows, expected_sums = ops.accumulate_rows(*code, dense, d_sae)
    kept = slots >= 0
    assert kept.sum() > 10
    assert torch.equal(cached[slots[kept].long()], rows[kept])
    assert torch.equal(sums, expected_sums)
    close(squared_norm, rows.double().square().sum(), terms=d_in, magnitude=squared_norm)
