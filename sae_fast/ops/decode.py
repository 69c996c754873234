"""Decoders: from a code to x_hat, or straight to x_hat − x and its squared length.

`reconstruct_prefixes` computes the errors of nested dictionaries from one decode. Prefix g is the
first m_g latents, m_1 < … < m_G = d_sae. The entries of a row ascend by index, so those that prefix
g adds to the one before lie side by side: with more offsets the entries are a code of N·G rows.
That is decoded once, and a running sum makes it the G reconstructions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast.ops.checks import FLOAT32, Call, check_usable
from sae_fast.ops.code import Code, SparseCode
from sae_fast.ops.code_entries import per_entry
from sae_fast.ops.dense_product import dense_product
from sae_fast.ops.reference import ROUNDED_DTYPES
from sae_fast.ops.registry import differentiable
from sae_fast.ops.row_factors import FactorSink, RowFactor, weighted_row_sum
from sae_fast.ops.working_copies import decoder_copy


class Reconstruction(NamedTuple):
    """residual [N, D] = x_hat − x, and squared_error [N] = Σ_d residual²; both differentiable."""

    residual: Tensor
    squared_error: Tensor


class PrefixReconstruction(NamedTuple):
    """residual [N, D] = x_hat − x with all latents, squared_errors [N, G]; both differentiable."""

    residual: Tensor
    squared_errors: Tensor


def decode(
    code: SparseCode,
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor | None = None,  # [D]
    *,
    precision: str | None = None,
    dense_grad: bool = True,
) -> Tensor:
    """Return x_hat [N, D] = Σ value · W_dec[index] + b_dec; only the active rows are read.

    Differentiable in code.values, W_dec and b_dec.

    Args:
        code: the sparse code of N tokens.
        W_dec: decoder rows, one a latent.
        b_dec: decoder bias, or None for 0.
        precision: "bf16" or "fp16" gather rounded rows; by default as the code was encoded.
        dense_grad: whether backward gives W_dec a dense `.grad`; if not, it leaves a RowFactor.

    Raises RuntimeError for an argument that does not fit; the message names it.
    """
    precision = code.precision if precision is None else precision
    if dense_grad and precision not in ROUNDED_DTYPES:
        op = torch.ops.sae_fast.decode.default
        x_hat: Tensor = op(code.values, code.indices, code.offsets, W_dec, b_dec)
        return x_hat
    sink = None if dense_grad else FactorSink("decode", "W_dec", W_dec, code.key)
    gathered = decoder_copy(W_dec, precision)
    arguments = (code.values, W_dec, b_dec, code.indices, code.offsets, gathered, sink)
    x_hat = _Decode.apply(*arguments)  # type: ignore[no-untyped-call]
    return x_hat


def reconstruct(
    code: Code,
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor | None,  # [D]
    x: Tensor,  # [N, D]
    *,
    precision: str | None = None,
    dense_grad: bool = True,
) -> Reconstruction:
    """Return x_hat − x and its squared length per token, with x_hat as `decode` gives it.

    One pass over the active rows serves a squared-error loss and its gradient. Differentiable in
    code.values, W_dec, b_dec and x. With precision bf16 or fp16 the residual is in that dtype; the
    squared error is taken before rounding. Other arguments and errors as for `decode`.
    A DenseCode is decoded by dense products and leaves dense gradients in any case.
    """
    precision = code.precision if precision is None else precision
    if not isinstance(code, SparseCode):
        made = _ReconstructDense.apply(  # type: ignore[no-untyped-call]
            code.values, W_dec, b_dec, x, precision
        )
        return Reconstruction(*made)
    if dense_grad and precision not in ROUNDED_DTYPES:
        op = torch.ops.sae_fast.reconstruct.default
        arguments = (code.values, code.indices, code.offsets, W_dec, b_dec, x)
        residual, squared_error, _ = op(*arguments)
        return Reconstruction(residual, squared_error)
    sink = None if dense_grad else FactorSink("reconstruct", "W_dec", W_dec, code.key)
    gathered = decoder_copy(W_dec, precision)
    residual, squared_error = _Reconstruct.apply(  # type: ignore[no-untyped-call]
        code.values, W_dec, b_dec, x, code.indices, code.offsets, gathered, sink
    )
    return Reconstruction(residual, squared_error)


def reconstruct_prefixes(
    code: SparseCode,
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor,  # [D]
    x: Tensor,  # [N, D]
    prefixes: Sequence[int],
    *,
    dense_grad: bool = True,
) -> PrefixReconstruction:
    """Return Σ_d (x_hat_g − x)² per prefix g, and the last x_hat_g − x.

    x_hat_g = Σ value · W_dec[index] + b_dec over index < m_g.

    It consists of `decode` and its backward, which read each entry once; memory 2·N·G·D floats.
    Differentiable in code.values, W_dec, b_dec and x.

    Args:
        code: of N tokens, with offsets; the entries of a row ascend by index, and entries of value
            0 may only come last, as `encode_batch_topk` gives them.
        W_dec: decoder rows, one a latent.
        b_dec: decoder bias, part of every reconstruction.
        x: activations [N, D].
        prefixes: sizes of the dictionaries, ascending, the last one d_sae.
        dense_grad: whether backward gives W_dec a dense `.grad`; if not, it leaves a RowFactor.

    Raises RuntimeError for an argument that does not fit; the message names it.
    """
    if not torch.compiler.is_compiling():
        code.check()
    call = Call("reconstruct_prefixes", "code", code.values)
    call.tensor("W_dec", W_dec, (code.d_sae, None), FLOAT32)
    call.tensor("b_dec", b_dec, (W_dec.size(1),), FLOAT32)
    call.tensor("x", x, (code.n_rows, W_dec.size(1)), FLOAT32)
    check_usable("reconstruct_prefixes", W_dec=W_dec, b_dec=b_dec, x=x)
    sizes = tuple(prefixes)
    ascending = list(sizes) == sorted({size for size in sizes if size > 0})
    if not (sizes and ascending and sizes[-1] == code.d_sae):
        raise RuntimeError(
            f"reconstruct_prefixes: prefixes must ascend from at least 1 to d_sae = {code.d_sae}, "
            f"got {sizes}"
        )
    pieces = _pieces(code, sizes)
    sink = None if dense_grad else FactorSink("reconstruct_prefixes", "W_dec", W_dec, pieces.key)
    gathered = decoder_copy(W_dec, code.precision)
    residual, squared_errors = _ReconstructPrefixes.apply(  # type: ignore[no-untyped-call]
        code.values, W_dec, b_dec, x, pieces.indices, pieces.offsets, gathered, len(sizes), sink
    )
    return PrefixReconstruction(residual, squared_errors)


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, offsets, W_dec, _ = inputs
    ctx.save_for_backward(values, indices, offsets, W_dec)


@differentiable("decode", _setup_decode)
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, offsets, W_dec = ctx.saved_tensors
    needs_values, _, _, needs_weights, needs_bias = ctx.needs_input_grad
    gradient = _decoder_gradient(values, indices, offsets, W_dec, grad, needs_values)
    return (
        gradient.values,
        None,
        None,
        _dense_rows(gradient, indices, offsets, W_dec) if needs_weights else None,
        gradient.bias() if needs_bias else None,
    )


def _setup_reconstruct(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, indices, offsets, W_dec, _, _ = inputs
    residual, _, residual_dot = output
    ctx.mark_non_differentiable(residual_dot)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, indices, offsets, W_dec, residual, residual_dot)


@differentiable("reconstruct", _setup_reconstruct)
def _(
    ctx: Any, grad_residual: Tensor | None, grad_squared_error: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    _, indices, offsets, W_dec, _, _ = saved
    if grad_residual is None and grad_squared_error is None:
        return (None,) * 6
    gradient = _reconstruction_gradient(saved, grad_residual, grad_squared_error)
    needs_values, _, _, needs_weights, needs_bias, needs_x = ctx.needs_input_grad
    return (
        gradient.values if needs_values else None,
        None,
        None,
        _dense_rows(gradient, indices, offsets, W_dec) if needs_weights else None,
        gradient.bias() if needs_bias else None,
        gradient.output().neg() if needs_x else None,
    )


class _OutputGradient(NamedTuple):
    """The gradient of a decoder's output, scale[n] · dense[n], and what follows from it."""

    values: Tensor | None  # of the code values
    coefficients: Tensor  # in the shape of values: W_dec's gradient is their sum with `dense`
    dense: Tensor  # [N, D]
    scale: Tensor | None  # [N], or None for 1

    def output(self) -> Tensor:  # [N, D]
        return self.dense if self.scale is None else self.dense * self.scale[:, None]

    def bias(self) -> Tensor:  # [D]
        scale = self.dense.new_ones(self.dense.size(0)) if self.scale is None else self.scale
        return weighted_row_sum(scale, self.dense)


