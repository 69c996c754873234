"""Encoders: from activations to a code, with the gradients of the activations and the weights.

encode_topk, encode_batch_topk and encode_threshold are ops; encode_abs_topk, encode_groupmax,
encode_last and encode_dense are made of ops.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast.ops.checks import check_half_sums, check_usable
from sae_fast.ops.code import CodeKey, DenseCode, SparseCode
from sae_fast.ops.dense_product import dense_product
from sae_fast.ops.reference import ROUNDED_DTYPES
from sae_fast.ops.reference.chunks import chunks
from sae_fast.ops.reference.encode import relu
from sae_fast.ops.registry import differentiable
from sae_fast.ops.row_factors import FactorSink, RowFactor, factor_sums, weighted_row_sum
from sae_fast.ops.working_copies import encoder_copy, frozen_copy

# One part of a code: values, or other numbers that are 0 where there is no gradient, indices,
# offsets, and the gradient of the values.
_Part = tuple[Tensor, Tensor, Tensor | None, Tensor]


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
    """Return the k largest of (x − b_dec) W_encᵀ + b_enc in every row, then ReLU.

    Rows are ordered by value, descending; equal values by ascending index; NaN comes first. An
    index stays listed where ReLU made its value 0. `values` are differentiable in x, W_enc, b_enc
    and b_dec, `aux.values` in W_enc and b_enc only: AuxK must not move b_dec, which all latents
    share, for the sake of the dead ones. The gradient of `aux.values` goes straight through ReLU:
    a dead latent has negative pre-activations, and would otherwise get none.

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

    Raises RuntimeError for an argument that does not fit; the message names it.
    """
    tensors, options = (x, W_enc, b_enc, b_dec), (precision, dead_mask, k_aux, dense_grad)
    op = torch.ops.sae_fast.encode_topk.default
    return encode_selected("encode_topk", op, tensors, k, *options)


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
    """Return the N·k largest positive entries of (x − b_dec) W_encᵀ + b_enc in the whole batch.

    The selection of BatchTopK SAEs (Bussmann et al. 2024): k is the mean of a row, not its size.
    Rows are CSR, ascending by index; equal values go to the earlier row, then the lower index, and
    NaN counts as largest. The budget is exact: where fewer than N·k entries are positive, the last
    row ends in entries of value 0 and index 0. Arguments, gradients and errors as for
    `encode_topk`.
    """
    tensors, options = (x, W_enc, b_enc, b_dec), (precision, dead_mask, k_aux, dense_grad)
    op = torch.ops.sae_fast.encode_batch_topk.default
    return encode_selected("encode_batch_topk", op, tensors, k, *options)


@torch.no_grad()
def full_batches(
    like: Tensor,  # any shape, float32
) -> Tensor:
    """Return how many calls of `encode_batch_topk` have computed every score of a batch, 0-d int64.

    On a GPU that is what is done where the list of candidates had no room, or a bound proved wrong:
    the result is exact and the call many times slower. The number is of this process and of the
    device of `like`, where it stays, so that nothing waits for the device. On a CPU it is 0.
    """
    count: Tensor = torch.ops.sae_fast.full_batches.default(like)
    return count


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
    """Return the entries of (x − b_dec) W_encᵀ + b_enc above `threshold` and above 0, in CSR rows.

    Inside a row they ascend by index; NaN is kept. Not differentiable in `threshold`; other
    arguments, gradients and errors as for `encode_topk`.
    """
    check_usable("encode_threshold", W_enc=W_enc)
    options = (threshold, precision, *encoder_copy(W_enc, precision))
    op = torch.ops.sae_fast.encode_threshold.default
    key = CodeKey()
    sink = None if dense_grad else FactorSink("encode_threshold", "W_enc", W_enc, key)
    outputs = _encode(op, (x, W_enc, b_enc, b_dec), options, precision, sink)
    values, indices, offsets = outputs
    return SparseCode(values, indices, len(W_enc), offsets, precision=precision, made_key=key)


def encode_abs_topk(
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
    """Return the k entries of (x − b_dec) W_encᵀ + b_enc largest in magnitude in every row.

    Values keep their sign, without ReLU: a latent fires where its value is not 0. Rows, also of
    `aux`, are ordered by magnitude, descending; of equal magnitudes the positive ones come first,
    then the lower index.

    They are among the k largest and the k largest of the negated row, so this is `encode_topk`
    twice: exact, at twice its cost. Arguments, gradients and errors as for `encode_topk`.
    """
    check_usable("encode_abs_topk", x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    tensors, options = (x, W_enc, b_enc, b_dec), (precision, dead_mask, k_aux, dense_grad)
    return encode_selected("encode_abs_topk", _abs_topk, tensors, k, *options, signed=True)


def encode_groupmax(
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
    """Return the largest of each of k groups of F / k consecutive latents in every row, then ReLU.

    Rows are ordered by index; of equal values the lower index is taken, and NaN before everything.
    An index stays listed where ReLU made its value 0. `aux`, arguments, gradients and errors as for
    `encode_topk`.

    Not fused: the pre-activations of some tokens at a time, 16 MiB of float32, come from
    `dense_product`. AuxK costs a second product if there are dead latents.
    """
    check_usable("encode_groupmax", x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    if k < 1 or len(W_enc) % k != 0:
        raise RuntimeError(f"encode_groupmax: k must divide d_sae = {len(W_enc)}, got {k}")
    tensors, options = (x, W_enc, b_enc, b_dec), (precision, dead_mask, k_aux, dense_grad)
    return encode_selected("encode_groupmax", _groupmax, tensors, k, *options)


def encode_last(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    count: int,
    *,
    precision: str = "screened",
    dense_grad: bool = True,
) -> Tensor:
    """Return the pre-activations [N, count] of the last latents, with their sign: no ReLU.

    Computed by `dense_product`. Gradients as for `encode_topk`; an entry that is exactly 0 gives
    none.

    Raises:
        RuntimeError: if `count` is not in [0, F].
    """
    check_usable("encode_last", x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    if not 0 <= count <= len(W_enc):
        raise RuntimeError(f"encode_last: count must be 0 to d_sae = {len(W_enc)}, got {count}")
    options = (count, precision)
    return _encode_given("encode_last", _last, (x, W_enc, b_enc, b_dec), options, dense_grad)


def encode_dense(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    *,
    precision: str = "screened",
    relu: bool = True,
) -> DenseCode:
    """Return ReLU((x − b_dec) W_encᵀ + b_enc), as `encode_threshold` with thresholds of 0.

    Without `relu` values are signed, and all latents fire whose value is not 0. Differentiable in
    x, W_enc, b_enc and b_dec; every gradient is dense.
    """
    check_usable("encode_dense", x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    values: Tensor = _EncodeDense.apply(  # type: ignore[no-untyped-call]
        x, W_enc, b_enc, b_dec, precision, relu
    )
    detached = values.detach()
    active = torch.count_nonzero(detached > 0 if relu else detached != 0)
    return DenseCode(values, active, precision, not relu, active)


def _setup_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, b_dec, _, precision, dead_mask, *_ = inputs
    ctx.precision = precision
    ctx.mark_non_differentiable(*(out for out in output if not out.is_floating_point()))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, b_dec, dead_mask, *output)


@differentiable("encode_batch_topk", _setup_topk)
@differentiable("encode_topk", _setup_topk)
def _(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, W_enc, b_dec, dead_mask, *outputs = ctx.saved_tensors
    parts = _parts(outputs, grads, dead_mask)
    gradients = _dense_gradients(ctx, x, W_enc, b_dec, parts)
    return (*gradients, *(None,) * 7)


def _setup_threshold(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, b_dec, _, precision, *_ = inputs
    ctx.precision = precision
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, b_dec, *output)


@differentiable("encode_threshold", _setup_threshold)
def _(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, W_enc, b_dec, *outputs = ctx.saved_tensors
    parts = _parts(outputs, grads, None)
    gradients = _dense_gradients(ctx, x, W_enc, b_dec, parts)
    return (*gradients, *(None,) * 5)


def encode_selected(
    name: str,
    op: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],  # x, W_enc, b_enc, b_dec
    k: int,
    precision: str = "screened",
    dead_mask: Tensor | None = None,  # [F] bool
    k_aux: int | None = None,
    dense_grad: bool = True,
    *,
    signed: bool = False,
) -> SparseCode:
    """Run an encoder that chooses k latents per token, and return its code with the aux.

    Args:
        name: of the encoder, for errors.
        op: returns values, indices, offsets where rows differ in length, aux_values and
            aux_indices; it is given the tensors, k, precision, dead_mask, k_aux and the working
            copies of W_enc.
        tensors: x, W_enc, b_enc and b_dec.
        k: as `encode_topk` has it, as it has the arguments after it.
        signed: whether values keep their sign, without ReLU.
    """
    x, W_enc, *_ = tensors
    check_usable(name, W_enc=W_enc, **({} if dead_mask is None else {"dead_mask": dead_mask}))
    if k_aux is None:
        k_aux = 0 if dead_mask is None else min(x.shape[-1] // 2, int(dead_mask.sum()))
    options = (k, precision, dead_mask, k_aux, *encoder_copy(W_enc, precision))
    key, aux_key = CodeKey(), CodeKey()
    sink = None if dense_grad else FactorSink(name, "W_enc", W_enc, key, aux_key)
    revived = None if signed else dead_mask
    outputs = _encode(op, tensors, options, precision, sink, revived)
    (values, indices), (aux_values, aux_indices) = outputs[:2], outputs[-2:]
    offsets = outputs[2] if len(outputs) == 5 else None
    d_sae = W_enc.size(0)
    aux = None
    if dead_mask is not None:
        aux = SparseCode(
            aux_values, aux_indices, d_sae, precision=precision, signed=signed, made_key=aux_key
        )
    return SparseCode(values, indices, d_sae, offsets, aux, precision, signed, made_key=key)


def _encode_given(
    name: str,
    op: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],  # x, W_enc, b_enc, b_dec
    options: tuple[Any, ...],  # of the op, the precision the last
    dense_grad: bool,
) -> Tensor:
    """Run an encoder of given latents, which needs no working copy; return its signed values."""
    _, W_enc, *_ = tensors
    precision = options[-1]
    sink = None if dense_grad else FactorSink(name, "W_enc", W_enc, CodeKey())
    values, *_ = _encode(op, tensors, options, precision, sink)
    return values


def _encode(
    op: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],  # x, W_enc, b_enc, b_dec
    options: tuple[Any, ...],
    precision: str,
    sink: FactorSink | None,
    dead_mask: Tensor | None = None,  # [F] bool, where aux is not signed
) -> tuple[Tensor, ...]:
    """Run an encoder such that it is differentiable, by its own autograd where that is enough."""
    if precision == "fp16":
        check_half_sums("encoder", tensors[0].device)
    if sink is None and isinstance(op, torch._ops.OpOverload):
        direct: tuple[Tensor, ...] = op(*tensors, *options)
        return direct
    outputs: tuple[Tensor, ...] = _Encode.apply(  # type: ignore[no-untyped-call]
        *tensors, op, options, precision, sink, dead_mask
    )
    return outputs


def _abs_topk(
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
    """Return values, indices, aux_values and aux_indices of encode_abs_topk."""
    options = (k, precision, dead_mask, k_aux, packed, stats, rounded)
    op = torch.ops.sae_fast.encode_topk.default
    upper = op(x, W_enc, b_enc, b_dec, *options)
    lower = op(-x, W_enc, -b_enc, -b_dec, *options)
    return *_larger(upper[:2], lower[:2], k), *_larger(upper[2:], lower[2:], k_aux)


def _larger(
    upper: tuple[Tensor, Tensor],  # values and indices, [N, k] each
    lower: tuple[Tensor, Tensor],  # of the negated pre-activations
    k: int,
) -> tuple[Tensor, Tensor]:
    """Return the k largest of both in magnitude, [N, k]."""
    values = torch.cat([upper[0], 0.0 - lower[0]], dim=1)  # 0 − 0 is not −0
    indices = torch.cat([upper[1], lower[1]], dim=1)
    order = values.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), indices.gather(1, order)


def _groupmax(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    precision: str,
    dead_mask: Tensor | None,
    k_aux: int,
    *copies: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, indices, aux_values and aux_indices of encode_groupmax."""
    # The fused encoder gives the dead latents' part, and checks the arguments for both.
    width, n_fused = len(W_enc) // k, x.size(0) if k_aux > 0 else 0
    arguments = (x[:n_fused], W_enc, b_enc, b_dec, 1, precision, dead_mask, k_aux, *copies)
    _, _, aux_values, aux_indices = torch.ops.sae_fast.encode_topk.default(*arguments)
    aux_shape = (x.size(0), k_aux)
    values, indices = x.new_empty(x.size(0), k), x.new_empty(x.size(0), k, dtype=torch.int32)
    starts = torch.arange(0, len(W_enc), width, dtype=torch.int32, device=x.device)
    for rows, pre_acts in _pre_activations(x, W_enc, b_enc, b_dec, precision):
        largest, place = pre_acts.view(-1, k, width).max(dim=2)
        values[rows], indices[rows] = relu(largest), starts + place.int()
    return values, indices, aux_values.view(aux_shape), aux_indices.view(aux_shape)


