"""Registration: the schemas of torch.ops.sae_fast, and where their kernels come from.

The compiled module registers the same schemas itself (csrc/ops/schema.cpp; a test holds the two
lists together). Where it is not in use, the reference is registered for every device instead.
Contracts: reference.py defines the results, checks.py the errors. Shapes: N tokens, D = d_in,
F = d_sae; a code is values and indices [N, K], or [nnz] with offsets [N + 1].
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sae_fast.ops import checks, data_checks, native, reference
from sae_fast.ops.full_precision import without_autocast

SCHEMAS = {
    "pack_encoder": "(Tensor W_enc, str precision)"
    " -> (Tensor packed, Tensor stats, Tensor rounded)",
    "encode_topk": "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, int k, str precision,"
    " Tensor? dead_mask, int k_aux, Tensor? packed, Tensor? stats, Tensor? rounded)"
    " -> (Tensor values, Tensor indices, Tensor aux_values, Tensor aux_indices)",
    "encode_batch_topk": "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, int k,"
    " str precision, Tensor? dead_mask, int k_aux, Tensor? packed, Tensor? stats, Tensor? rounded)"
    " -> (Tensor values, Tensor indices, Tensor offsets, Tensor aux_values, Tensor aux_indices)",
    "encode_threshold": "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, Tensor threshold,"
    " str precision, Tensor? packed, Tensor? stats, Tensor? rounded)"
    " -> (Tensor values, Tensor indices, Tensor offsets)",
    "decode": "(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor? b_dec)"
    " -> Tensor x_hat",
    "decode_backward": "(Tensor grad, Tensor indices, Tensor? offsets, Tensor W_dec)"
    " -> Tensor grad_values",
    "reconstruct": "(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor? b_dec,"
    " Tensor x) -> (Tensor residual, Tensor squared_error, Tensor residual_dot)",
    "accumulate_rows": "(Tensor coefficients, Tensor indices, Tensor? offsets, Tensor dense,"
    " int d_sae) -> (Tensor rows, Tensor sums)",
    "latent_major": "(Tensor values, Tensor indices, Tensor? offsets, int d_sae)"
    " -> (Tensor latent_offsets, Tensor entries, Tensor rows)",
    "gather_entries": "(Tensor source, Tensor entries) -> Tensor ordered",
    "latent_sums": "(Tensor latent_offsets, Tensor entries, Tensor coefficients) -> Tensor sums",
    "row_gradient_norm": "(Tensor latent_offsets, Tensor rows, Tensor coefficients, Tensor dense,"
    " Tensor? shift, Tensor? project_onto, Tensor? extra_grad)"
    " -> (Tensor squared_norm, Tensor sums, Tensor cached, Tensor cache_slots)",
    "update_scalars": "(Tensor squared_norm, Tensor lr, Tensor loss_scale, Tensor(a!) step_count,"
    " Tensor(b!) halted, Tensor(c!)? lr_squares, str rule, float grad_clip, float beta1,"
    " float beta2, float eps, float weight_decay, bool skip_overflow)"
    " -> (Tensor norm, Tensor scalars)",
    "fused_update_": "(Tensor(a!) W, Tensor(b!) exp_avg, Tensor(c!)? exp_avg_sq,"
    " Tensor(d!)? exp_avg_scale, Tensor(e!)? exp_avg_sq_scale,"
    " Tensor latent_offsets, Tensor rows, Tensor coefficients, Tensor dense, Tensor? shift,"
    " Tensor? extra_grad, Tensor sums, Tensor cached, Tensor cache_slots, Tensor scalars,"
    " Tensor? step_count, str rule, bool project, bool unit_norm, Tensor(f!)? packed,"
    " Tensor(g!)? stats, Tensor(h!)? rounded, str precision) -> ()",
    "update_vector_": "(Tensor(a!) w, Tensor(b!) exp_avg, Tensor(c!)? exp_avg_sq, Tensor? grad,"
    " Tensor scalars, str rule) -> ()",
    "normalize_rows_": "(Tensor(a!) W) -> ()",
    "gather_rows_": "(Tensor(a!) out, Tensor? places, Tensor source, Tensor rows, Tensor? mean,"
    " float scale) -> ()",
    "dense_product": "(Tensor left, Tensor right, Tensor? bias, bool relu, str precision)"
    " -> Tensor product",
    "decorrelation": "(Tensor W) -> (Tensor loss, Tensor grad)",
    "code_correlation": "(Tensor h, int split) -> (Tensor within, Tensor between,"
    " Tensor n_active, Tensor means, Tensor inverse_norms, Tensor gram)",
    "code_correlation_backward": "(Tensor? grad_within, Tensor? grad_between, Tensor h, int split,"
    " Tensor means, Tensor inverse_norms, Tensor gram) -> Tensor grad_h",
}

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])
NATIVE = native.load() is not None
# Dispatch keys of tensors without strides, or with other numbers than their dtype says.
_NOT_DENSE = (
    *("SparseCPU", "SparseCsrCPU", "QuantizedCPU", "MkldnnCPU"),
    *("SparseCUDA", "SparseCsrCUDA", "QuantizedCUDA"),
)


def fake(name: str) -> Callable[[_Kernel], _Kernel]:
    """Register the fake kernel of an op: the checks of its arguments, then the given shapes."""

    def register(shapes: _Kernel) -> _Kernel:
        check = getattr(checks, name)
        schema = getattr(torch.ops.sae_fast, name).default._schema
        needed = [
            (number, argument.name)
            for number, argument in enumerate(schema.arguments)
            if str(argument.type) == "Tensor"
        ]

        def kernel(*arguments: Any) -> Any:
            for number, argument in needed:  # torch lets None pass for a tensor
                if arguments[number] is None:
                    raise RuntimeError(f"{name}: {argument} must be a tensor, got None")
            check(*arguments)
            return shapes(*arguments)

        torch.library.register_fake(f"sae_fast::{name}", kernel)
        return shapes

    return register


def differentiable(name: str, setup_context: Callable[..., None]) -> Callable[[_Kernel], _Kernel]:
    """Register the backward formula of an op."""

    def register(backward: _Kernel) -> _Kernel:
        torch.library.register_autograd(f"sae_fast::{name}", backward, setup_context=setup_context)
        return backward

    return register


def refuse_backward(name: str) -> None:
    """Make a backward through an op an error; unregistered it would warn and give no gradient."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: has no derivative; second derivatives are not implemented")

    torch.library.register_autograd(f"sae_fast::{name}", backward)


