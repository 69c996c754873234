"""Every op of torch.ops.sae_fast: its declaration here, and its registration with torch.

N tokens, D = d_in, F = d_sae, K = k; a code is values and indices [N, K], or flat ones [E] with
offsets [N + 1]. The compiled module registers the same schemas itself (csrc/ops/schema.cpp, where
the contracts are; a test holds the two lists together). Where it is not in use, the reference,
which defines the results, is registered for every device instead.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sae_fast.ops import native, reference
from sae_fast.ops.checks import MOST_ENTRIES, Call, dtype_name
from sae_fast.ops.declaration import (
    Form,
    Known,
    Op,
    at_least,
    below,
    check_given,
    in_range,
    one_of,
    op,
    partition,
)
from sae_fast.ops.full_precision import without_autocast
from sae_fast.ops.reference import ROUNDED_DTYPES
from sae_fast.ops.reference.moments import moment_blocks

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

NATIVE = native.load() is not None
PRECISIONS = ("screened", "fp32", "bf16", "fp16")
RULES = ("adam", "sgd", "signum", "schedule_free_signum")

_PANEL = 64  # latents in a panel of the packed encoder
_PRECISION = one_of("precision", PRECISIONS)
_RULE = one_of("rule", RULES)

# Arguments that several ops have.
_ENCODER = {"x": "N D", "W_enc": "F D", "b_enc": "F", "b_dec": "D"}
_COPIES = {"packed": "opaque", "stats": "opaque", "rounded": "opaque"}
_INDICES = {"indices": "N K, E if offsets: int32"}
_OFFSETS = {"offsets": "N+1: int64"}
_CODE = {**_INDICES, "values": "like indices", **_OFFSETS}
_FACTORS = {
    **{"latent_offsets": "F+1: int64", "rows": "E: int32", "coefficients": "E"},
    **{"dense": "N D: gathered", "shift": "D"},
}


def _packed_shapes(W_enc: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty packed, stats and rounded of pack_encoder for W_enc [F, D]."""
    if not NATIVE:
        return W_enc.new_empty(0), W_enc.new_empty(0), W_enc.new_empty(0)
    d_sae, d_in = W_enc.shape
    if W_enc.device.type == "cuda":
        rounded = W_enc.new_empty(d_sae, d_in, dtype=ROUNDED_DTYPES.get(precision, torch.bfloat16))
        return W_enc.new_empty(0, dtype=torch.int16), W_enc.new_empty(2, d_sae), rounded
    panels = (d_sae + _PANEL - 1) // _PANEL
    if precision == "fp32":
        packed = W_enc.new_empty(panels, d_in, _PANEL)
    else:
        steps = (d_in + 31) // 32 * 16
        packed = W_enc.new_empty(panels, steps, _PANEL, 2, dtype=torch.int16)
    dtype = ROUNDED_DTYPES.get(precision)
    rows = d_sae if dtype is not None else 0
    rounded = W_enc.new_empty(rows, d_in, dtype=dtype or torch.float32)
    return packed, W_enc.new_empty(4, panels * _PANEL), rounded


def _needs_dead_mask(call: Call, known: Known) -> None:
    """Require that there is a dead mask where k_aux is not 0."""
    is_possible = known["dead_mask"] is not None or known["k_aux"] == 0
    call.require(is_possible, "k_aux must be 0 without a dead_mask", f"k_aux={known['k_aux']}")


def _budget(call: Call, known: Known) -> None:
    """Require that the entries of a batch can be numbered in int32."""
    n_tokens, k = known["N"], known["k"]
    must = f"at most {MOST_ENTRIES} entries"
    call.require(n_tokens * k <= MOST_ENTRIES, must, f"{n_tokens} * {k}")


def _budget_of_entries(call: Call, known: Known) -> None:
    """Require that the entries of a code can be numbered in int32."""
    entries = known["indices"].numel()
    call.require(entries <= MOST_ENTRIES, f"at most {MOST_ENTRIES} entries", str(entries))


