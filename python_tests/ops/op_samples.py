"""Inputs for the ops, shared by the tests of results, registration, gradients and compilation."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from device_ops import moved, ops
from torch import Tensor

from sae_fast.ops.reference.moments import EXP_AVG, EXP_AVG_SQ, encode_moment_, moment_blocks

PRECISIONS = ("screened", "fp32", "bf16", "fp16")
EXACT = ("screened", "fp32")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOW_MOMENTS = (torch.bfloat16, torch.uint8)
ONE_MOMENT = ("sgd", "signum", "schedule_free_signum")  # rules without exp_avg_sq
RULES = ("adam", *ONE_MOMENT)
NO_COPY = (None, None, None)


class Problem(NamedTuple):
    """An encoder, a decoder and tokens."""

    x: Tensor  # [N, D]
    W_enc: Tensor  # [F, D]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, D]
    b_dec: Tensor  # [D]

    @property
    def encoder(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.W_enc, self.b_enc, self.b_dec

    def double(self) -> "Problem":
        return Problem(*(tensor.double() for tensor in self))

    def to(self, device: torch.device) -> "Problem":
        return Problem(*(tensor.to(device) for tensor in self))

    def requires_grad(self) -> "Problem":
        return Problem(*(tensor.detach().clone().requires_grad_() for tensor in self))


def make_problem(n: int = 20, d_in: int = 12, d_sae: int = 70, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    W_dec = torch.nn.functional.normalize(normal(d_sae, d_in), dim=1)
    problem = Problem(normal(n, d_in), normal(d_sae, d_in), normal(d_sae), W_dec, normal(d_in))
    return problem.to(torch.get_default_device())


class Code(NamedTuple):
    values: Tensor
    indices: Tensor
    offsets: Tensor | None

    @property
    def n_rows(self) -> int:
        return self.indices.shape[0] if self.offsets is None else self.offsets.numel() - 1

    def to(self, device: torch.device) -> "Code":
        return Code(*(None if tensor is None else tensor.to(device) for tensor in self))

    def dense(self, d_sae: int) -> Tensor:
        """Return the code as a dense matrix [N, d_sae] in float64."""
        device = self.values.device
        rows = torch.arange(self.n_rows, device=device)
        if self.offsets is None:
            rows = rows.repeat_interleave(self.indices.shape[1])
        else:
            rows = rows.repeat_interleave(self.offsets.diff())
        out = torch.zeros(self.n_rows, d_sae, dtype=torch.float64, device=device)
        place = (rows, self.indices.flatten().long())
        return out.index_put(place, self.values.flatten().double(), accumulate=True)


def make_code(n: int, d_sae: int, k: int, *, csr: bool = False, seed: int = 1) -> Code:
    """Make a code of k different latents a row, some of value 0; with csr of 0 to k."""
    device = torch.get_default_device()
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cpu")

    indices = uniform(n, d_sae).argsort(1)[:, :k].int()
    values = uniform(n, k) + 0.1
    values[uniform(n, k) < 0.2] = 0.0
    if not csr:
        return Code(values, indices, None).to(device)
    counts = torch.randint(0, k + 1, (n,), generator=generator, device="cpu")
    keep = torch.arange(k, device="cpu") < counts[:, None]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Code(values[keep], indices[keep], offsets).to(device)


def codes(n: int = 20, d_sae: int = 70, k: int = 6) -> list[Code]:
    return [make_code(n, d_sae, k), make_code(n, d_sae, k, csr=True)]


def make_codes(n: int, d_sae: int, *, active: float = 1.0, seed: int = 2) -> Tensor:
    """Make dense codes [n, d_sae] with a share of entries that are not 0."""
    device = torch.get_default_device()
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d_sae, generator=generator, device="cpu").abs_()
    fires = torch.rand(n, d_sae, generator=generator, device="cpu") < active
    return (h * fires).to(device)


def in_latent_major(code: Code, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latent_offsets, rows and coefficients of a code."""
    latent_offsets, entries, rows = ops.latent_major(*code, d_sae)
    return latent_offsets, rows, code.values.flatten()[entries]