def dynamic_size() -> torch.SymInt:
    """A size that a fake kernel cannot know: it depends on the data."""
    return torch.library.get_ctx().new_dynamic_size()


def _check_data(name: str, arguments: dict[str, Any]) -> None:
    if "rows" in arguments and "latent_offsets" in arguments and not arguments["rows"].is_cuda:
        rows, lists = arguments["rows"], arguments["latent_offsets"]
        data_checks.check_lists(name, rows, lists, len(arguments["dense"]))
    if name == "gather_rows_" and arguments["rows"].device.type == "cpu":
        data_checks.check_rows(name, arguments["rows"], "rows", len(arguments["source"]))
        if arguments["places"] is not None:
            data_checks.check_rows(name, arguments["places"], "places", len(arguments["out"]))
    if "entries" in arguments and arguments["entries"].device.type == "cpu":
        source = arguments["source"] if "source" in arguments else arguments["coefficients"]
        offsets = arguments.get("latent_offsets")
        data_checks.check_entries(name, arguments["entries"], source.numel(), offsets)
    indices, offsets = arguments.get("indices"), arguments.get("offsets")
    if not isinstance(indices, Tensor) or indices.device.type != "cpu":
        return
    d_sae = arguments["W_dec"].size(0) if "W_dec" in arguments else arguments["d_sae"]
    data_checks.check_data(name, indices, offsets, d_sae)


def _define_reference() -> torch.library.Library:
    """Define the ops and register the reference, behind its checks, for every device."""
    library = torch.library.Library("sae_fast", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in SCHEMAS.items():
        library.define(name + schema)  # type: ignore[no-untyped-call]
        kernel = _checked(name)
        library.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    return library


def _checked(name: str) -> Callable[..., Any]:
    check, compute = getattr(checks, name), getattr(reference, name)
    quiet = without_autocast(compute)
    names = compute.__code__.co_varnames[: compute.__code__.co_argcount]

    def kernel(*arguments: Any) -> Any:
        check(*arguments)
        _check_data(name, dict(zip(names, arguments, strict=True)))
        laid_out = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
        with torch.no_grad():
            return quiet(*laid_out)

    return kernel


def _refuse_layouts() -> torch.library.Library:
    """Register an error that names the argument for tensors that are not dense."""
    library = torch.library.Library("sae_fast", "IMPL")  # type: ignore[no-untyped-call]
    for name in SCHEMAS:
        for key in _NOT_DENSE:
            library.impl(name, _refusal(name), key)  # type: ignore[no-untyped-call]
    return library


def _refusal(name: str) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        schema = getattr(torch.ops.sae_fast, name).default._schema.arguments
        for argument, described in zip(arguments, schema, strict=False):
            if not isinstance(argument, Tensor):
                continue
            is_dense = argument.layout == torch.strided and not argument.is_quantized
            if not is_dense:
                kind = argument.dtype if argument.is_quantized else argument.layout
                got = str(kind).removeprefix("torch.")
                raise RuntimeError(f"{name}: {described.name} must be a dense tensor, got {got}")
        raise RuntimeError(f"{name}: all tensors must be dense")

    return kernel


# Kept for as long as the process lives: the ops go when it does.
_LIBRARY = None if NATIVE else _define_reference()
_REFUSALS = _refuse_layouts()
