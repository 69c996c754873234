"""encode_topk and encode_threshold: from activations to a sparse code, with their gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast.ops.data_checks import check_usable
from sae_fast.ops.factors import FactorSink, RowFactor, latent_sums
from sae_fast.ops.library import NATIVE, differentiable, dynamic_size, fake, refuse_backward
from sae_fast.ops.reference import ROUNDED_DTYPES
from sae_fast.ops.rows import weighted_row_sum
from sae_fast.ops.sparse_code import SparseCode
from sae_fast.ops.working_copies import encoder_copy, frozen_copy

_PANEL = 64  # latents in a panel of the packed encoder

# One part of a code: values, indices, offsets, and the gradient of the values.
_Part = tuple[Tensor, Tensor, Tensor | None, Tensor]


@fake("pack_encoder")
def _(W_enc: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
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


refuse_backward("pack_encoder")


def encode_topk(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    k: int,
    *,
    precision: str = "screened",
    dead_mask: Tensor | None = None,  # [F] bool
    k_aux: int | None = None,
    dense_grad: bool = True,
) -> SparseCode:
    """The k largest of (x − b_dec) W_encᵀ + b_enc in every row, then ReLU.

    Rows are ordered by value, descending; equal values by ascending index; NaN comes first. An
    index stays listed where ReLU made its value 0. `values` are differentiable in x, W_enc, b_enc
    and b_dec, `aux.values` in W_enc and b_enc only: AuxK must not move b_dec, which all latents
    share, to suit the dead ones.

    Args:
        x: activations.
        W_enc: encoder rows, one a latent.
        b_enc: encoder bias.
        b_dec: decoder bias, subtracted from x.
        k: entries of a row, 1 to d_sae.
        precision: "screened" and "fp32" give the same exact float32 top-k, screened by a cheaper
            product and so faster; "bf16" and "fp16" round x − b_dec and W_enc to that dtype.
        dead_mask: latents to choose `aux` from, for AuxK, in the same pass.
        k_aux: entries of a row of `aux`; by default as many as there are dead latents, at most
            D // 2. Where there are fewer dead latents the rest has value 0 and index 0.
        dense_grad: whether backward gives W_enc a dense `.grad`; if not, it leaves a RowFactor.

    Raises RuntimeError naming the argument that does not fit.
    """
    tensors, options = (x, W_enc, b_enc, b_dec), (precision, dead_mask, k_aux, dense_grad)
    op = torch.ops.sae_fast.encode_topk.default
    return encode_selected("encode_topk", op, tensors, k, *options)


@fake("encode_topk")
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    precision: str,
    dead_mask: Tensor | None,
    k_aux: int,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = [(x.size(0), k), (x.size(0), k_aux)]
    values, aux_values = (x.new_empty(shape) for shape in shapes)
    indices, aux_indices = (x.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return values, indices, aux_values, aux_indices


def _setup_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, b_dec, _, precision, *_ = inputs
    ctx.precision = precision
    ctx.mark_non_differentiable(*(out for out in output if not out.is_floating_point()))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, b_dec, *output)


@differentiable("encode_batch_topk", _setup_topk)
@differentiable("encode_topk", _setup_topk)
def _(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, W_enc, b_dec, *outputs = ctx.saved_tensors
    parts = _parts(outputs, grads)
    gradients = _dense_gradients(ctx, x, W_enc, b_dec, parts)
    return (*gradients, *(None,) * 7)


def encode_batch_topk(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    k: int,
    *,
    precision: str = "screened",
    dead_mask: Tensor | None = None,  # [F] bool
    k_aux: int | None = None,
    dense_grad: bool = True,
) -> SparseCode:
    """The N·k largest positive entries of (x − b_dec) W_encᵀ + b_enc in the whole batch.

    The selection of BatchTopK SAEs (Bussmann et al. 2024): k is the mean of a row, not its size.
    Rows are CSR, ascending by index; equal values go to the earlier row, then the lower index, and
    NaN counts as largest. The budget is exact: where fewer than N·k entries are positive, the last
    row ends in entries of value 0 and index 0. Arguments, gradients and errors as for
    `encode_topk`.
    """
    tensors, options = (x, W_enc, b_enc, b_dec), (precision, dead_mask, k_aux, dense_grad)
    op = torch.ops.sae_fast.encode_batch_topk.default
    return encode_selected("encode_batch_topk", op, tensors, k, *options)


@fake("encode_batch_topk")
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    precision: str,
    dead_mask: Tensor | None,
    k_aux: int,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rows = x.size(0)
    values, aux_values = x.new_empty(n_rows * k), x.new_empty(n_rows, k_aux)
    indices, aux_indices = (x.new_empty(v.shape, dtype=torch.int32) for v in (values, aux_values))
    return values, indices, x.new_empty(n_rows + 1, dtype=torch.int64), aux_values, aux_indices


def encode_threshold(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    threshold: Tensor,  # [F]
    *,
    precision: str = "screened",
    dense_grad: bool = True,
) -> SparseCode:
    """The entries of (x − b_dec) W_encᵀ + b_enc above `threshold` and above 0, in CSR rows.

    Inside a row they ascend by index; NaN is kept. Not differentiable in `threshold`; otherwise
    arguments, gradients and errors as for `encode_topk`.
    """
    check_usable("encode_threshold", W_enc=W_enc)
    options = (threshold, precision, *encoder_copy(W_enc, precision))
    op = torch.ops.sae_fast.encode_threshold.default
    sink = None if dense_grad else FactorSink("encode_threshold", "W_enc", W_enc)
    outputs = _encode(op, (x, W_enc, b_enc, b_dec), options, precision, sink)
    values, indices, offsets = outputs
    code = SparseCode(values, indices, W_enc.size(0), offsets, precision=precision)
    if sink is not None:
        sink.keys = (code.key,)
    return code


@fake("encode_threshold")
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    threshold: Tensor,
    precision: str,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    entries = dynamic_size()
    indices = x.new_empty(entries, dtype=torch.int32)
    return x.new_empty(entries), indices, x.new_empty(x.size(0) + 1, dtype=torch.int64)


def _setup_threshold(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, b_dec, _, precision, *_ = inputs
    ctx.precision = precision
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, b_dec, *output)


@differentiable("encode_threshold", _setup_threshold)
def _(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, W_enc, b_dec, *outputs = ctx.saved_tensors
    parts = _parts(outputs, grads)
    gradients = _dense_gradients(ctx, x, W_enc, b_dec, parts)
    return (*gradients, *(None,) * 5)


def encode_selected(
    name: str,
    op: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],  # x, W_enc, b_enc, b_dec
    k: int,
    precision: str,
    dead_mask: Tensor | None,  # [F] bool
    k_aux: int | None,
    dense_grad: bool,
    *,
    signed: bool = False,
) -> SparseCode:
    """An encoder with a code and its aux, and between them the code's offsets if it has any."""
    x, W_enc, *_ = tensors
    check_usable(name, W_enc=W_enc, **({} if dead_mask is None else {"dead_mask": dead_mask}))
    if k_aux is None:
        k_aux = 0 if dead_mask is None else min(x.shape[-1] // 2, int(dead_mask.sum()))
    options = (k, precision, dead_mask, k_aux, *encoder_copy(W_enc, precision))
    sink = None if dense_grad else FactorSink(name, "W_enc", W_enc)
    outputs = _encode(op, tensors, options, precision, sink)
    (values, indices), (aux_values, aux_indices) = outputs[:2], outputs[-2:]
    offsets = outputs[2] if len(outputs) == 5 else None
    d_sae = W_enc.size(0)
    aux = SparseCode(aux_values, aux_indices, d_sae, precision=precision, signed=signed)
    shown = None if dead_mask is None else aux
    code = SparseCode(values, indices, d_sae, offsets, shown, precision, signed)
    if sink is not None:
        sink.keys = code.key, aux.key
    return code


def encode_given(
    name: str,
    op: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],  # x, W_enc, b_enc, b_dec
    options: tuple[Any, ...],  # of the op, the precision the last
    dense_grad: bool,
) -> Tensor:
    """The values of an encoder that needs no working copy and gives a signed code without aux."""
    _, W_enc, *_ = tensors
    precision = options[-1]
    sink = None if dense_grad else FactorSink(name, "W_enc", W_enc)
    values, indices, *_ = _encode(op, tensors, options, precision, sink)
    if sink is not None:
        code = SparseCode(values, indices, W_enc.size(0), precision=precision, signed=True)
        sink.keys = (code.key,)
    return values