def _squares_of_rule(call: Call, known: Known) -> None:
    """Require exp_avg_sq of adam, and of no other rule."""
    rule = known["rule"]
    check_given(call, known, "exp_avg_sq", rule == "adam", f"rule is {rule}")


def _second_vector(call: Call, known: Known) -> None:
    """Require what belongs to the second vector of update_vector_, in its shape, or nothing."""
    w, rule = known["second_w"], known["rule"]
    is_there = w is not None
    where = "second_w is given" if is_there else "second_w is none"
    check_given(call, known, "second_exp_avg", is_there, where)
    if is_there:
        check_given(call, known, "second_exp_avg_sq", rule == "adam", f"rule is {rule}")
    else:
        check_given(call, known, "second_exp_avg_sq", False, where)
        check_given(call, known, "second_grad", False, where)
    for name in ("second_exp_avg", "second_exp_avg_sq", "second_grad"):
        if (tensor := known[name]) is not None:
            must = f"{name} must have the shape of second_w, {[*w.shape]}"
            call.require(tensor.shape == w.shape, must, str([*tensor.shape]))


def _some_losses(call: Call, known: Known) -> None:
    """Require at least one loss where losses are given."""
    has_one = known["losses"] is None or len(known["losses"]) > 0
    call.require(has_one, "losses must have at least one", "none")


def _lr_squares_of_rule(call: Call, known: Known) -> None:
    """Require lr_squares of schedule_free_signum, and of no other rule."""
    rule = known["rule"]
    check_given(call, known, "lr_squares", rule == "schedule_free_signum", f"rule is {rule}")


def _parts_of_moments(call: Call, known: Known) -> None:
    """Require the scales of 8-bit moments, and the step that moments rounded at random need."""
    dtype = known["exp_avg"].dtype
    where, in_blocks = f"exp_avg is {dtype_name(dtype)}", dtype == torch.uint8
    check_given(call, known, "exp_avg_scale", in_blocks, where)
    if known["exp_avg_sq"] is not None:
        check_given(call, known, "exp_avg_sq_scale", in_blocks, where)
    else:
        check_given(call, known, "exp_avg_sq_scale", False, f"rule is {known['rule']}")
    if dtype in (torch.bfloat16, torch.uint8):
        check_given(call, known, "step_count", True, where)


_SELECTION = (_PRECISION, in_range("k", 1), in_range("k_aux", 0), _needs_dead_mask)
_CODE_DATA = (partition("offsets", "indices"), below("indices", lambda known: known["F"]))
_NEW_CODE_DATA = (partition("offsets", "indices"), below("indices", lambda known: known["d_sae"]))
_FACTOR_DATA = (partition("latent_offsets", "rows"), below("rows", lambda known: known["N"]))

