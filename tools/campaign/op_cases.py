"""Random valid and invalid arguments for every op of the schema, for the campaign `ops`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

PRECISIONS = ("screened", "fp32", "bf16", "fp16")
RULES = ("adam", "sgd", "signum", "schedule_free_signum")
VALUES = ("normal", "integers", "zeros", "denormal", "huge", "not finite", "mixed scales")
EXACT_VALUES = ("integers", "zeros")  # sums are exact in float32
TAME_VALUES = ("normal", "integers", "zeros")  # sums stay far from the ends of float32
Arguments = dict[str, Any]


class Draw:
    """The random shapes, tensors and codes of one try."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.generator = torch.Generator().manual_seed(chance.getrandbits(60))
        self.kind = chance.choices(VALUES, (5, 3, 1, 1, 1, 1, 1))[0]

    def size(self, most: int = 40) -> int:
        """Draw a size: often 0, 1, odd or near a number of SIMD lanes, sometimes large."""
        near = self.chance.choice((1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65))
        large = self.chance.choice((130, 257, 700))
        return self.chance.choices((0, near, self.chance.randint(1, most), large), (1, 6, 6, 1))[0]

    def shape(self) -> tuple[int, int, int]:
        """Draw N, D and F >= 1."""
        return self.size(), self.size(), max(1, self.size(90))

    def floats(self, *shape: int) -> Tensor:
        """Draw a float32 tensor with numbers of this try's kind, not always contiguous."""
        tensor = torch.randn(shape, generator=self.generator)
        if self.kind == "integers":
            tensor = (2 * tensor).round().clamp(-3, 3)
        elif self.kind == "zeros":
            tensor = tensor * (torch.rand(shape, generator=self.generator) < 0.1)
            tensor = tensor.round()
        elif self.kind == "denormal":
            tensor = tensor * 1e-41
        elif self.kind == "huge":
            tensor = tensor * 10.0 ** self.chance.choice((15, 18, 20, 37))
        elif self.kind == "not finite":
            wrong = torch.rand(shape, generator=self.generator) < self.chance.choice((0.01, 0.4))
            tensor = torch.where(wrong, self.chance.choice((torch.nan, torch.inf)), tensor)
        elif self.kind == "mixed scales" and shape:
            rows = torch.rand(shape[0], generator=self.generator) < 0.1
            tensor = torch.where(rows.view(-1, *(1,) * (len(shape) - 1)), 1e6 * tensor, tensor)
        return self.strided(tensor)

    def strided(self, tensor: Tensor) -> Tensor:
        """Return a tensor with equal shape and numbers in a random memory layout.

        One of the layouts repeats the first row.
        """
        way = self.chance.randrange(8)
        if way == 0 and tensor.dim() == 2:
            return tensor.t().contiguous().t()
        if way == 1 and tensor.dim() > 0:
            wide = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
            wide[..., ::2] = tensor
            return wide[..., ::2]
        if way == 2 and tensor.dim() == 2:
            padded = tensor.new_zeros(tensor.shape[0] + 2, tensor.shape[1] + 3)
            padded[1:-1, 2:-1] = tensor
            return padded[1:-1, 2:-1]
        if way == 3 and tensor.dim() == 2 and tensor.shape[0] > 0:
            return tensor[:1].expand(tensor.shape)
        return tensor

    def encoder(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw x [N, D], W_enc [F, D], b_enc [F] and b_dec [D]."""
        n, d_in, d_sae = self.shape()
        return (
            self.floats(n, d_in),
            self.floats(d_sae, d_in),
            self.floats(d_sae),
            self.floats(d_in),
        )

    def code(self, n: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw values, indices and offsets of a code with repeated latents and zeros."""
        csr = self.chance.random() < 0.5
        k = self.size(12)
        count = n * k
        indices = torch.randint(0, d_sae, (count,), generator=self.generator, dtype=torch.int32)
        if self.chance.random() < 0.2:
            indices[:] = self.chance.randrange(d_sae)
        values = self.floats(count) if count else torch.zeros(0)
        values = torch.where(torch.rand(count, generator=self.generator) < 0.2, 0.0, values)
        if not csr:
            return values.view(n, k), self.strided(indices.view(n, k)), None
        cuts = torch.randint(0, count + 1, (max(n - 1, 0),), generator=self.generator)
        ends = [0] if n == 0 else [0, *sorted(cuts.tolist()), count]
        return self.strided(values), indices, torch.tensor(ends)

    def table(self, rows: int, columns: int) -> Tensor:
        """Draw a matrix in one of the dtypes from which ops gather rows."""
        dtype = self.chance.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
        return self.floats(rows, columns).to(dtype)

    def latent_lists(self, n: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw latent_offsets, rows and coefficients of a random code with n >= 1 rows."""
        values, indices, offsets = self.code(n, d_sae)
        ops = torch.ops.sae_fast
        latent_offsets, entries, rows = ops.latent_major(values, indices, offsets, d_sae)
        return latent_offsets, rows, values.flatten()[entries.long()]

    def maybe(self, tensor: Tensor) -> Tensor | None:
        """Return the tensor or, with probability 1/2, None."""
        return tensor if self.chance.random() < 0.5 else None


def _encode(draw: Draw) -> Arguments:
    x, W_enc, b_enc, b_dec = draw.encoder()
    d_sae = len(W_enc)
    dead = torch.rand(d_sae, generator=draw.generator) < draw.chance.choice((0.0, 0.1, 1.0))
    dead_mask = draw.maybe(dead)
    k_aux = 0 if dead_mask is None else draw.chance.randint(0, d_sae)
    k = draw.chance.choice((1, d_sae, draw.chance.randint(1, d_sae)))
    return {
        **{"x": x, "W_enc": W_enc, "b_enc": b_enc, "b_dec": b_dec, "k": k},
        **{"precision": draw.chance.choice(PRECISIONS), "dead_mask": dead_mask, "k_aux": k_aux},
        **_copies(draw, W_enc),
    }


def _copies(draw: Draw, W_enc: Tensor) -> Arguments:
    return dict.fromkeys(("packed", "stats", "rounded"))


def _encode_threshold(draw: Draw) -> Arguments:
    arguments = _encode(draw)
    for name in ("k", "dead_mask", "k_aux"):
        del arguments[name]
    precision, copies = arguments.pop("precision"), _copies(draw, arguments["W_enc"])
    for name in copies:
        del arguments[name]
    threshold = draw.floats(len(arguments["W_enc"])) * draw.chance.choice((0.0, 1.0, 3.0))
    return {**arguments, "threshold": threshold, "precision": precision, **copies}


def _decode(draw: Draw) -> Arguments:
    n, d_in, d_sae = draw.shape()
    values, indices, offsets = draw.code(n, d_sae)
    bias = draw.maybe(draw.floats(d_in))
    W_dec = draw.table(d_sae, d_in)
    return {"values": values, "indices": indices, "offsets": offsets, "W_dec": W_dec, "b_dec": bias}


def _reconstruct(draw: Draw) -> Arguments:
    arguments = _decode(draw)
    n = _rows(arguments["indices"], arguments["offsets"])
    return {**arguments, "x": draw.floats(n, arguments["W_dec"].shape[1])}


def _decode_backward(draw: Draw) -> Arguments:
    arguments = _reconstruct(draw)
    kept = {name: arguments[name] for name in ("indices", "offsets", "W_dec")}
    return {"grad": arguments["x"], **kept}


def _accumulate_rows(draw: Draw) -> Arguments:
    n, d_in, d_sae = draw.shape()
    coefficients, indices, offsets = draw.code(n, d_sae)
    code = {"coefficients": coefficients, "indices": indices, "offsets": offsets}
    return {**code, "dense": draw.table(n, d_in), "d_sae": d_sae}


def _latent_major(draw: Draw) -> Arguments:
    n, _, d_sae = draw.shape()
    values, indices, offsets = draw.code(n, d_sae)
    return {"values": values, "indices": indices, "offsets": offsets, "d_sae": d_sae}


def _gather_entries(draw: Draw) -> Arguments:
    source = draw.floats(*(max(1, draw.size()) for _ in range(draw.chance.randint(1, 3))))
    count = draw.size(100)
    bound = source.numel()
    entries = torch.randint(0, bound, (count,), generator=draw.generator, dtype=torch.int32)
    return {"source": source, "entries": draw.strided(entries)}


def _latent_sums(draw: Draw) -> Arguments:
    gathered, d_sae = _gather_entries(draw), max(1, draw.size())
    count = gathered["entries"].numel()
    cuts = torch.randint(0, count + 1, (d_sae - 1,), generator=draw.generator)
    offsets = torch.tensor([0, *sorted(cuts.tolist()), count])
    entries, coefficients = gathered["entries"], gathered["source"]
    return {"latent_offsets": offsets, "entries": entries, "coefficients": coefficients}


def _gradient(draw: Draw) -> Arguments:
    n, d_in, d_sae = max(1, draw.size()), draw.size(), max(1, draw.size(90))
    latent_offsets, rows, coefficients = draw.latent_lists(n, d_sae)
    lists = {"latent_offsets": latent_offsets, "rows": rows, "coefficients": coefficients}
    shift, extra = draw.maybe(draw.floats(d_in)), draw.maybe(draw.floats(d_sae, d_in))
    return {**lists, "dense": draw.table(n, d_in), "shift": shift, "extra_grad": extra}


def _row_gradient_norm(draw: Draw) -> Arguments:
    arguments = _gradient(draw)
    extra_grad = arguments.pop("extra_grad")
    d_sae, d_in = len(arguments["latent_offsets"]) - 1, arguments["dense"].shape[1]
    onto = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=draw.generator), dim=1)
    return {**arguments, "project_onto": draw.maybe(onto), "extra_grad": extra_grad}


def _scalars(draw: Draw, rule: str) -> Arguments:
    chance = draw.chance
    squared_norm = chance.choice((0.0, 1.0, 9.0, 1e30, torch.inf, torch.nan, 1e-30))
    squares = torch.tensor(chance.choice((0.0, 1e-4)), dtype=torch.float64)
    return {
        "squared_norm": torch.tensor(squared_norm, dtype=torch.float64),
        "lr": torch.tensor(chance.choice((0.0, 1e-3, 1e-2)), dtype=torch.float64),
        "loss_scale": torch.tensor(chance.choice((1.0, 1024.0))),
        "step_count": torch.tensor(chance.choice((0, 2, 10**6))),
        "halted": torch.tensor(chance.choice((-1, -1, -1, 0, 5))),
        "lr_squares": squares if rule == "schedule_free_signum" else None,
        "rule": rule,
        "grad_clip": chance.choice((0.0, 1.5)),
        "beta1": chance.choice((0.0, 0.9)),
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": chance.choice((0.0, 0.1)),
        "skip_overflow": chance.random() < 0.5,
        "fault": draw.maybe(torch.tensor(0.0)),
        "losses": draw.maybe(draw.floats(max(1, draw.size()))),
    }


def _update_scalars(draw: Draw) -> Arguments:
    return _scalars(draw, draw.chance.choice(RULES))


def _step(draw: Draw, rule: str) -> Tensor:
    """Draw the scalars of a step, which is skipped only rarely."""
    arguments = _scalars(draw, rule)
    arguments |= {"squared_norm": torch.tensor(1.0, dtype=torch.float64), "losses": None}
    scalars: Tensor = torch.ops.sae_fast.update_scalars(*arguments.values())[1]
    return scalars


def _fused_update(draw: Draw) -> Arguments:
    factors = _gradient(draw)
    d_sae, d_in = len(factors["latent_offsets"]) - 1, factors["dense"].shape[1]
    rule, project = draw.chance.choice(RULES), draw.chance.random() < 0.5
    W = draw.floats(d_sae, d_in).contiguous().clone()
    lists = {name: factors[name] for name in ("latent_offsets", "rows", "coefficients")}
    onto = W if project else None
    terms = (*lists.values(), factors["dense"], factors["shift"])
    measured = torch.ops.sae_fast.row_gradient_norm(*terms, onto, factors["extra_grad"])
    moments = _moments(draw, rule, d_sae, d_in)
    return {
        **{"W": W, **moments, **factors},
        **dict(zip(("sums", "cached", "cache_slots"), measured[1:], strict=True)),
        **{"scalars": _step(draw, rule), "step_count": torch.tensor(draw.chance.randint(1, 2**40))},
        **{"rule": rule, "project": project, "unit_norm": draw.chance.random() < 0.5},
        **dict.fromkeys(("packed", "stats", "rounded")),
        "precision": draw.chance.choice(PRECISIONS),
    }


def _moments(draw: Draw, rule: str, d_sae: int, d_in: int) -> Arguments:
    dtype = draw.chance.choice((torch.float32, torch.float32, torch.bfloat16, torch.uint8))
    blocks, has_square = -(-d_in // 256), rule == "adam"
    shape = d_sae, d_in

    def moment() -> Tensor:
        if dtype == torch.uint8:
            return torch.randint(0, 256, shape, generator=draw.generator, dtype=dtype)
        return (0.1 * torch.randn(shape, generator=draw.generator)).abs().to(dtype)

    def scale() -> Tensor | None:
        return torch.full((d_sae, blocks), 2.0**-20) if dtype == torch.uint8 else None

    square = (moment(), scale()) if has_square else (None, None)
    first = moment(), scale()
    names = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    return dict(zip(names, (first[0], square[0], first[1], square[1]), strict=True))


def _update_vector(draw: Draw) -> Arguments:
    shape = [draw.size() for _ in range(draw.chance.randint(0, 3))]
    rule = draw.chance.choice(RULES)
    w = draw.floats(*shape).contiguous().clone()
    exp_avg = torch.randn(shape, generator=draw.generator)
    square = exp_avg.square() if rule == "adam" else None
    grad = draw.maybe(draw.floats(*shape))
    arguments: Arguments = {"w": w, "exp_avg": exp_avg, "exp_avg_sq": square, "grad": grad}
    arguments |= {"scalars": _step(draw, rule), "rule": rule}
    parts = ("second_w", "second_exp_avg", "second_exp_avg_sq", "second_grad")
    if draw.chance.random() < 0.5:
        return arguments | dict.fromkeys(parts)
    size = draw.size()
    others: list[Tensor | None] = [torch.rand(size, generator=draw.generator) for _ in parts]
    if rule != "adam":
        others[2] = None
    return arguments | dict(zip(parts, others, strict=True))


def _batch_statistics(draw: Draw) -> Arguments:
    n, d_in, d_sae = max(1, draw.size()), draw.size(), max(1, draw.size(90))
    shape = (n, draw.chance.randint(0, 4))
    indices = torch.randint(0, d_sae, shape, generator=draw.generator).int()
    return {
        **{"squared_error": draw.floats(n).abs(), "target": draw.floats(n, d_in)},
        **{"values": draw.floats(*shape), "indices": indices},
        **{"variance": draw.maybe(torch.tensor(2.0)), "d_sae": d_sae},
        "is_signed": draw.chance.random() < 0.5,
    }


def _code_gradients(draw: Draw) -> Arguments:
    n, k = draw.size(), draw.size()
    dots, values = draw.floats(n, k), draw.floats(n, k)
    return {"residual_dot": dots, "values": values, "grad_error": draw.floats(n)}


def _weighted_row_sum(draw: Draw) -> Arguments:
    n, d_in = draw.size(), draw.size()
    factor = draw.chance.choice((1.0, -1.0, 0.0, 0.3))
    return {"weights": draw.floats(n), "matrix": draw.table(n, d_in), "factor": factor}


def _add_squares(draw: Draw) -> Arguments:
    shape = [draw.size() for _ in range(draw.chance.randint(0, 3))]
    return {
        **{"total": torch.tensor(2.0, dtype=torch.float64), "grad": draw.floats(*shape)},
        "second": draw.maybe(draw.floats(draw.size())),
        "more": draw.maybe(torch.tensor(1.5, dtype=torch.float64)),
    }


def _finish_step(draw: Draw) -> Arguments:
    chance = draw.chance
    d_sae, count = draw.size(), chance.randint(0, 9)
    numbers = (0.0, 1.0, torch.inf, torch.nan)
    return {
        **{"poison": torch.tensor(chance.choice((0.0, torch.nan))), "steps": torch.tensor(3)},
        **{"metrics": torch.zeros(count + 2), "tokens_since_fired": torch.arange(d_sae)},
        **{
            "fault": draw.maybe(torch.tensor(chance.choice((0.0, torch.nan)))),
            "losses": draw.floats(count),
        },
        **{name: torch.tensor(chance.choice(numbers)) for name in ("norm", "variance")},
        "fired": torch.rand(d_sae, generator=draw.generator) < 0.5,
        **{"n_tokens": chance.choice((0, 1, 4096)), "norm_poisons": chance.random() < 0.5},
    }


def _normalize_rows(draw: Draw) -> Arguments:
    _, d_in, d_sae = draw.shape()
    return {"W": draw.floats(d_sae, d_in).contiguous().clone()}


def _full_batches(draw: Draw) -> Arguments:
    _, d_in, d_sae = draw.shape()
    return {"like": draw.floats(d_sae, d_in)}


def _decorrelation(draw: Draw) -> Arguments:
    _, d_in, d_sae = draw.shape()
    return {"W": draw.floats(d_sae, d_in)}


def _dense_product(draw: Draw) -> Arguments:
    rows, depth, columns = draw.shape()
    left, right = draw.floats(rows, depth), draw.floats(depth, columns)
    options = {"relu": draw.chance.random() < 0.5, "precision": draw.chance.choice(PRECISIONS)}
    return {"left": left, "right": right, "bias": draw.maybe(draw.floats(columns)), **options}


def _gather_rows(draw: Draw) -> Arguments:
    chance = draw.chance
    m, d_in, stored = draw.size(), draw.size(), max(1, draw.size())
    out = torch.zeros(m, d_in)
    count = chance.randint(0, m)
    placed = torch.randperm(m, generator=draw.generator)[:count]
    places = draw.maybe(placed)
    wanted = m if places is None else count
    rows = torch.randint(0, stored, (wanted,), generator=draw.generator)
    mean = draw.maybe(draw.floats(d_in))
    arguments = {"out": out, "places": places, "source": draw.table(stored, d_in), "rows": rows}
    return {**arguments, "mean": mean, "scale": chance.choice((1.0, 0.3, 0.0, -2.0))}


def _code_correlation(draw: Draw) -> Arguments:
    n, _, d_sae = draw.shape()
    h = draw.floats(n, d_sae).relu()
    return {"h": h, "split": draw.chance.choice((0, d_sae, draw.chance.randint(0, d_sae)))}


def _code_correlation_backward(draw: Draw) -> Arguments:
    arguments = _code_correlation(draw)
    outputs = torch.ops.sae_fast.code_correlation(*arguments.values())
    grads = {name: draw.maybe(torch.tensor(0.5)) for name in ("grad_within", "grad_between")}
    kept = dict(zip(("means", "inverse_norms", "gram"), outputs[3:], strict=True))
    return {**grads, **arguments, **kept}


def _pack_encoder(draw: Draw) -> Arguments:
    _, d_in, d_sae = draw.shape()
    return {"W_enc": draw.floats(d_sae, d_in), "precision": draw.chance.choice(PRECISIONS)}


def _rows(indices: Tensor, offsets: Tensor | None) -> int:
    return indices.shape[0] if offsets is None else offsets.numel() - 1


RIGHT: dict[str, Callable[[Draw], Arguments]] = {
    "pack_encoder": _pack_encoder,
    "encode_topk": _encode,
    "encode_batch_topk": _encode,
    "encode_threshold": _encode_threshold,
    "decode": _decode,
    "decode_backward": _decode_backward,
    "reconstruct": _reconstruct,
    "accumulate_rows": _accumulate_rows,
    "latent_major": _latent_major,
    "gather_entries": _gather_entries,
    "latent_sums": _latent_sums,
    "row_gradient_norm": _row_gradient_norm,
    "update_scalars": _update_scalars,
    "fused_update_": _fused_update,
    "update_vector_": _update_vector,
    "batch_statistics": _batch_statistics,
    "code_gradients": _code_gradients,
    "weighted_row_sum": _weighted_row_sum,
    "add_squares_": _add_squares,
    "finish_step_": _finish_step,
    "normalize_rows_": _normalize_rows,
    "full_batches": _full_batches,
    "gather_rows_": _gather_rows,
    "decorrelation": _decorrelation,
    "dense_product": _dense_product,
    "code_correlation": _code_correlation,
    "code_correlation_backward": _code_correlation_backward,
}


def spoil(draw: Draw, arguments: Arguments) -> str:
    """Replace one or two arguments by values that may not fit; return the names replaced."""
    count = min(len(arguments), draw.chance.choice((1, 1, 1, 2)))
    names = draw.chance.sample(list(arguments), count)
    for name in names:
        value = arguments[name]
        arguments[name] = _spoiled_tensor(draw, value) if isinstance(value, Tensor) else _odd(draw)
    return ", ".join(names)


def _odd(draw: Draw) -> Any:
    """Draw a value that is not a tensor, or an unusual array."""
    odd: tuple[Any, ...] = (None, True, "x", "fp32", b"x", [1], (), {}, 1j, torch.zeros(()))
    numbers = (0, -1, 2**31, 2**63 - 1, -(2**63), 2**70, 0.5, torch.nan, torch.inf)
    return draw.chance.choice((*odd, *numbers, numpy.zeros((2, 2), dtype=numpy.float32)))


def _spoiled_tensor(draw: Draw, tensor: Tensor) -> Any:
    ways = (_other_numbers, _other_shape, _other_dtype, _other_kind, _other_memory)
    if draw.chance.random() < 0.1:
        return _odd(draw)
    return draw.chance.choices(ways, (4, 2, 1, 1, 1))[0](draw, tensor)


def _other_numbers(draw: Draw, tensor: Tensor) -> Tensor:
    """Return a tensor of integers with values out of every range, in some or all places."""
    tensor = tensor.clone()
    if tensor.dtype.is_floating_point or tensor.dtype == torch.bool or tensor.numel() == 0:
        return tensor
    limits = torch.iinfo(tensor.dtype)
    wild = draw.chance.choice((-1, -2, 2**20, limits.min, limits.max, 7))
    where = torch.rand(tensor.shape, generator=draw.generator) < draw.chance.choice((0.1, 0.5, 1.0))
    return torch.where(where, max(limits.min, min(limits.max, wild)), tensor).to(tensor.dtype)


def _other_shape(draw: Draw, tensor: Tensor) -> Tensor:
    way = draw.chance.randrange(6)
    if way == 0:
        return tensor[None]
    if way == 1:
        return tensor.flatten()
    if way == 2 and tensor.dim() > 0:
        return tensor[..., :-1]
    if way == 3 and tensor.dim() > 0:
        return tensor[:0]
    if way == 4 and tensor.dim() > 0 and tensor.numel() > 0:
        first = tensor[(slice(0, 1),) * tensor.dim()]
        return first.expand(*(1,) * (tensor.dim() - 1), 2 ** draw.chance.choice((40, 50, 60)))
    return tensor.repeat(*(2,) * max(tensor.dim(), 1))


def _other_dtype(draw: Draw, tensor: Tensor) -> Tensor:
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8)
    more = (torch.bool, torch.complex64, torch.int8, torch.float8_e4m3fn)
    return tensor.to(draw.chance.choice((*dtypes, *more)))


def _other_kind(draw: Draw, tensor: Tensor) -> Tensor:
    way = draw.chance.randrange(4)
    if way == 0:
        return tensor.to("meta")
    if way == 1 and tensor.dim() > 0:
        return tensor.to_sparse()
    if way == 2 and tensor.dtype == torch.float32:
        return torch.quantize_per_tensor(tensor.contiguous(), 0.1, 0, torch.qint8)
    if tensor.dtype == torch.float32 and tensor.dim() > 0:
        return tensor.to_mkldnn()
    return tensor.to("meta")


def _other_memory(draw: Draw, tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    size = tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(draw.chance.choice((0, size // 2)))
    return tensor