def _decoder_gradient(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    grad: Tensor,  # [N, D]
    needs_values: bool,
) -> _OutputGradient:
    op = torch.ops.sae_fast.decode_backward.default
    grad_values = op(grad, indices, offsets, W_dec) if needs_values else None
    return _OutputGradient(grad_values, values, grad, None)


def _reconstruction_gradient(
    saved: tuple[Tensor, ...],  # values, indices, offsets, W_dec, residual, residual_dot
    grad_residual: Tensor | None,  # [N, D]
    grad_squared_error: Tensor | None,  # [N]
) -> _OutputGradient:
    values, indices, _, W_dec, residual, residual_dot = saved
    offsets: Tensor | None = saved[2]
    if grad_residual is None:
        # d squared_error = 2 residual: the op's dot products are the gradient of the values.
        assert grad_squared_error is not None
        if offsets is None:
            op = torch.ops.sae_fast.code_gradients.default
            grad_values, coefficients, scale = op(residual_dot, values, grad_squared_error)
            return _OutputGradient(grad_values, coefficients, residual, scale)
        scale = 2 * grad_squared_error
        entry_scale = per_entry(scale, offsets, indices.size(0))
        return _OutputGradient(residual_dot * entry_scale, values * entry_scale, residual, scale)
    grad = grad_residual.to(values.dtype)
    if grad_squared_error is not None:
        grad = grad + 2 * grad_squared_error[:, None] * residual
    return _decoder_gradient(values, indices, offsets, W_dec, grad, True)