def _encode(
    op: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],  # x, W_enc, b_enc, b_dec
    options: tuple[Any, ...],
    precision: str,
    sink: FactorSink | None,
) -> tuple[Tensor, ...]:
    if sink is None and isinstance(op, torch._ops.OpOverload):
        own: tuple[Tensor, ...] = op(*tensors, *options)
        return own
    outputs: tuple[Tensor, ...] = _Encode.apply(  # type: ignore[no-untyped-call]
        *tensors, op, options, precision, sink
    )
    return outputs


class _Encode(torch.autograd.Function):
    """What an op's own autograd cannot do: W_enc's gradient as factors, one for each part of the
    code, or an encoder that is a composition of ops.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        op: Callable[..., tuple[Tensor, ...]],
        options: tuple[Any, ...],
        precision: str,
        sink: FactorSink | None,
    ) -> Any:
        outputs = op(x, W_enc, b_enc, b_dec, *options)
        ctx.precision, ctx.sink = precision, sink
        ctx.mark_non_differentiable(*(out for out in outputs if not out.is_floating_point()))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, b_dec, *outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, W_enc, b_dec, *outputs = ctx.saved_tensors
        gradients = _dense_gradients if ctx.sink is None else _factored_gradients
        return *gradients(ctx, x, W_enc, b_dec, _parts(outputs, grads)), None, None, None, None


def _parts(outputs: list[Tensor], grads: tuple[Tensor | None, ...]) -> dict[int, _Part]:
    """The parts of a code that have a gradient, by their number: 0 the code, 1 its aux.

    A latent that did not fire has gradient 0, whatever came in: ReLU. A signed code has no zeros
    but those that fill it up.
    """
    # values, indices, offsets where rows differ in length, then values and indices of aux
    first_aux = 2 if len(outputs) == 4 else 3
    offsets = None if first_aux == 2 else outputs[2]
    parts: dict[int, _Part] = {}
    for number, (place, rows) in enumerate([(0, offsets), (first_aux, None)]):
        if place < len(outputs) and (grad := grads[place]) is not None:
            values, indices = outputs[place], outputs[place + 1]
            parts[number] = values, indices, rows, torch.where(values.abs() > 0, grad, 0)
    return parts


def _centred(x: Tensor, b_dec: Tensor, precision: str) -> Tensor:
    """x − b_dec as the encoder's product saw it."""
    return (x - b_dec).to(ROUNDED_DTYPES.get(precision, x.dtype))


