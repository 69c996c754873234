"""The argument checks of every op, and so the one list of their messages.

The fake kernels run them while tracing, the reference before computing; the compiled ops check the
same things in the same words. A message is "op: argument must be ..., got ..."; the shape comes
first, then dtype, device, range. Each function takes the arguments of the op it is named after.

    {op}: {name} must have shape {shape}, got {shape}         (* stands for any size)
    {op}: values must have the shape of indices, {shape}, got {shape}
    {op}: {name} must have the shape of w, {shape}, got {shape}
    {op}: {name} must be float32, got {dtype}                 (the reference also takes float64)
    {op}: {name} must be float32, bfloat16 or float16, got {dtype}       (W_dec, dense, source)
    {op}: {name} must be int32, got {dtype}                   (likewise int64, bool)
    {op}: exp_avg must be float32, bfloat16 or uint8, got {dtype}        (of fused_update_)
    {op}: exp_avg_sq must be {dtype of exp_avg}, got {dtype}             (of fused_update_)
    {op}: {name} must be given where exp_avg is {dtype}, got none        (scales, step_count)
    {op}: {name} must be none where exp_avg is {dtype}, got a tensor     (scales)
    {op}: rule must be adam, sgd, signum or schedule_free_signum, got {rule}
    {op}: {name} must be given where rule is {rule}, got none            (exp_avg_sq, lr_squares)
    {op}: {name} must be none where rule is {rule}, got a tensor         (those, exp_avg_sq_scale)
    {op}: {name} must be on {device} like {first}, got {device}
    {op}: {name} is changed in place and must be contiguous
    {op}: k must be in [1, d_sae], got k={k} with d_sae={d_sae}
    {op}: k_aux must be in [0, d_sae], got k_aux={k_aux} with d_sae={d_sae}
    {op}: k_aux must be 0 without a dead_mask, got k_aux={k_aux}
    {op}: precision must be screened, fp32, bf16 or fp16, got {precision}
    {op}: d_sae must be at least 1, got {d_sae}
    {op}: split must be in [0, d_sae], got split={split} with d_sae={d_sae}
    {op}: at most {most} entries, got {count}
    {op}: offsets must have N + 1 elements, got none
    {op}: latent_offsets must have d_sae + 1 >= 2 elements, got {count}
    {op}: offsets must ascend from 0 to the number of entries, {nnz}, got {first} to {last}
    {op}: indices must be in [0, {d_sae}), got {index}
    {op}: entries must be in [0, {nnz}), got {entry}
    {op}: {name} must be in [0, {rows of source or out}), got {number}   (of gather_rows_)
    {op}: latent_offsets must ascend from 0 to the number of entries, {nnz}, got {first} to {last}

The last five look at data, see data_checks.py.
"""

import torch
from torch import Tensor

from sae_fast.ops.call import GATHERED, MASTER, Call
from sae_fast.ops.update_checks import fused_update_ as fused_update_
from sae_fast.ops.update_checks import row_gradient_norm as row_gradient_norm
from sae_fast.ops.update_checks import update_scalars as update_scalars
from sae_fast.ops.update_checks import update_vector_ as update_vector_

_MOST_ENTRIES = 2**31 - 1


def pack_encoder(W_enc: Tensor, precision: str) -> None:  # noqa: D103
    op = Call("pack_encoder", "W_enc", W_enc)
    op.tensor("W_enc", W_enc, (None, None), MASTER)
    op.precision(precision)


def _selection(op: Call, d_sae: int, k: int, dead_mask: Tensor | None, k_aux: int) -> None:
    if dead_mask is not None:
        op.tensor("dead_mask", dead_mask, (d_sae,), (torch.bool,))
    op.require(1 <= k <= d_sae, "k must be in [1, d_sae]", f"k={k} with d_sae={d_sae}")
    must = "k_aux must be in [0, d_sae]"
    op.require(0 <= k_aux <= d_sae, must, f"k_aux={k_aux} with d_sae={d_sae}")
    must = "k_aux must be 0 without a dead_mask"
    op.require(dead_mask is not None or k_aux == 0, must, f"k_aux={k_aux}")


def _encoder(
    op: Call, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, precision: str
) -> None:
    op.tensor("x", x, (None, None), MASTER)
    op.tensor("W_enc", W_enc, (None, x.size(1)), MASTER)
    op.tensor("b_enc", b_enc, (W_enc.size(0),), MASTER)
    op.tensor("b_dec", b_dec, (x.size(1),), MASTER)
    op.precision(precision)


def encode_topk(  # noqa: D103
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
) -> None:
    op = Call("encode_topk", "x", x)
    _encoder(op, x, W_enc, b_enc, b_dec, precision)
    _selection(op, W_enc.size(0), k, dead_mask, k_aux)


def encode_batch_topk(  # noqa: D103
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
) -> None:
    op = Call("encode_batch_topk", "x", x)
    _encoder(op, x, W_enc, b_enc, b_dec, precision)
    _selection(op, W_enc.size(0), k, dead_mask, k_aux)
    must = f"at most {_MOST_ENTRIES} entries"
    op.require(x.size(0) * k <= _MOST_ENTRIES, must, f"{x.size(0)} * {k}")