_DECLARED = (
    op(
        "pack_encoder(Tensor W_enc, str precision)"
        " -> (Tensor packed, Tensor stats, Tensor rounded)",
        tensors={"W_enc": "F D"},
        require=[_PRECISION],
        returns=_packed_shapes,
        has_derivative=False,
    ),
    op(
        "encode_topk(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, int k, str precision,"
        " Tensor? dead_mask, int k_aux, Tensor? packed, Tensor? stats, Tensor? rounded)"
        " -> (Tensor values, Tensor indices, Tensor aux_values, Tensor aux_indices)",
        tensors={**_ENCODER, "dead_mask": "F: bool", **_COPIES},
        require=_SELECTION,
        returns={
            **{"values": "N k", "indices": "N k: int32"},
            **{"aux_values": "N k_aux", "aux_indices": "N k_aux: int32"},
        },
    ),
    op(
        "encode_batch_topk(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, int k,"
        " str precision, Tensor? dead_mask, int k_aux, Tensor? packed, Tensor? stats,"
        " Tensor? rounded) -> (Tensor values, Tensor indices, Tensor offsets, Tensor aux_values,"
        " Tensor aux_indices)",
        tensors={**_ENCODER, "dead_mask": "F: bool", **_COPIES},
        require=(*_SELECTION, _budget),
        returns={
            **{"values": "N*k", "indices": "N*k: int32", "offsets": "N+1: int64"},
            **{"aux_values": "N k_aux", "aux_indices": "N k_aux: int32"},
        },
    ),
    op(
        "full_batches(Tensor like) -> Tensor count",
        tensors={"like": "any"},
        returns={"count": "scalar: int64"},
        has_derivative=False,
    ),
    op(
        "encode_threshold(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, Tensor threshold,"
        " str precision, Tensor? packed, Tensor? stats, Tensor? rounded)"
        " -> (Tensor values, Tensor indices, Tensor offsets)",
        tensors={**_ENCODER, "threshold": "F", **_COPIES},
        require=[_PRECISION],
        returns={"values": "?E", "indices": "?E: int32", "offsets": "N+1: int64"},
    ),
    op(
        "decode(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor? b_dec)"
        " -> Tensor x_hat",
        tensors={**_CODE, "W_dec": "F D: gathered", "b_dec": "D"},
        data=_CODE_DATA,
        returns={"x_hat": "N D"},
    ),
    op(
        "decode_backward(Tensor grad, Tensor indices, Tensor? offsets, Tensor W_dec)"
        " -> Tensor grad_values",
        tensors={**_INDICES, **_OFFSETS, "W_dec": "F D: gathered", "grad": "N D"},
        data=_CODE_DATA,
        returns={"grad_values": "like indices"},
        has_derivative=False,
    ),
    op(
        "reconstruct(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor? b_dec,"
        " Tensor x) -> (Tensor residual, Tensor squared_error, Tensor residual_dot)",
        tensors={**_CODE, "W_dec": "F D: gathered", "b_dec": "D", "x": "N D"},
        data=_CODE_DATA,
        returns={
            **{"residual": "N D: of W_dec", "squared_error": "N", "residual_dot": "like indices"},
        },
    ),
    op(
        "accumulate_rows(Tensor coefficients, Tensor indices, Tensor? offsets, Tensor dense,"
        " int d_sae) -> (Tensor rows, Tensor sums)",
        tensors={**_INDICES, "coefficients": "like indices", **_OFFSETS, "dense": "N D: gathered"},
        require=[at_least("d_sae", 1)],
        data=_NEW_CODE_DATA,
        returns={"rows": "d_sae D", "sums": "d_sae"},
        has_derivative=False,
    ),
    op(
        "latent_major(Tensor values, Tensor indices, Tensor? offsets, int d_sae)"
        " -> (Tensor latent_offsets, Tensor entries, Tensor rows)",
        tensors={**_CODE},
        require=[at_least("d_sae", 1)],
        data=_NEW_CODE_DATA,
        returns={"latent_offsets": "d_sae+1: int64", "entries": "?E: int32", "rows": "?E: int32"},
        has_derivative=False,
    ),
    op(
        "gather_entries(Tensor source, Tensor entries) -> Tensor ordered",
        tensors={"source": "any", "entries": "E: int32"},
        data=[below("entries", lambda known: known["source"].numel())],
        returns={"ordered": "E"},
        has_derivative=False,
    ),
    op(
        "latent_sums(Tensor latent_offsets, Tensor entries, Tensor coefficients) -> Tensor sums",
        like="coefficients",
        tensors={"latent_offsets": "F+1: int64", "entries": "E: int32", "coefficients": "any"},
        data=[
            partition("latent_offsets", "entries"),
            below("entries", lambda known: known["coefficients"].numel()),
        ],
        returns={"sums": "F"},
        has_derivative=False,
    ),
    op(
        "row_gradient_norm(Tensor latent_offsets, Tensor rows, Tensor coefficients, Tensor dense,"
        " Tensor? shift, Tensor? project_onto, Tensor? extra_grad)"
        " -> (Tensor squared_norm, Tensor sums, Tensor cached, Tensor cache_slots)",
        like="dense",
        tensors={**_FACTORS, "project_onto": "F D", "extra_grad": "F D"},
        data=_FACTOR_DATA,
        returns={
            **{"squared_norm": "scalar: float64", "sums": "F: of coefficients"},
            **{"cached": "?C D: of coefficients", "cache_slots": "F: int32"},
        },
        has_derivative=False,
    ),
    op(
        "update_scalars(Tensor squared_norm, Tensor lr, Tensor loss_scale, Tensor(a!) step_count,"
        " Tensor(b!) halted, Tensor(c!)? lr_squares, str rule, float grad_clip, float beta1,"
        " float beta2, float eps, float weight_decay, bool skip_overflow, Tensor? fault=None,"
        " Tensor? losses=None) -> (Tensor norm, Tensor scalars)",
        tensors={
            "squared_norm": "scalar: float64",
            "lr": "scalar: float64",
            "loss_scale": "scalar",
            "step_count": "scalar: int64",
            "halted": "scalar: int64",
            "lr_squares": "scalar: float64",
            "fault": "scalar",
            "losses": "L",
        },
        require=[_RULE, _lr_squares_of_rule, _some_losses],
        returns={"norm": "scalar: of loss_scale", "scalars": "11: of loss_scale"},
    ),
    op(
        "fused_update_(Tensor(a!) W, Tensor(b!) exp_avg, Tensor(c!)? exp_avg_sq,"
        " Tensor(d!)? exp_avg_scale, Tensor(e!)? exp_avg_sq_scale,"
        " Tensor latent_offsets, Tensor rows, Tensor coefficients, Tensor dense, Tensor? shift,"
        " Tensor? extra_grad, Tensor sums, Tensor cached, Tensor cache_slots, Tensor scalars,"
        " Tensor? step_count, str rule, bool project, bool unit_norm, Tensor(f!)? packed,"
        " Tensor(g!)? stats, Tensor(h!)? rounded, str precision) -> ()",
        tensors={
            **_FACTORS,
            "extra_grad": "F D",
            "W": "F D",
            "exp_avg": "F D: moment",
            "exp_avg_sq": "F D: of exp_avg",
            "exp_avg_scale": "F B",
            "exp_avg_sq_scale": "F B",
            "step_count": "scalar: int64",
            "sums": "F",
            "cached": "C D",
            "cache_slots": "F: int32",
            "scalars": "11",
            **_COPIES,
        },
        sizes={"B": lambda known: moment_blocks(known["D"])},
        require=[_RULE, _squares_of_rule, _parts_of_moments, _PRECISION],
        data=_FACTOR_DATA,
        returns={},
    ),
    op(
        "update_vector_(Tensor(a!) w, Tensor(b!) exp_avg, Tensor(c!)? exp_avg_sq, Tensor? grad,"
        " Tensor scalars, str rule, Tensor(d!)? second_w=None, Tensor(e!)? second_exp_avg=None,"
        " Tensor(f!)? second_exp_avg_sq=None, Tensor? second_grad=None) -> ()",
        tensors={
            "w": "any",
            "exp_avg": "like w",
            "exp_avg_sq": "like w",
            "grad": "like w",
            "scalars": "11",
            "second_w": "any",
            "second_exp_avg": "any",
            "second_exp_avg_sq": "any",
            "second_grad": "any",
        },
        require=[_RULE, _squares_of_rule, _second_vector],
        returns={},
    ),
    op(
        "add_squares_(Tensor(a!) total, Tensor grad, Tensor? second=None, Tensor? more=None) -> ()",
        tensors={
            **{"total": "scalar: float64", "grad": "any", "second": "any"},
            "more": "scalar: float64",
        },
        returns={},
    ),
    op(
        "normalize_rows_(Tensor(a!) W) -> ()",
        tensors={"W": "F D"},
        returns={},
    ),
    op(
        "batch_statistics(Tensor squared_error, Tensor target, Tensor values, Tensor indices,"
        " Tensor? variance, int d_sae, bool is_signed) -> (Tensor fvu, Tensor l0,"
        " Tensor total_variance, Tensor fired)",
        tensors={
            "squared_error": "N",
            "target": "N D",
            "indices": "any: int32",
            "values": "like indices",
            "variance": "scalar",
        },
        require=[_budget_of_entries, at_least("d_sae", 1)],
        data=[below("indices", lambda known: known["d_sae"])],
        returns={
            **{"fvu": "scalar", "l0": "scalar", "total_variance": "scalar"},
            "fired": "d_sae: bool",
        },
        has_derivative=False,
    ),
    op(
        "code_gradients(Tensor residual_dot, Tensor values, Tensor grad_error)"
        " -> (Tensor grad_values, Tensor coefficients, Tensor scale)",
        like="values",
        tensors={"values": "N K", "residual_dot": "N K", "grad_error": "N"},
        returns={"grad_values": "N K", "coefficients": "N K", "scale": "N"},
        has_derivative=False,
    ),
    op(
        "weighted_row_sum(Tensor weights, Tensor matrix, float factor) -> Tensor sum",
        tensors={"weights": "M", "matrix": "M D: gathered"},
        returns={"sum": "D"},
        has_derivative=False,
    ),
    op(
        "finish_step_(Tensor(a!) poison, Tensor(b!) steps, Tensor(c!) metrics,"
        " Tensor(d!) tokens_since_fired, Tensor? fault, Tensor losses, Tensor norm,"
        " Tensor variance, Tensor fired, int n_tokens, bool norm_poisons) -> ()",
        tensors={
            **{"poison": "scalar", "steps": "scalar: int64", "losses": "L", "metrics": "M"},
            **{"tokens_since_fired": "F: int64", "fault": "scalar", "norm": "scalar"},
            **{"variance": "scalar", "fired": "F: bool"},
        },
        sizes={"M": lambda known: known["L"] + 2},
        returns={},
    ),
    op(
        "gather_rows_(Tensor(a!) out, Tensor? places, Tensor source, Tensor rows, Tensor? mean,"
        " float scale) -> ()",
        tensors={
            "out": "M D",
            "source": "S D: gathered",
            "rows": "M, N if places: int64",
            "places": "N: int64",
            "mean": "D",
        },
        data=[
            below("rows", lambda known: known["S"]),
            below("places", lambda known: known["M"]),
        ],
        returns={},
    ),
    op(
        "dense_product(Tensor left, Tensor right, Tensor? bias, bool relu, str precision)"
        " -> Tensor product",
        tensors={"left": "M K", "right": "K P", "bias": "P"},
        require=[_PRECISION],
        returns={"product": "M P"},
        has_derivative=False,
    ),
    op(
        "decorrelation(Tensor W) -> (Tensor loss, Tensor grad)",
        tensors={"W": "F D"},
        returns={"loss": "scalar", "grad": "F D"},
    ),
    op(
        "code_correlation(Tensor h, int split) -> (Tensor within, Tensor between,"
        " Tensor n_active, Tensor means, Tensor inverse_norms, Tensor gram)",
        tensors={"h": "N F"},
        sizes={"G": lambda known: 1 if known["split"] == known["F"] else 2},
        require=[in_range("split", 0)],
        returns={
            **{"within": "scalar", "between": "scalar", "n_active": "2: int64"},
            **{"means": "F: float64", "inverse_norms": "F", "gram": "G N N"},
        },
    ),
    op(
        "code_correlation_backward(Tensor? grad_within, Tensor? grad_between, Tensor h, int split,"
        " Tensor means, Tensor inverse_norms, Tensor gram) -> Tensor grad_h",
        like="h",
        tensors={
            "h": "N F",
            "means": "F: float64",
            "inverse_norms": "F",
            "gram": "G N N",
            "grad_within": "scalar",
            "grad_between": "scalar",
        },
        sizes={"G": lambda known: 1 if known["split"] == known["F"] else 2},
        require=[in_range("split", 0)],
        returns={"grad_h": "N F"},
        has_derivative=False,
    ),
)
OPS: dict[str, Op] = {declared.name: declared for declared in _DECLARED}

