"""decode and reconstruct: from a code to x_hat, or straight to x_hat − x and its squared length."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast.ops.factors import FactorSink, RowFactor
from sae_fast.ops.library import differentiable, fake, refuse_backward
from sae_fast.ops.reference import ROUNDED_DTYPES
from sae_fast.ops.rows import weighted_row_sum
from sae_fast.ops.sparse_code import SparseCode, per_entry
from sae_fast.ops.working_copies import decoder_copy


class Reconstruction(NamedTuple):
    """residual [N, D] = x_hat − x, and squared_error [N] = Σ_d residual²; both differentiable."""

    residual: Tensor
    squared_error: Tensor


def decode(
    code: SparseCode,
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor | None = None,  # [D]
    *,
    precision: str | None = None,
    dense_grad: bool = True,
) -> Tensor:
    """x_hat [N, D] = Σ value · W_dec[index] + b_dec; only the active rows are read.

    Differentiable in code.values, W_dec and b_dec.

    Args:
        code: the sparse code of N tokens.
        W_dec: decoder rows, one a latent.
        b_dec: decoder bias, or None for 0.
        precision: "bf16" or "fp16" gather rounded rows; by default as the code was encoded.
        dense_grad: whether backward gives W_dec a dense `.grad`; if not, it leaves a RowFactor.

    Raises RuntimeError naming the argument that does not fit.
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


@fake("decode")
def _(
    values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    return values.new_empty(_n_rows(indices, offsets), W_dec.size(1))


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


@fake("decode_backward")
def _(grad: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor) -> Tensor:
    return grad.new_empty(indices.shape)


refuse_backward("decode_backward")


def reconstruct(
    code: SparseCode,
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor | None,  # [D]
    x: Tensor,  # [N, D]
    *,
    precision: str | None = None,
    dense_grad: bool = True,
) -> Reconstruction:
    """x_hat − x and its squared length per token, with x_hat as `decode` gives it.

    One pass over the active rows serves a squared-error loss and its gradient. Differentiable in
    code.values, W_dec, b_dec and x. With precision bf16 or fp16 the residual is in that dtype; the
    squared error is taken before rounding. Other arguments and errors as for `decode`.
    """
    precision = code.precision if precision is None else precision
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


@fake("reconstruct")
def _(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    residual = x.new_empty(x.shape, dtype=W_dec.dtype)
    return residual, x.new_empty(x.size(0)), values.new_empty(indices.shape)


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
    coefficients: Tensor  # in the shape of values: of W_dec's rows, with `dense`
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
    values, indices, offsets, W_dec, residual, residual_dot = saved
    if grad_residual is None:
        # d squared_error = 2 residual: the op's own dot products are the gradient of the values.
        assert grad_squared_error is not None
        scale = 2 * grad_squared_error
        entry_scale = _per_entry(scale, indices, offsets)
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


def _n_rows(indices: Tensor, offsets: Tensor | None) -> int:
    return indices.size(0) if offsets is None else offsets.size(0) - 1


def _per_entry(
    rows: Tensor,  # [N]
    indices: Tensor,
    offsets: Tensor | None,
) -> Tensor:
    """The row's number for every entry, broadcast or spread to the shape of indices."""
    if offsets is None:
        return rows[:, None]
    return per_entry(rows, offsets, indices.size(0))


class _Decode(torch.autograd.Function):
    """decode for what the op's own autograd cannot do: rounded rows, and factored gradients."""

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
    """reconstruct likewise."""

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
    """The gradient of W_dec, or None after leaving it as a factor."""
    if sink is None:
        return _dense_rows(gradient, indices, offsets, W_dec)
    (key,) = sink.keys
    code = (values.detach(), indices, offsets)
    sink.append(RowFactor(*code, gradient.coefficients, gradient.dense, None, key))
    return None
