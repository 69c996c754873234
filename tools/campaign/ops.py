"""Call all ops with random valid arguments, checked in float64, and with random invalid arguments.

A valid call must give the reference's result on these numbers in float64, within rounding, and
exactly if all sums are exact. On numbers that are not finite or near the limits of float32 it must
give equal bits at every number of threads. An invalid call must raise an error that names the op or
an argument.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from campaign.frame import Campaign, Failed, Try
from campaign.op_cases import EXACT_VALUES, RIGHT, TAME_VALUES, Arguments, Draw, spoil
from sae_fast import ops as public
from sae_fast.ops import SparseCode, reference

NATIVE_OPS = torch.ops.sae_fast
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # x, W_enc, b_enc, b_dec
REFUSALS = (RuntimeError, ValueError, TypeError)
ROUNDING = 2.0**-24
MANY = 16 * 2.0**-24  # error of sums of some hundred terms, relative to the sum of magnitudes


def attempt(chance: Try) -> str:
    """Make one call, or one small program of calls; return its kind."""
    warnings.simplefilter("ignore")
    draw = Draw(chance.random)
    kinds = (_right, _wrong, _hand_made, _gradients, _threads, _autocast, _compiled)
    kind = chance.random.choices(kinds, (40, 40, 8, 8, 2, 2, 0.05))[0]
    return kind(draw)


# Right calls


def _right(draw: Draw) -> str:
    name = draw.chance.choice(list(RIGHT))
    arguments = RIGHT[name](draw)
    results = _call(name, arguments)
    torch.set_num_threads(draw.chance.choice((1, 2, 3, 7)))
    again = _call(name, arguments)
    torch.set_num_threads(1)
    if name != "dense_product":  # it calls torch.mm on most processors
        _same_bits(name, results, again, "another number of threads")
    if name.startswith("encode"):
        _check_encoder(name, arguments, results, draw.kind)
    elif draw.kind in TAME_VALUES:
        _check_result(name, arguments, results)
    return f"right {name}"


def _call(name: str, arguments: Arguments) -> list[Tensor]:
    """Call an op with copies of its arguments; return its results and the arguments it wrote."""
    copies = {n: a.clone() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    op = getattr(NATIVE_OPS, name).default
    result = op(*copies.values())
    written = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    outputs = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    if name == "row_gradient_norm":  # only the cache's rows with a slot are written
        outputs[2] = outputs[2][outputs[3][outputs[3] >= 0].long()]
    return outputs + [copies[n] for n in written if copies[n] is not None]


def _same_bits(name: str, one: list[Tensor], other: list[Tensor], why: str) -> None:
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        if not torch.equal(_bits(a), _bits(b)):
            raise Failed(f"{name}: result {number} has other bits with {why}")


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.view(whole[tensor.element_size()])
    return torch.where(tensor.isnan(), 0, bits) if tensor.is_floating_point() else bits


def _check_encoder(name: str, arguments: Arguments, results: list[Tensor], kind: str) -> None:
    if arguments["precision"] in ("screened", "fp32"):
        other = "fp32" if arguments["precision"] == "screened" else "screened"
        _same_bits(name, results, _call(name, arguments | {"precision": other}), other)
    packed = NATIVE_OPS.pack_encoder(arguments["W_enc"], arguments["precision"])
    copies = dict(zip(("packed", "stats", "rounded"), packed, strict=True))
    _same_bits(name, results, _call(name, arguments | copies), "a packed encoder")
    d_sae = len(arguments["W_enc"])
    for indices in (r for r in results if r.dtype == torch.int32):
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < d_sae:
            raise Failed(f"{name}: an index is outside the dictionary")
    if kind in EXACT_VALUES:
        wide = getattr(reference, name)(*_in_float64(arguments).values())
        _equal(name, results, wide)
    elif kind in TAME_VALUES:
        _check_selection(name, arguments, results)


def _equal(name: str, results: list[Tensor], expected: Any) -> None:
    for number, (a, b) in enumerate(zip(results, expected, strict=True)):
        if a.shape != b.shape or not torch.equal(a.double(), b.double()):
            raise Failed(f"{name}: result {number} is not exact")


def _check_selection(name: str, arguments: Arguments, results: list[Tensor]) -> None:
    """Raise Failed if a value is not its latent's pre-activation or a larger one is missing."""
    pre_acts, slack = _pre_activations(arguments)
    code = _code_of(name, results, len(arguments["W_enc"]))
    rows, latents = code.entry_rows(), code.indices.flatten().long()
    values = code.values.flatten().double()
    fires = values != 0
    known, room = pre_acts[rows, latents], slack[rows, latents]
    if ((values - known).abs() > room)[fires].any() or (known > room)[~fires].any():
        filled = name == "encode_batch_topk" and not fires.all()
        if ((values - known).abs() > room)[fires].any() or not filled:
            raise Failed(f"{name}: a value is not the pre-activation of its latent")
    chosen = torch.zeros_like(pre_acts, dtype=torch.bool)
    chosen[rows[fires], latents[fires]] = True
    rest = pre_acts.masked_fill(chosen, -torch.inf)
    if name == "encode_threshold":
        left_out = rest > arguments["threshold"].double().clamp_min(0) + slack
    elif name == "encode_topk":
        floor = code.values.double()[:, -1:].expand_as(rest)
        left_out = rest > floor + 2 * slack.amax(1, keepdim=True)
    else:
        floor = values[fires].min() if bool(fires.all()) and len(values) else torch.zeros(())
        left_out = rest > floor.double() + 2 * (slack.max() if slack.numel() else 0.0)
    if left_out.any():
        raise Failed(f"{name}: a larger entry was left out")