def _last(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, count: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values and indices of the last latents, then of an aux without entries."""
    d_sae, n_tokens = len(W_enc), len(x)
    first = d_sae - count
    values = x.new_empty(n_tokens, count)
    for rows, pre_acts in _pre_activations(x, W_enc[first:], b_enc[first:], b_dec, precision):
        values[rows] = pre_acts
    latents = torch.arange(first, d_sae, dtype=torch.int32, device=x.device)
    indices = latents.expand(n_tokens, count).contiguous()
    return values, indices, x.new_empty(n_tokens, 0), indices.new_empty(n_tokens, 0)


def _pre_activations(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, precision: str
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of tokens and their (x − b_dec) W_encᵀ + b_enc, [., F]."""
    for rows in chunks(x.size(0), W_enc.size(0)):
        yield rows, dense_product(x[rows] - b_dec, W_enc.t(), precision, bias=b_enc)


class _Encode(torch.autograd.Function):
    """Autograd for encoders that leave W_enc's gradient as factors, or are made of several ops."""

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
        dead_mask: Tensor | None,
    ) -> Any:
        outputs = op(x, W_enc, b_enc, b_dec, *options)
        ctx.precision, ctx.sink = precision, sink
        ctx.mark_non_differentiable(*(out for out in outputs if not out.is_floating_point()))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, b_dec, dead_mask, *outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, W_enc, b_dec, dead_mask, *outputs = ctx.saved_tensors
        gradients = _dense_gradients if ctx.sink is None else _factored_gradients
        # Lists by latent leave out the entries that did not fire, as their values say.
        reads_all = ctx.sink is None or ctx.needs_input_grad[0]
        parts = _parts(outputs, grads, dead_mask, reads_all)
        return (*gradients(ctx, x, W_enc, b_dec, parts), *(None,) * 5)