# Dispatch keys of tensors without strides, or whose numbers are not what their dtype says.
_NOT_DENSE = (
    *("SparseCPU", "SparseCsrCPU", "QuantizedCPU", "MkldnnCPU"),
    *("SparseCUDA", "SparseCsrCUDA", "QuantizedCUDA"),
)


def differentiable(name: str, setup_context: Callable[..., None]) -> Callable[[_Kernel], _Kernel]:
    """Decorate a function to be the backward formula of an op."""

    def register(backward: _Kernel) -> _Kernel:
        torch.library.register_autograd(f"sae_fast::{name}", backward, setup_context=setup_context)
        return backward

    return register


def op_table() -> str:
    """Return all ops as a Markdown table: what they compute, their arguments and results."""
    lines = ["| op | arguments | results |", "|---|---|---|"]
    for declared in OPS.values():
        text = (getattr(reference, declared.name).__doc__ or "").split("\n\n")[0]
        summary = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
        returns = declared.returns if isinstance(declared.returns, dict) else {}
        arguments = [
            _cell(argument, declared.forms.get(argument))
            + (", optional" if declared.is_optional(argument) else "")
            for argument in declared.arguments
        ]
        results = [_cell(result, returns.get(result)) for result in declared.results]
        results += [f"`{argument}`, in place" for argument in declared.written]
        cells = [f"`{declared.name}`: {summary}", "; ".join(arguments), "; ".join(results)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, form: Form | None) -> str:
    return f"`{name}`" if form is None or form.is_opaque else f"`{name} {form.text()}`"


