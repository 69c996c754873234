"""The kernels' Python face: encode, decode, and the operations on rows of a weight matrix.

N tokens, D = d_in, F = d_sae, K = k; both weight matrices are [F, D], one row a latent. Where the
compiled module is not in use, every op is `reference.py`: the same results, many times slower.
"""

from sae_fast.ops.correlation import CodeCorrelation, code_correlation
from sae_fast.ops.decode import Reconstruction, decode
from sae_fast.ops.decorrelation import decorrelation
from sae_fast.ops.dense_code import Code, DenseCode, encode_dense, reconstruct
from sae_fast.ops.dense_product import dense_product
from sae_fast.ops.encode import encode_batch_topk, encode_threshold, encode_topk
from sae_fast.ops.factors import RowFactor
from sae_fast.ops.gather_rows import gather_rows_
from sae_fast.ops.prefixes import PrefixReconstruction, reconstruct_prefixes
from sae_fast.ops.rows import (
    accumulate_rows,
    fused_update_,
    gather_entries,
    latent_major,
    normalize_rows_,
    row_gradient_norm,
    update_scalars,
    update_vector_,
)
from sae_fast.ops.selections import encode_abs_topk, encode_groupmax, encode_last
from sae_fast.ops.sparse_code import SparseCode
from sae_fast.ops.working_copies import drop_copies, kept_copies

__all__ = [
    "Code",
    "CodeCorrelation",
    "DenseCode",
    "PrefixReconstruction",
    "Reconstruction",
    "RowFactor",
    "SparseCode",
    "accumulate_rows",
    "code_correlation",
    "decode",
    "decorrelation",
    "dense_product",
    "drop_copies",
    "encode_abs_topk",
    "encode_batch_topk",
    "encode_dense",
    "encode_groupmax",
    "encode_last",
    "encode_threshold",
    "encode_topk",
    "fused_update_",
    "gather_entries",
    "gather_rows_",
    "kept_copies",
    "latent_major",
    "normalize_rows_",
    "reconstruct",
    "reconstruct_prefixes",
    "row_gradient_norm",
    "update_scalars",
    "update_vector_",
]