def samples() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Yield (op, case, arguments) over the optional arguments and layouts of every op."""
    problem = make_problem()
    n, d_sae = problem.x.shape[0], problem.W_enc.shape[0]
    for precision in PRECISIONS:
        copies = ops.pack_encoder(problem.W_enc, precision)
        yield "pack_encoder", precision, (problem.W_enc, precision)
        arguments = (*problem.encoder, 5, precision, None, 0)
        yield "encode_topk", precision, (*arguments, *copies)
        yield "encode_batch_topk", precision, (*arguments, *copies)
        threshold = torch.full((d_sae,), 0.5)
        arguments = (*problem.encoder, threshold, precision)
        yield "encode_threshold", precision, (*arguments, *copies)
    dead = torch.arange(d_sae) % 3 == 0
    yield "encode_topk", "dead", (*problem.encoder, 5, "screened", dead, 4, *NO_COPY)
    yield "encode_batch_topk", "dead", (*problem.encoder, 5, "screened", dead, 4, *NO_COPY)
    yield "decorrelation", "", (problem.W_dec,)
    for precision in PRECISIONS:
        operands = problem.x, problem.W_enc.t()
        yield "dense_product", precision, (*operands, problem.b_enc, True, precision)
    wide = make_problem(33, 300, 17)
    yield "dense_product", "deep", (wide.x, wide.W_enc.t(), None, False, "screened")
    h = make_codes(n, d_sae, active=0.2)
    for case, split, grads in (("one group", 70, (1, 0)), ("two groups", 40, (1, 1))):
        outputs = ops.code_correlation(h, split)
        yield "code_correlation", case, (h, split)
        given = tuple(torch.tensor(0.5) if wanted else None for wanted in grads)
        yield "code_correlation_backward", case, (*given, h, split, *outputs[3:])
    yield "normalize_rows_", "", (problem.W_enc.clone(),)
    yield from _gather_samples(problem)
    yield from _bookkeeping_samples(problem)
    for skip_overflow in (False, True):
        yield "update_scalars", f"skip {skip_overflow}", scalars_arguments(9.0, skip=skip_overflow)
    for rule in ONE_MOMENT:
        yield "update_scalars", rule, scalars_arguments(9.0, rule=rule)
    yield "update_scalars", "not finite", scalars_arguments(torch.inf)
    for case, fault, loss in (("healthy", 0.0, 3.0), ("bad loss", None, torch.inf)):
        losses, of_parts = torch.tensor([loss, 1.0]), None if fault is None else torch.tensor(fault)
        yield "update_scalars", case, (*scalars_arguments(9.0)[:-2], of_parts, losses)
    for grad, rule in itertools.product((problem.x[0], None), RULES):
        moments = 0.1 * problem.b_dec, problem.b_dec.square() if rule == "adam" else None
        case = f"{rule}, silent" if grad is None else rule
        arguments = (problem.b_dec.clone(), *moments, grad, update_scalars(rule=rule), rule)
        yield "update_vector_", case, arguments
        both = (torch.full((5, 3), 0.5), torch.ones(5, 3), None, torch.ones(5, 3))
        if rule == "adam":
            both = (*both[:2], torch.ones(5, 3), both[3])
        yield (
            "update_vector_",
            f"{case}, with another",
            (*(a.clone() if isinstance(a, Tensor) else a for a in arguments), *both),
        )
    for code in codes(n, d_sae):
        layout = "topk" if code.offsets is None else "csr"
        for b_dec in (problem.b_dec, None):
            case = layout if b_dec is not None else f"{layout}, no bias"
            yield "decode", case, (*code, problem.W_dec, b_dec)
            yield "reconstruct", case, (*code, problem.W_dec, b_dec, problem.x)
        for dtype in LOW.values():
            case = f"{layout}, {dtype}"
            W_dec = problem.W_dec.to(dtype)
            yield "reconstruct", case, (*code, W_dec, problem.b_dec, problem.x)
        yield "decode_backward", layout, (problem.x, *code[1:], problem.W_dec)
        yield "accumulate_rows", layout, (*code, problem.x, d_sae)
        yield "latent_major", layout, (*code, d_sae)
        latent_offsets, entries, _ = ops.latent_major(*code, d_sae)
        yield "gather_entries", layout, (code.values, entries)
        yield "latent_sums", layout, (latent_offsets, entries, code.values)
        yield from _update_samples(code, layout, problem)


@functools.cache
def samples_on(device: torch.device) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Return the arguments of every sample on a device; ops that make arguments run there."""
    return {
        (name, case): tuple(moved(a, device) if isinstance(a, Tensor) else a for a in arguments)
        for name, case, arguments in samples()
    }