def _dense_gradients(
    ctx: Any, x: Tensor, W_enc: Tensor, b_dec: Tensor, parts: dict[int, _Part]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W_enc, b_enc and b_dec."""
    if not parts:
        return None, None, None, None
    needs_x, needs_weights, needs_bias, needs_b_dec = ctx.needs_input_grad[:4]
    grad_x = rows = sums = grad_b_dec = None
    dense = _centred(x, b_dec, ctx.precision)
    for number, (_, indices, offsets, grad) in parts.items():
        if needs_weights or needs_bias or (needs_b_dec and number == 0):
            sum_rows = torch.ops.sae_fast.accumulate_rows.default
            part_rows, part_sums = sum_rows(grad, indices, offsets, dense, W_enc.size(0))
            rows = part_rows if rows is None else rows + part_rows
            sums = part_sums if sums is None else sums + part_sums
        if number == 0 and needs_x:
            grad_x = torch.ops.sae_fast.decode.default(grad, indices, offsets, W_enc, None)
        if number == 0 and needs_b_dec:
            # −Σ_n grad_x[n] with the sum over tokens taken first: grad_x itself is not needed.
            grad_b_dec = -weighted_row_sum(part_sums, W_enc)
    return grad_x, rows if needs_weights else None, sums if needs_bias else None, grad_b_dec


def _factored_gradients(
    ctx: Any, x: Tensor, W_enc: Tensor, b_dec: Tensor, parts: dict[int, _Part]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W_enc (None: left as factors), b_enc and b_dec."""
    if not parts:
        return None, None, None, None
    needs_x, needs_weights, needs_bias, needs_b_dec = ctx.needs_input_grad[:4]
    if ctx.precision in ROUNDED_DTYPES:
        dense, shift = _centred(x, b_dec, ctx.precision), None
    else:
        # b_dec may be stepped before W_enc consumes its factors. Those of several batches are known
        # to have the same shift, without a look at it, by its being the same tensor.
        dense, shift = x.detach(), frozen_copy(b_dec)
    d_sae = W_enc.size(0)
    grad_x = sums = grad_b_dec = None
    for number, (values, indices, offsets, grad) in parts.items():
        code = (values.detach(), indices, offsets)
        factor = RowFactor(*code, grad, dense, shift, ctx.sink.keys[number])
        if needs_weights:
            ctx.sink.append(factor)
        if needs_bias or (needs_b_dec and number == 0):
            part_sums = latent_sums(factor, d_sae)
            sums = part_sums if sums is None else sums + part_sums
        if number == 0 and needs_x:
            grad_x = torch.ops.sae_fast.decode.default(grad, indices, offsets, W_enc, None)
        if number == 0 and needs_b_dec:
            grad_b_dec = -weighted_row_sum(part_sums, W_enc)
    return grad_x, None, sums if needs_bias else None, grad_b_dec