def _parts(
    outputs: list[Tensor],
    grads: tuple[Tensor | None, ...],
    dead_mask: Tensor | None,  # [F] bool; None: aux is signed, or there is none
    reads_all: bool = True,
) -> dict[int, _Part]:
    """Return the parts of a code that have a gradient, by their number: 0 the code, 1 its aux.

    A latent that did not fire gets gradient 0, as ReLU has it, but in aux, where the gradient goes
    straight through ReLU. A signed code has no zeros but the entries that fill it up. Without
    `reads_all` gradients of such entries are not set to 0, because nothing reads them.
    """
    # values, indices, offsets where rows differ in length, then values and indices of aux
    first_aux = 2 if len(outputs) == 4 else 3
    offsets = None if first_aux == 2 else outputs[2]
    parts: dict[int, _Part] = {}
    for number, (place, rows) in enumerate([(0, offsets), (first_aux, None)]):
        if place < len(outputs) and (grad := grads[place]) is not None:
            values, indices = outputs[place], outputs[place + 1]
            if number == 1 and dead_mask is not None:  # all entries but those that fill up a row
                places = torch.arange(values.size(1), device=values.device)
                values = torch.empty_like(values).copy_(places < dead_mask.sum())
            if reads_all:
                grad = torch.where(values != 0, grad, 0)
            parts[number] = values, indices, rows, grad.contiguous()
    return parts