def kept_rows(cached: Tensor, cache_slots: Tensor) -> Tensor:
    """Return the rows that row_gradient_norm kept, by latent; the other rows are not written."""
    return cached[cache_slots[cache_slots >= 0].long()]


def _gather_samples(problem: Problem) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    n, d_in = problem.x.shape
    rows = torch.arange(2 * n) * 7 % n
    for dtype in (torch.float32, *LOW.values()):
        source = problem.x.to(dtype)
        out = torch.zeros(2 * n, d_in)
        yield "gather_rows_", f"{dtype}", (out, None, source, rows, None, 1.0)
        places = torch.arange(2 * n).flip(0)[: n + 1]
        placed_rows = (out.clone(), places, source, rows[: n + 1], problem.b_dec, 0.3)
        yield "gather_rows_", f"{dtype}, standardised", placed_rows


def _bookkeeping_samples(problem: Problem) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    n, d_sae = problem.x.shape[0], problem.W_enc.shape[0]
    errors = problem.x.square().sum(1)
    for code in codes(n, d_sae):
        layout = "topk" if code.offsets is None else "csr"
        for case, variance, is_signed in (
            (layout, None, False),
            (f"{layout}, signed, given variance", torch.tensor(3.0), True),
        ):
            values = -code.values if is_signed else code.values
            batch = errors, problem.x, values, code.indices, variance
            yield "batch_statistics", case, (*batch, d_sae, is_signed)
    yield "full_batches", "", (problem.W_enc,)
    code = make_code(n, d_sae, 6)
    for case, grad in (("", errors), ("expanded", errors[:1].expand(n))):
        yield "code_gradients", case, (code.values.flip(0), code.values, grad)
    for dtype in (torch.float32, *LOW.values()):
        yield "weighted_row_sum", f"{dtype}", (problem.b_enc, problem.W_enc.to(dtype), -1.0)
    for case, second, more in (
        ("", None, None),
        ("of two", problem.W_enc, torch.tensor(3.0).double()),
    ):
        yield "add_squares_", case, (torch.tensor(2.0).double(), problem.x, second, more)
    for norm_poisons in (True, False):
        case = "norm poisons" if norm_poisons else "overflows are skipped"
        yield "finish_step_", case, finish_arguments(norm_poisons=norm_poisons)
    yield "finish_step_", "of parts", finish_arguments(fault=0.0)


def finish_arguments(
    poison: float = 0.0,
    fault: float | None = None,
    norm: float = 5.0,
    loss: float = 1.0,
    *,
    norm_poisons: bool = True,
) -> tuple[Any, ...]:
    """Return all arguments of finish_step_ for three losses and four latents."""
    state = torch.tensor(poison), torch.tensor(6), torch.full((5,), 9.0)
    tokens, fired = torch.tensor([0, 5, 7, 8]), torch.tensor([True, False, True, False])
    losses, of_parts = (
        torch.tensor([loss, 2.0, 3.0]),
        None if fault is None else torch.tensor(fault),
    )
    numbers = losses, torch.tensor(norm), torch.tensor(4.0)
    return (*state, tokens, of_parts, *numbers, fired, 10, norm_poisons)


