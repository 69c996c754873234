"""DenseCode: every latent of every token, while so many are active that listing them is slower.

Made of torch's matrix products, whose rounding depends on the number of threads, and with ordinary
autograd: gradients are dense. It has what training needs of a SparseCode, under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_fast.ops.data_checks import check_usable
from sae_fast.ops.decode import Reconstruction
from sae_fast.ops.decode import reconstruct as reconstruct_sparse
from sae_fast.ops.full_precision import addmm
from sae_fast.ops.reference import ROUNDED_DTYPES
from sae_fast.ops.sparse_code import SparseCode


@dataclass(frozen=True, eq=False)
class DenseCode:
    """A matrix [N, d_sae]. A latent fires where its value is greater than 0, or if signed not 0.

    Attributes:
        values: [N, d_sae]; differentiable.
        n_listed: 0-d, how many entries a SparseCode in its place would list.
        precision: of the encoder that made it.
        signed: whether values may be negative, for want of a ReLU.
    """

    values: Tensor
    n_listed: Tensor
    precision: str = "fp32"
    signed: bool = False

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

    def fired(self) -> Tensor:
        """Which latents fire in any row, [d_sae] bool."""
        return self.fires().any(0)

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
    centred, weights = _rounded(x - b_dec, precision), _rounded(W_enc, precision)
    values = addmm(b_enc, centred, weights.t())
    if relu:
        values = values.relu_()
    return DenseCode(values, torch.count_nonzero(values.detach()), precision, signed=not relu)


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
    target = -x if b_dec is None else b_dec - x
    residual = addmm(target, code.values, _rounded(W_dec, code.precision))
    return Reconstruction(residual, residual.square().sum(1))


def _rounded(x: Tensor, precision: str) -> Tensor:
    """`x` with the numbers of a low precision, in its own dtype; the gradient is not rounded."""
    dtype = ROUNDED_DTYPES.get(precision)
    if dtype is None:
        return x
    return x + (x.detach().to(dtype).to(x.dtype) - x.detach())