def _centred(x: Tensor, b_dec: Tensor, precision: str) -> Tensor:
    """Return x − b_dec in the precision in which the encoder multiplied it."""
    if precision not in ROUNDED_DTYPES:
        return x - b_dec
    with torch.no_grad():  # rounded as it is written, in one pass
        return torch.sub(x, b_dec, out=x.new_empty(x.shape, dtype=ROUNDED_DTYPES[precision]))


def _dense_gradients(
    ctx: Any, x: Tensor, W_enc: Tensor, b_dec: Tensor, parts: dict[int, _Part]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, W_enc, b_enc and b_dec."""
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
            grad_b_dec = weighted_row_sum(part_sums, W_enc, -1.0)
    return grad_x, rows if needs_weights else None, sums if needs_bias else None, grad_b_dec


def _factored_gradients(
    ctx: Any, x: Tensor, W_enc: Tensor, b_dec: Tensor, parts: dict[int, _Part]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, W_enc, b_enc and b_dec: None for W_enc, which gets factors."""
    if not parts:
        return None, None, None, None
    needs_x, needs_weights, needs_bias, needs_b_dec = ctx.needs_input_grad[:4]
    if ctx.precision in ROUNDED_DTYPES:
        dense, shift = _centred(x, b_dec, ctx.precision), None
    else:
        # b_dec may be stepped before W_enc consumes its factors. Factors of several batches are
        # known to have equal shifts, without a look at them, if these are one tensor.
        dense, shift = x.detach(), frozen_copy(b_dec)
    d_sae = W_enc.size(0)
    grad_x = sums = grad_b_dec = None
    for number, (values, indices, offsets, grad) in parts.items():
        code = (values.detach(), indices, offsets)
        factor = RowFactor(*code, grad, dense, shift, ctx.sink.keys[number])
        if needs_weights:
            ctx.sink.append(factor)
        if needs_bias or (needs_b_dec and number == 0):
            part_sums = factor_sums(factor, d_sae)
            sums = part_sums if sums is None else sums + part_sums
        if number == 0 and needs_x:
            grad_x = torch.ops.sae_fast.decode.default(grad, indices, offsets, W_enc, None)
        if number == 0 and needs_b_dec:
            grad_b_dec = weighted_row_sum(part_sums, W_enc, -1.0)
    return grad_x, None, sums if needs_bias else None, grad_b_dec


class _EncodeDense(torch.autograd.Function):
    """Autograd of `encode_dense`: one product forward, and one backward for W_enc.

    The gradient of b_dec is −W_encᵀ times the sum over tokens of the pre-activations' gradients,
    with the sum taken first: the gradient of x, a third product, is computed only if needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        precision: str,
        relu: bool,
    ) -> Tensor:
        values = dense_product(x - b_dec, W_enc.t(), precision, bias=b_enc, relu=relu)
        ctx.precision, ctx.relu = precision, relu
        ctx.save_for_backward(x, W_enc, b_dec, *((values,) if relu else ()))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec, *values = ctx.saved_tensors
        needs_x, needs_weights, needs_bias, needs_b_dec = ctx.needs_input_grad[:4]
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, values[0], 0)
        sums = grad.sum(0)
        grad_x = grad_weights = grad_b_dec = None
        if needs_weights:
            grad_weights = dense_product(grad.t(), x - b_dec, ctx.precision)
        if needs_b_dec:
            grad_b_dec = weighted_row_sum(sums, W_enc, -1.0)
        if needs_x:
            grad_x = dense_product(grad, W_enc, ctx.precision)
        return grad_x, grad_weights, sums if needs_bias else None, grad_b_dec, None, None
