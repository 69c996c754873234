"""DenseCode: every latent of every token, while so many are active that listing them is slower.

Made of dense products with dense gradients; where these are torch's, their rounding depends on the
number of threads. It has what training needs of a SparseCode, under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_fast.ops.data_checks import check_usable
from sae_fast.ops.decode import Reconstruction
from sae_fast.ops.decode import reconstruct as reconstruct_sparse
from sae_fast.ops.dense_product import dense_product
from sae_fast.ops.rows import weighted_row_sum
from sae_fast.ops.sparse_code import SparseCode


@dataclass(frozen=True, eq=False)
class DenseCode:
    """A matrix [N, d_sae]. A latent fires where its value is greater than 0, or if signed not 0.

    Attributes:
        values: [N, d_sae]; differentiable.
        n_listed: 0-d, how many entries a SparseCode in its place would list.
        precision: of the encoder that made it.
        signed: whether values may be negative, for want of a ReLU.
        counted: 0-d, how many entries are of latents that fire, where that is known.
    """

    values: Tensor
    n_listed: Tensor
    precision: str = "fp32"
    signed: bool = False
    counted: Tensor | None = None

    @property
    def n_rows(self) -> int:
        """N, the number of tokens."""
        return self.values.size(0)

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.values.size(1)

    def dense(self) -> Tensor:
        """The whole matrix [N, d_sae]; differentiable."""
        return self.values

    def fires(self) -> Tensor:
        """Which entries are of latents that fire, bool in the shape of values; NaN does not."""
        return self.values.abs() > 0 if self.signed else self.values > 0

    def l0(self) -> Tensor:
        """How many latents fire in each row, [N] int64."""
        return self.fires().sum(1)

    def n_active(self) -> Tensor:
        """Return how many entries are of latents that fire, 0-d int64."""
        if self.counted is not None:
            return self.counted
        return torch.count_nonzero(self.fires())  # of bool; of float32 it takes 4 times as long

    def fired(self) -> Tensor:
        """Which latents fire in any row, [d_sae] bool."""
        if self.signed or self.n_rows == 0:
            return self.fires().any(0)
        return self.values.detach().amax(0) > 0  # without an array [N, d_sae]

    def with_values(
        self,
        values: Tensor,  # [N, d_sae]
    ) -> DenseCode:
        """The same entries with other values."""
        return DenseCode(values, self.n_listed, self.precision, self.signed)

    def listed(self) -> SparseCode:
        """Return the code with every latent of every token listed, in ascending order."""
        latents = torch.arange(self.d_sae, dtype=torch.int32, device=self.values.device)
        indices = latents.expand(self.n_rows, -1).contiguous()
        return SparseCode(
            self.values, indices, self.d_sae, precision=self.precision, signed=self.signed
        )

    def spread(
        self,
        numbers: Tensor,  # [d_sae]
    ) -> Tensor:
        """For every entry the number of its latent: broadcast over the rows, [1, d_sae]."""
        return numbers[None]


Code = SparseCode | DenseCode


def encode_dense(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    *,
    precision: str = "screened",
    relu: bool = True,
) -> DenseCode:
    """ReLU((x − b_dec) W_encᵀ + b_enc), as `encode_threshold` with thresholds of 0.

    Without `relu` values are signed, and all latents but those of value 0 fire.
    """
    check_usable("encode_dense", x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    values: Tensor = _EncodeDense.apply(  # type: ignore[no-untyped-call]
        x, W_enc, b_enc, b_dec, precision, relu
    )
    detached = values.detach()
    active = torch.count_nonzero(detached > 0 if relu else detached != 0)
    return DenseCode(values, active, precision, not relu, active)


def reconstruct(
    code: Code,
    W_dec: Tensor,  # [F, D]
    b_dec: Tensor | None,  # [D]
    x: Tensor,  # [N, D]
    *,
    dense_grad: bool = True,
) -> Reconstruction:
    """`reconstruct` of either kind of code; a DenseCode leaves dense gradients in any case."""
    if isinstance(code, SparseCode):
        return reconstruct_sparse(code, W_dec, b_dec, x, dense_grad=dense_grad)
    return Reconstruction(
        *_ReconstructDense.apply(  # type: ignore[no-untyped-call]
            code.values, W_dec, b_dec, x, code.precision
        )
    )


class _EncodeDense(torch.autograd.Function):
    """See `encode_dense`: one product forward, and for W_enc one backward.

    The gradient of b_dec is −W_encᵀ times the sum of those of the pre-activations over tokens, with
    the sum taken first: the gradient of every x, a third product, is made only where it is needed.
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
            grad_b_dec = -weighted_row_sum(sums, W_enc)
        if needs_x:
            grad_x = dense_product(grad, W_enc, ctx.precision)
        return grad_x, grad_weights, sums if needs_bias else None, grad_b_dec, None, None


class _ReconstructDense(torch.autograd.Function):
    """See `reconstruct`, of a DenseCode."""

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