def _update_samples(
    code: Code, layout: str, problem: Problem
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    lists = in_latent_major(code, problem.W_enc.shape[0])
    for case, shift, onto, extra in (
        ("bare", None, None, None),
        ("shift", problem.b_dec, None, None),
        ("projected", None, problem.W_dec, problem.W_enc),
    ):
        arguments = (*lists, problem.x, shift, onto, extra)
        yield "row_gradient_norm", f"{layout}, {case}", arguments
        yield "fused_update_", f"{layout}, {case}", update_arguments(*arguments, problem.W_dec)
    for dtype in LOW_MOMENTS:
        updated = update_arguments(*arguments, problem.W_dec, moments=dtype)
        yield "fused_update_", f"{layout}, moments in {dtype}", updated
    for rule, dtype in itertools.product(ONE_MOMENT, (torch.float32, *LOW_MOMENTS)):
        updated = update_arguments(*arguments, problem.W_dec, moments=dtype, rule=rule)
        yield "fused_update_", f"{layout}, {rule} in {dtype}", updated


def update_arguments(
    latent_offsets: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    dense: Tensor,
    shift: Tensor | None,
    project_onto: Tensor | None,
    extra_grad: Tensor | None,
    W: Tensor,
    *,
    grad_scale: float = 0.5,
    step: int = 3,
    moments: torch.dtype = torch.float32,
    rule: str = "adam",
) -> tuple[Any, ...]:
    """Return all arguments of fused_update_ on a clone of W, with moments as after some steps."""
    W = W.clone()
    project = project_onto is not None
    factors = (latent_offsets, rows, coefficients, dense, shift)
    _, sums, cached, slots = ops.row_gradient_norm(*factors, W if project else None, extra_grad)
    exp_avg, exp_avg_sq = 0.1 * W.flip(0), 0.01 * W.square().flip(0)
    scalars = update_scalars(grad_scale, step, rule=rule)
    state = of_rule(rule, coded_moments(exp_avg, exp_avg_sq, moments))
    measured = (sums, cached, slots, scalars, torch.tensor(step))
    switches = (rule, project, project, *NO_COPY, "fp32")
    return (W, *state, *factors, extra_grad, *measured, *switches)


def of_rule(rule: str, state: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the moments and scales that a rule has."""
    exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale = state
    if rule in ONE_MOMENT:
        exp_avg_sq = exp_avg_sq_scale = None
    return exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale


def coded_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return moments [F, D] and their scales as fused_update_ takes them, rounded to the dtype."""
    if dtype == torch.float32:
        return exp_avg, exp_avg_sq, None, None
    coded: list[Tensor] = []
    scales: list[Tensor | None] = []
    for values, moment in ((exp_avg, EXP_AVG), (exp_avg_sq, EXP_AVG_SQ)):
        codes, scale = torch.zeros_like(values, dtype=dtype), None
        if dtype == torch.uint8:
            scale = values.new_zeros(len(values), moment_blocks(values.shape[1]))
        encode_moment_(codes, scale, values, torch.zeros_like(values, dtype=torch.int64), moment)
        coded.append(codes)
        scales.append(scale)
    return coded[0], coded[1], scales[0], scales[1]


def place(op: str, argument: str) -> int:
    """Return the place of an argument in an op's schema."""
    names = [a.name for a in getattr(torch.ops.sae_fast, op).default._schema.arguments]
    return names.index(argument)


def scalars_arguments(
    squared_norm: float,
    *,
    step: int = 3,
    grad_clip: float = 1.5,
    skip: bool = False,
    rule: str = "adam",
) -> tuple[Any, ...]:
    """Return all arguments of update_scalars for step number `step`."""
    norm, lr = (torch.tensor(x, dtype=torch.float64) for x in (squared_norm, 1e-2))
    counters = torch.tensor(step - 1), torch.tensor(-1)
    squares = (step - 1) * lr * lr if rule == "schedule_free_signum" else None
    settings = (rule, grad_clip, 0.9, 0.999, 1e-8, 0.1, skip)
    return (norm, lr, torch.tensor(1.0), *counters, squares, *settings, None, None)


def update_scalars(grad_scale: float = 0.5, step: int = 3, *, rule: str = "adam") -> Tensor:
    """Return the result of update_scalars for a norm of 1, clipped to `grad_scale`."""
    clip = grad_scale * (1.0 + 1e-6)
    arguments = scalars_arguments(1.0, step=step, grad_clip=clip, rule=rule)
    scalars: Tensor = ops.update_scalars(*arguments)[1]
    return scalars