def _code_of(name: str, results: list[Tensor], d_sae: int) -> SparseCode:
    offsets = None if name == "encode_topk" else results[2]
    return SparseCode(results[0], results[1], d_sae, offsets)


def _pre_activations(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return (x − b_dec) W_encᵀ + b_enc in float64, and the error allowed in float32."""
    dtype = LOW.get(arguments["precision"], torch.float32)
    centred = (arguments["x"] - arguments["b_dec"]).to(dtype).double()
    W_enc, b_enc = arguments["W_enc"].to(dtype).double(), arguments["b_enc"].double()
    magnitude = centred.abs() @ W_enc.abs().t() + b_enc.abs()
    return centred @ W_enc.t() + b_enc, MANY * magnitude + 1e-30


def _in_float64(arguments: Arguments) -> Arguments:
    """Return the arguments with floating-point tensors in float64, with their rounded values."""
    floating = (torch.float32, torch.bfloat16, torch.float16)
    return {
        name: a.double().contiguous() if isinstance(a, Tensor) and a.dtype in floating else a
        for name, a in arguments.items()
    }


def _check_result(name: str, arguments: Arguments, results: list[Tensor]) -> None:
    if name in ("pack_encoder", "code_correlation", "code_correlation_backward", "decorrelation"):
        return _check_finite(name, results)
    if name == "fused_update_":
        return _check_update(arguments, results)
    wide = _in_float64(arguments)
    wide = {n: a.clone() if isinstance(a, Tensor) else a for n, a in wide.items()}
    expected = getattr(reference, name)(*wide.values())
    op = getattr(NATIVE_OPS, name).default
    written = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    outputs = [] if expected is None else [expected] if isinstance(expected, Tensor) else expected
    outputs = [*outputs, *(wide[n] for n in written if wide[n] is not None)]
    if name == "row_gradient_norm":
        results, outputs = results[:2], outputs[:2]
    if name == "update_vector_" and "signum" in arguments["rule"]:
        results, outputs = (
            results[1:],
            outputs[1:],
        )  # w moves by the sign of a sum, which rounding decides where it is 0
    magnitude = _magnitude(name, arguments)
    for number, (a, b) in enumerate(zip(results, outputs, strict=True)):
        _close(f"{name}: result {number}", a, b, magnitude)


def _magnitude(name: str, arguments: Arguments) -> float:
    """Return an upper bound of the sums of magnitudes in every number of a result."""
    floats = [a for a in arguments.values() if isinstance(a, Tensor) and a.is_floating_point()]
    largest = [float(a.double().abs().max()) for a in floats if a.numel()]
    products = max([1.0, *largest]) ** (4 if name == "row_gradient_norm" else 3)
    terms = max([1, *(a.numel() for a in arguments.values() if isinstance(a, Tensor))])
    return products * terms


def _close(what: str, actual: Tensor, expected: Tensor, magnitude: float) -> None:
    if actual.shape != expected.shape:
        raise Failed(f"{what} has shape {list(actual.shape)}, not {list(expected.shape)}")
    wide, right = actual.double(), expected.double()
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(actual.dtype, ROUNDING)
    allowed = 8 * rounding * right.abs() + 8 * ROUNDING * magnitude
    same = (wide == right) | (wide.isnan() & right.isnan())
    wrong = ~(same | ((wide - right).abs() <= allowed))
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0])
        pair = f"{wide.flatten()[at]} instead of {right.flatten()[at]}"
        raise Failed(f"{what} is off at {at}: {pair}")


def _check_finite(name: str, results: list[Tensor]) -> None:
    for number, result in enumerate(results):
        if result.is_floating_point() and not result.isfinite().all():
            raise Failed(f"{name}: result {number} is not finite")


def _check_update(arguments: Arguments, results: list[Tensor]) -> None:
    """Compare the new weights with the reference; the tests check the 8-bit moments."""
    if "signum" in arguments["rule"]:
        return _check_finite("fused_update_", results)
    given = {n: a.clone() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    if given["exp_avg"].dtype == torch.float32:
        given = _in_float64(given)
    for name in ("W", "exp_avg", "exp_avg_sq"):
        if given[name] is not None:
            given[name] = given[name].clone()
    apply: Callable[..., None] = reference.fused_update_
    apply(*given.values())
    if arguments["unit_norm"] and arguments["W"].numel() and not bool(given["W"].any(dim=1).all()):
        return None  # rounding errors in rows of 0 become rows of length 1
    largest = float(given["W"].abs().max()) if given["W"].numel() else 0.0
    return _close("fused_update_: W", results[0], given["W"], 64 * (1 + largest))


# Wrong calls


def _wrong(draw: Draw) -> str:
    name = draw.chance.choice(list(RIGHT))
    arguments = RIGHT[name](draw)
    spoiled = spoil(draw, arguments)
    names = [name, *arguments]
    try:
        getattr(NATIVE_OPS, name).default(*arguments.values())
    except REFUSALS as error:
        _check_refusal(f"{name} with another {spoiled}", error, names)
        return "wrong, refused"
    return "wrong, but possible"


def _check_refusal(what: str, error: Exception, names: list[str]) -> None:
    message = str(error)
    if not any(name in message for name in names):
        raise Failed(f"{what}: the message names neither op nor argument: {message[:300]}")
    if "INTERNAL ASSERT" in message:
        raise Failed(f"{what}: the message is not for a user: {message[:300]}")


# Hand-made codes, through the public functions


def _hand_made(draw: Draw) -> str:
    n, d_in, d_sae = draw.shape()
    given: Arguments = dict(zip(("values", "indices", "offsets"), draw.code(n, d_sae), strict=True))
    spoiled = spoil(draw, given) if draw.chance.random() < 0.7 else ""
    W_dec, b_dec = draw.floats(d_sae, d_in).contiguous(), draw.floats(d_in).contiguous()
    W_dec.requires_grad_()
    use = draw.chance.choice((_use_dense, _use_decode, _use_factors, _use_prefixes, _use_lists))
    try:
        values, indices, offsets = given.values()
        if isinstance(values, Tensor) and values.is_floating_point():
            values = values.detach().requires_grad_()
        code = SparseCode(values, indices, d_sae, offsets)
        use(draw, code, W_dec, b_dec)
    except REFUSALS as error:
        if not spoiled and use is not _use_prefixes:
            raise Failed(f"a right code was refused in {use.__name__}: {error}") from error
        names = [*given, "SparseCode", "prefixes", "numbers", *RIGHT]
        _check_refusal(f"a code with another {spoiled}", error, names)
        return "code, refused"
    return "code, taken"


def _use_dense(draw: Draw, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> None:
    torch.autograd.backward(code.dense().sum())
    code.l0(), code.fired(), code.entry_rows()


def _use_decode(draw: Draw, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> None:
    x_hat = public.decode(code, W_dec, b_dec, precision=draw.chance.choice(("fp32", "bf16")))
    residual = public.reconstruct(code, W_dec, b_dec, torch.zeros_like(x_hat))
    torch.autograd.backward(x_hat.square().sum() + residual.squared_error.sum())


def _use_factors(draw: Draw, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> None:
    torch.autograd.backward(public.decode(code, W_dec, b_dec, dense_grad=False).square().sum())
    (factor,) = W_dec.row_factors  # type: ignore[attr-defined]
    latent_offsets, entries, rows = factor.latent_major(len(W_dec))
    coefficients = public.gather_entries(factor.coefficients, entries)
    public.row_gradient_norm(latent_offsets, rows, coefficients, factor.dense)


def _use_prefixes(draw: Draw, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> None:
    code.check()
    prefixes = sorted({draw.chance.randint(1, len(W_dec)), len(W_dec)})
    x = torch.zeros(code.n_rows, W_dec.shape[1])
    torch.autograd.backward(
        public.reconstruct_prefixes(code, W_dec, b_dec, x, prefixes).squared_errors.sum()
    )


def _use_lists(draw: Draw, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> None:
    numbers = torch.ones(code.d_sae, requires_grad=True)
    torch.autograd.backward((code.spread(numbers) * code.values).sum())
    code.latent_major(), code.fired(), code.l0()


# Gradients of whole programs


def _gradients(draw: Draw) -> str:
    if draw.kind not in TAME_VALUES:
        draw.kind = "normal"
    name, encode = draw.chance.choice(list(_ENCODERS.items()))
    given = _leaves(draw)
    W_dec = draw.floats(*given[1].shape).contiguous().requires_grad_()
    code = encode(draw, given)
    residual = public.reconstruct(code, W_dec, given[3], given[0])
    loss = residual.squared_error.sum() + code.values.sum()
    actual = torch.autograd.grad(loss, (*given, W_dec), allow_unused=True)
    wide = [t.detach().double().requires_grad_() for t in (*given, W_dec)]
    x, W_enc, b_enc, b_dec, decoder = wide
    rows, latents = code.entry_rows(), code.indices.flatten().long()
    pre_acts = ((x - b_dec) @ W_enc.t() + b_enc)[rows, latents]
    values = torch.where(code.values.detach().flatten() != 0, pre_acts, 0.0)
    dense = torch.zeros(len(x), len(W_enc), dtype=torch.float64)
    x_hat = dense.index_put((rows, latents), values, accumulate=True) @ decoder + b_dec
    expected = torch.autograd.grad((x_hat - x).square().sum() + values.sum(), wide)
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        scale = _gradient_scale(wide) + 64 * (float(b.abs().max()) if b.numel() else 0.0)
        _close(f"gradient {number} of {name}", torch.zeros(b.shape) if a is None else a, b, scale)
    return f"gradients of {name}"


def _leaves(draw: Draw) -> Weights:
    x, W_enc, b_enc, b_dec = (t.detach().clone().requires_grad_() for t in draw.encoder())
    return x, W_enc, b_enc, b_dec


def _gradient_scale(tensors: list[Tensor]) -> float:
    largest = max([1.0, *(float(t.detach().abs().max()) for t in tensors if t.numel())])
    terms = max([1, *(t.numel() for t in tensors)])
    return largest**5 * terms * 16


def _k(draw: Draw, given: Weights) -> int:
    return draw.chance.randint(1, len(given[1]))


_ENCODERS: dict[str, Callable[[Draw, Weights], SparseCode]] = {
    "topk": lambda draw, given: public.encode_topk(*given, _k(draw, given)),
    "batch_topk": lambda draw, given: public.encode_batch_topk(*given, _k(draw, given)),
    "threshold": lambda draw, given: public.encode_threshold(*given, given[2].detach().abs()),
    "abs_topk": lambda draw, given: public.encode_abs_topk(*given, _k(draw, given)),
    "groupmax": lambda draw, given: public.encode_groupmax(*given, 1),
}


# Calls with threads, autocast and torch.compile


def _threads(draw: Draw) -> str:
    """Make valid calls from several threads while another changes the number of threads."""
    names = [draw.chance.choice(list(RIGHT)) for _ in range(6)]
    calls = [(name, RIGHT[name](draw)) for name in names]
    expected = [_call(*call) for call in calls]
    wrong: list[str] = []

    def work(order: list[int]) -> None:
        for number in order:
            try:
                _same_bits(names[number], _call(*calls[number]), expected[number], "other threads")
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")

    orders = [draw.chance.choices(range(6), k=12) for _ in range(4)]
    workers = [threading.Thread(target=work, args=(order,)) for order in orders]
    for worker in workers:
        worker.start()
    for count in (2, 1, 3, 1):
        torch.set_num_threads(count)
    for worker in workers:
        worker.join()
    if wrong:
        raise Failed(wrong[0])
    return "from several threads"


def _autocast(draw: Draw) -> str:
    if draw.kind not in TAME_VALUES:
        draw.kind = "normal"
    name, encode = draw.chance.choice(list(_ENCODERS.items()))
    given = _leaves(draw)
    seed = draw.chance.getrandbits(30)

    def program() -> list[Tensor]:
        draw.chance.seed(seed)
        code = encode(draw, given)
        loss = public.reconstruct(code, given[1], given[3], given[0]).squared_error.sum()
        return [code.values, loss, *torch.autograd.grad(loss, given)]

    expected = program()
    with torch.autocast("cpu", dtype=draw.chance.choice((torch.bfloat16, torch.float16))):
        _same_bits(name, program(), expected, "autocast")
    return "under autocast"


def _compiled(draw: Draw) -> str:
    draw.kind = "normal"
    x, W_enc, b_enc, b_dec = (t.contiguous() for t in draw.encoder())
    k = _k(draw, (x, W_enc, b_enc, b_dec))

    def program(x: Tensor) -> Tensor:
        code = public.encode_topk(x, W_enc, b_enc, b_dec, k)
        return public.decode(code, W_enc, b_dec) + code.dense() @ W_enc

    compiled = torch.compile(program, backend="aot_eager")
    if not torch.allclose(compiled(x), program(x), rtol=1e-4, atol=1e-3):
        raise Failed("a compiled program gives another result")
    return "compiled"


CAMPAIGN = Campaign(attempt, tries=20_000, short=400, seconds=120.0, block=200)