def _dense_rows(
    gradient: _OutputGradient, indices: Tensor, offsets: Tensor | None, W_dec: Tensor
) -> Tensor:
    arguments = (gradient.coefficients, indices, offsets, gradient.dense, W_dec.size(0))
    rows: Tensor = torch.ops.sae_fast.accumulate_rows.default(*arguments)[0]
    return rows


class _Decode(torch.autograd.Function):
    """Autograd of `decode` with rounded rows, or when W_dec's gradient is left as a factor."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        indices: Tensor,
        offsets: Tensor | None,
        gathered: Tensor,
        sink: FactorSink | None,
    ) -> Any:
        ctx.save_for_backward(values, indices, offsets, gathered)
        ctx.sink = sink
        return torch.ops.sae_fast.decode.default(values, indices, offsets, gathered, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, indices, offsets, gathered = ctx.saved_tensors
        needs_values, needs_weights, needs_bias = ctx.needs_input_grad[:3]
        gradient = _decoder_gradient(values, indices, offsets, gathered, grad, needs_values)
        grad_weights = None
        if needs_weights:
            grad_weights = _give_rows(ctx.sink, gradient, values, indices, offsets, gathered)
        grad_bias = gradient.bias() if needs_bias else None
        return gradient.values, grad_weights, grad_bias, None, None, None, None


class _Reconstruct(torch.autograd.Function):
    """Autograd of `reconstruct` with rounded rows, or when W_dec's gradient is left as a factor."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        x: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        gathered: Tensor,
        sink: FactorSink | None,
    ) -> Any:
        op = torch.ops.sae_fast.reconstruct.default
        residual, squared_error, dot = op(values, indices, offsets, gathered, b_dec, x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, indices, offsets, gathered, residual, dot)
        ctx.sink = sink
        return residual, squared_error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual: Tensor | None, grad_squared_error: Tensor | None) -> Any:
        if grad_residual is None and grad_squared_error is None:
            return (None,) * 8
        saved = ctx.saved_tensors
        values, indices, offsets, gathered, _, _ = saved
        gradient = _reconstruction_gradient(saved, grad_residual, grad_squared_error)
        needs_values, needs_weights, needs_bias, needs_x = ctx.needs_input_grad[:4]
        grad_weights = None
        if needs_weights:
            grad_weights = _give_rows(ctx.sink, gradient, values, indices, offsets, gathered)
        grad_values = gradient.values if needs_values else None
        grad_bias = gradient.bias() if needs_bias else None
        grad_x = gradient.output().neg() if needs_x else None
        return grad_values, grad_weights, grad_bias, grad_x, None, None, None, None


def _give_rows(
    sink: FactorSink | None,
    gradient: _OutputGradient,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
) -> Tensor | None:
    """Return the gradient of W_dec, or None after leaving it as a factor."""
    if sink is None:
        return _dense_rows(gradient, indices, offsets, W_dec)
    (key,) = sink.keys
    code = (values.detach(), indices, offsets)
    sink.append(RowFactor(*code, gradient.coefficients, gradient.dense, None, key))
    return None


