"""Factored gradients: what backward leaves on a weight matrix in place of a dense `.grad`.

With `dense_grad=False` a backward appends a RowFactor to `W.row_factors`, a list on the parameter.
Several backward calls accumulate; the optimiser consumes the list and clears it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sae_fast.ops import rows
from sae_fast.ops.sparse_code import CodeKey


@dataclass(frozen=True, eq=False)
class RowFactor:
    """A gradient: row j is Σ coefficient · (dense[n] − shift) over the entries of latent j.

    Attributes:
        values: [N, K] or [nnz], of the code; an entry whose value is 0 has coefficient 0.
        indices: int32, in the shape of values.
        offsets: None, or [N + 1] int64.
        coefficients: in the shape of values.
        dense: [N, D] float32, bfloat16 or float16.
        shift: [D], or None for 0.
        code_key: the same object for factors of the same code: they share its latent-major view.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    coefficients: Tensor
    dense: Tensor
    shift: Tensor | None
    code_key: CodeKey

    def latent_major(self, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
        """The latent-major view of the code: (latent_offsets, entries, rows)."""
        return self.code_key.latent_major(self.values, self.indices, self.offsets, d_sae)


class FactorSink:
    """Where the backward of one call leaves its factors: a parameter, and the keys of its codes."""

    def __init__(self, op: str, name: str, W: Tensor, *keys: CodeKey) -> None:
        if W.requires_grad and not W.is_leaf:
            raise RuntimeError(
                f"{op}: {name} must be a leaf tensor (a parameter) for dense_grad=False: "
                "factors are left on the tensor itself"
            )
        self.W = W
        self.keys = keys

    def append(self, factor: RowFactor) -> None:
        """Leave a factor on the parameter."""
        if not hasattr(self.W, "row_factors"):
            self.W.row_factors = []  # type: ignore[attr-defined]
        self.W.row_factors.append(factor)  # type: ignore[attr-defined]


def latent_sums(factor: RowFactor, d_sae: int) -> Tensor:
    """The sum of the coefficients of every latent, [d_sae], in the order of the entries."""
    latent_offsets, entries, _ = factor.latent_major(d_sae)
    return rows.latent_sums(latent_offsets, entries, factor.coefficients)