def encode_threshold(  # noqa: D103
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    threshold: Tensor,
    precision: str,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> None:
    op = Call("encode_threshold", "x", x)
    _encoder(op, x, W_enc, b_enc, b_dec, precision)
    op.tensor("threshold", threshold, (W_enc.size(0),), MASTER)


def decode(  # noqa: D103
    values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> None:
    op = Call("decode", "values", values)
    op.code(values, indices, offsets)
    op.tensor("W_dec", W_dec, (None, None), GATHERED)
    if b_dec is not None:
        op.tensor("b_dec", b_dec, (W_dec.size(1),), MASTER)


def decode_backward(  # noqa: D103
    grad: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor
) -> None:
    op = Call("decode_backward", "grad", grad)
    n_rows = op.code(None, indices, offsets)
    op.tensor("W_dec", W_dec, (None, None), GATHERED)
    op.tensor("grad", grad, (n_rows, W_dec.size(1)), MASTER)


def reconstruct(  # noqa: D103
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
) -> None:
    op = Call("reconstruct", "values", values)
    n_rows = op.code(values, indices, offsets)
    op.tensor("W_dec", W_dec, (None, None), GATHERED)
    if b_dec is not None:
        op.tensor("b_dec", b_dec, (W_dec.size(1),), MASTER)
    op.tensor("x", x, (n_rows, W_dec.size(1)), MASTER)


def accumulate_rows(  # noqa: D103
    coefficients: Tensor, indices: Tensor, offsets: Tensor | None, dense: Tensor, d_sae: int
) -> None:
    op = Call("accumulate_rows", "coefficients", coefficients)
    n_rows = op.code(coefficients, indices, offsets)
    op.tensor("dense", dense, (n_rows, None), GATHERED)
    op.require(d_sae >= 1, "d_sae must be at least 1", str(d_sae))


def latent_major(  # noqa: D103
    values: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int
) -> None:
    op = Call("latent_major", "values", values)
    op.code(values, indices, offsets)
    op.require(d_sae >= 1, "d_sae must be at least 1", str(d_sae))


def gather_entries(source: Tensor, entries: Tensor) -> None:  # noqa: D103
    op = Call("gather_entries", "source", source)
    op.dtype("source", source, MASTER)
    op.tensor("entries", entries, (None,), (torch.int32,))


def gather_rows_(  # noqa: D103
    out: Tensor,
    places: Tensor | None,
    source: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    scale: float,
) -> None:
    op = Call("gather_rows_", "out", out)
    op.tensor("out", out, (None, None), MASTER)
    op.in_place("out", out)
    op.tensor("source", source, (None, out.size(1)), GATHERED)
    op.tensor("rows", rows, (out.size(0) if places is None else None,), (torch.int64,))
    if places is not None:
        op.tensor("places", places, (rows.size(0),), (torch.int64,))
    if mean is not None:
        op.tensor("mean", mean, (out.size(1),), MASTER)


def latent_sums(  # noqa: D103
    latent_offsets: Tensor, entries: Tensor, coefficients: Tensor
) -> None:
    op = Call("latent_sums", "coefficients", coefficients)
    op.latents(latent_offsets)
    op.tensor("entries", entries, (None,), (torch.int32,))
    op.dtype("coefficients", coefficients, MASTER)


def normalize_rows_(W: Tensor) -> None:  # noqa: D103
    op = Call("normalize_rows_", "W", W)
    op.tensor("W", W, (None, None), MASTER)
    op.in_place("W", W)


def dense_product(  # noqa: D103
    left: Tensor, right: Tensor, bias: Tensor | None, relu: bool, precision: str
) -> None:
    op = Call("dense_product", "left", left)
    op.tensor("left", left, (None, None), MASTER)
    op.tensor("right", right, (left.size(1), None), MASTER)
    if bias is not None:
        op.tensor("bias", bias, (right.size(1),), MASTER)
    op.precision(precision)


def decorrelation(W: Tensor) -> None:  # noqa: D103
    op = Call("decorrelation", "W", W)
    op.tensor("W", W, (None, None), MASTER)


def _groups(op: Call, h: Tensor, split: int) -> None:
    op.tensor("h", h, (None, None), MASTER)
    must = "split must be in [0, d_sae]"
    op.require(0 <= split <= h.size(1), must, f"split={split} with d_sae={h.size(1)}")


def code_correlation(h: Tensor, split: int) -> None:  # noqa: D103
    _groups(Call("code_correlation", "h", h), h, split)


def code_correlation_backward(  # noqa: D103
    grad_within: Tensor | None,
    grad_between: Tensor | None,
    h: Tensor,
    split: int,
    means: Tensor,
    inverse_norms: Tensor,
    gram: Tensor,
) -> None:
    op = Call("code_correlation_backward", "h", h)
    _groups(op, h, split)
    n_tokens, d_sae = h.shape
    op.tensor("means", means, (d_sae,), (torch.float64,))
    op.tensor("inverse_norms", inverse_norms, (d_sae,), MASTER)
    matrices = 1 if split == d_sae else 2
    op.tensor("gram", gram, (matrices, n_tokens, n_tokens), MASTER)
    for name, grad in (("grad_within", grad_within), ("grad_between", grad_between)):
        if grad is not None:
            op.tensor(name, grad, (), MASTER)