def _define_reference() -> torch.library.Library:
    """Define the ops and register the reference, after its checks, for every device."""
    library = torch.library.Library("sae_fast", "DEF")  # type: ignore[no-untyped-call]
    for declared in OPS.values():
        library.define(declared.schema)  # type: ignore[no-untyped-call]
        kernel = _checked(declared)
        library.impl(declared.name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    return library


def _checked(declared: Op) -> Callable[..., Any]:
    """Return the reference of an op with checks of its arguments before it."""
    quiet = without_autocast(getattr(reference, declared.name))

    def kernel(*arguments: Any) -> Any:
        declared.check_data(declared.check(*arguments))
        laid_out = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
        with torch.no_grad():
            return quiet(*laid_out)

    return kernel


def _refuse_backward(name: str) -> None:
    """Make a backward through an op an error; unregistered it would warn and give no gradient."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: has no derivative; second derivatives are not implemented")

    torch.library.register_autograd(f"sae_fast::{name}", backward)


def _refuse_layouts() -> torch.library.Library:
    """Register an error that names the argument for tensors that are not dense."""
    library = torch.library.Library("sae_fast", "IMPL")  # type: ignore[no-untyped-call]
    for declared in OPS.values():
        for key in _NOT_DENSE:
            library.impl(declared.name, _refusal(declared), key)  # type: ignore[no-untyped-call]
    return library


def _refusal(declared: Op) -> Callable[..., Any]:
    """Return a kernel that raises RuntimeError for the first tensor that is not dense."""

    def kernel(*arguments: Any) -> Any:
        for argument, name in zip(arguments, declared.arguments, strict=False):
            if not isinstance(argument, Tensor):
                continue
            is_dense = argument.layout == torch.strided and not argument.is_quantized
            if not is_dense:
                kind = argument.dtype if argument.is_quantized else argument.layout
                got = str(kind).removeprefix("torch.")
                raise RuntimeError(f"{declared.name}: {name} must be a dense tensor, got {got}")
        raise RuntimeError(f"{declared.name}: all tensors must be dense")

    return kernel


# The ops go when these objects do.
_LIBRARY = None if NATIVE else _define_reference()
_REFUSALS = _refuse_layouts()
for _op in OPS.values():
    torch.library.register_fake(f"sae_fast::{_op.name}", _op.fake)
    if not _op.has_derivative:
        _refuse_backward(_op.name)
