"""reconstruct_prefixes: the errors of nested dictionaries from one decode.

Prefix g is the first m_g latents, m_1 < … < m_G = d_sae. The entries of a row ascend by index, so
those that prefix g adds to the one before lie side by side: with more offsets the same entries are
a code of N·G rows. That is decoded once, and a running sum makes it the G reconstructions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast.ops.call import MASTER, Call
from sae_fast.ops.data_checks import check_usable
from sae_fast.ops.factors import FactorSink, RowFactor
from sae_fast.ops.rows import weighted_row_sum
from sae_fast.ops.sparse_code import SparseCode
from sae_fast.ops.working_copies import decoder_copy


class PrefixReconstruction(NamedTuple):
    """residual [N, D] = x_hat − x of all latents, squared_errors [N, G]; both differentiable."""

    residual: Tensor
    squared_errors: Tensor


def reconstruct_prefixes(
    code: SparseCode,
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor,  # [D]
    x: Tensor,  # [N, D]
    prefixes: Sequence[int],
    *,
    dense_grad: bool = True,
) -> PrefixReconstruction:
    """Σ_d (x_hat_g − x)² per prefix g; x_hat_g = Σ value · W_dec[index] + b_dec over index < m_g.

    A composition of `decode` and its backward, each entry read once in either; memory 2·N·G·D
    floats. Differentiable in code.values, W_dec, b_dec and x.

    Args:
        code: of N tokens, with offsets; the entries of a row ascend by index, and those of value 0
            may only come last. It is what `encode_batch_topk` gives.
        W_dec: decoder rows, one a latent.
        b_dec: decoder bias, part of every reconstruction.
        x: activations.
        prefixes: sizes of the dictionaries, ascending, the last one d_sae.
        dense_grad: whether backward gives W_dec a dense `.grad`; if not, it leaves a RowFactor.

    Raises RuntimeError naming the argument that does not fit.
    """
    if not torch.compiler.is_compiling():
        code.check()
    op = Call("reconstruct_prefixes", "code", code.values)
    op.tensor("W_dec", W_dec, (code.d_sae, None), MASTER)
    op.tensor("b_dec", b_dec, (W_dec.size(1),), MASTER)
    op.tensor("x", x, (code.n_rows, W_dec.size(1)), MASTER)
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


def _pieces(code: SparseCode, prefixes: tuple[int, ...]) -> SparseCode:
    """The code with a row for each token and prefix: the entries that the prefix adds."""
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
        by_prefix = _gradient(residuals, grad_residual, grad_squared_errors)
        dense = by_prefix.flatten(0, 1)
        grad_values = grad_weights = grad_bias = None
        if needs_values:
            op = torch.ops.sae_fast.decode_backward.default
            grad_values = op(dense, indices, offsets, gathered)
        if needs_weights:
            grad_weights = _give_rows(ctx.sink, values, indices, offsets, dense, gathered.size(0))
        whole = by_prefix[:, 0].contiguous()  # of what is part of every reconstruction
        if needs_bias:
            grad_bias = weighted_row_sum(whole.new_ones(whole.size(0)), whole)
        return grad_values, grad_weights, grad_bias, whole.neg() if needs_x else None, *(None,) * 5


def _gradient(
    residuals: Tensor,  # [N, G, D]
    grad_residual: Tensor | None,  # [N, D], of the last
    grad_squared_errors: Tensor | None,  # [N, G]
) -> Tensor:
    """The gradient of the pieces, [N, G, D]: each is part of its own and all later x_hat."""
    if grad_squared_errors is None:
        gradient = torch.zeros_like(residuals)
    else:
        gradient = residuals * (2 * grad_squared_errors)[:, :, None]
    if grad_residual is not None:
        gradient[:, -1].add_(grad_residual)
    for g in range(residuals.size(1) - 2, -1, -1):
        gradient[:, g].add_(gradient[:, g + 1])
    return gradient


def _give_rows(
    sink: FactorSink | None,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    dense: Tensor,  # [N * G, D]
    d_sae: int,
) -> Tensor | None:
    """The gradient of W_dec, or None after leaving it as a factor."""
    if sink is None:
        op = torch.ops.sae_fast.accumulate_rows.default
        rows: Tensor = op(values, indices, offsets, dense, d_sae)[0]
        return rows
    code = (values.detach(), indices, offsets)
    sink.append(RowFactor(*code, values.detach(), dense, None, *sink.keys))
    return None