class _ReconstructDense(torch.autograd.Function):
    """Autograd of `reconstruct` for a DenseCode."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor, precision: str
    ) -> tuple[Tensor, Tensor]:
        residual = dense_product(values, W_dec, precision)
        residual += -x if b_dec is None else b_dec - x
        ctx.precision = precision
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, W_dec, residual)
        return residual, residual.square().sum(1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_residual: Tensor | None, grad_squared_error: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        values, W_dec, residual = ctx.saved_tensors
        needs_values, needs_weights, needs_bias, needs_x = ctx.needs_input_grad[:4]
        grad = grad_residual
        if grad_squared_error is not None:
            scaled = 2 * grad_squared_error[:, None] * residual
            grad = scaled if grad is None else grad + scaled
        if grad is None:
            return (None,) * 5
        grad_values = grad_weights = None
        if needs_values:
            grad_values = dense_product(grad, W_dec.t(), ctx.precision)
        if needs_weights:
            grad_weights = dense_product(values.t(), grad, ctx.precision)
        grad_bias = grad.sum(0) if needs_bias else None
        return grad_values, grad_weights, grad_bias, -grad if needs_x else None, None


def _pieces(code: SparseCode, prefixes: tuple[int, ...]) -> SparseCode:
    """Return the code with a row per token and prefix: the entries that the prefix adds."""
    if code.offsets is None:
        raise RuntimeError("reconstruct_prefixes: code must have offsets, got rows of equal length")
    # Comparisons with numbers, where a tensor of the prefixes would have to come from the host.
    group = torch.zeros_like(code.indices, dtype=torch.int64)
    for prefix in prefixes[:-1]:
        group += code.indices >= prefix
    group.masked_fill_(code.values.detach() == 0, len(prefixes) - 1)
    places = code.entry_rows() * len(prefixes) + group
    rows = torch.arange(code.n_rows * len(prefixes) + 1, device=places.device)
    return SparseCode(code.values, code.indices, code.d_sae, torch.searchsorted(places, rows))


class _ReconstructPrefixes(torch.autograd.Function):
    """Autograd of `reconstruct_prefixes`."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,  # [nnz]
        W_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        indices: Tensor,
        offsets: Tensor,  # [N * G + 1]
        gathered: Tensor,
        n_prefixes: int,
        sink: FactorSink | None,
    ) -> Any:
        pieces = torch.ops.sae_fast.decode.default(values, indices, offsets, gathered, None)
        residuals = pieces.view(x.size(0), n_prefixes, x.size(1))
        residuals[:, 0].add_(b_dec).sub_(x)
        for g in range(1, n_prefixes):
            residuals[:, g].add_(residuals[:, g - 1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, indices, offsets, gathered, residuals)
        ctx.sink = sink
        squared_errors = torch.linalg.vector_norm(residuals, dim=2).square_()
        return residuals[:, -1].clone(), squared_errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual: Tensor | None, grad_squared_errors: Tensor | None) -> Any:
        if grad_residual is None and grad_squared_errors is None:
            return (None,) * 9
        values, indices, offsets, gathered, residuals = ctx.saved_tensors
        needs_values, needs_weights, needs_bias, needs_x = ctx.needs_input_grad[:4]
        by_prefix = _prefix_gradient(residuals, grad_residual, grad_squared_errors)
        dense = by_prefix.flatten(0, 1)
        grad_values = grad_weights = grad_bias = None
        if needs_values:
            op = torch.ops.sae_fast.decode_backward.default
            grad_values = op(dense, indices, offsets, gathered)
        if needs_weights:
            gradient = _OutputGradient(None, values.detach(), dense, None)
            grad_weights = _give_rows(ctx.sink, gradient, values, indices, offsets, gathered)
        whole = by_prefix[:, 0].contiguous()  # of what is part of every reconstruction
        if needs_bias:
            grad_bias = weighted_row_sum(whole.new_ones(whole.size(0)), whole)
        return grad_values, grad_weights, grad_bias, whole.neg() if needs_x else None, *(None,) * 5


def _prefix_gradient(
    residuals: Tensor,  # [N, G, D]
    grad_residual: Tensor | None,  # [N, D], of the last
    grad_squared_errors: Tensor | None,  # [N, G]
) -> Tensor:
    """Return the gradient of the pieces, [N, G, D]: each is part of its own and all later x_hat."""
    if grad_squared_errors is None:
        gradient = torch.zeros_like(residuals)
    else:
        gradient = residuals * (2 * grad_squared_errors)[:, :, None]
    if grad_residual is not None:
        gradient[:, -1].add_(grad_residual)
    for g in range(residuals.size(1) - 2, -1, -1):
        gradient[:, g].add_(gradient[:, g + 1])
    return gradient
