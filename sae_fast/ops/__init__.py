"""The kernels' Python face: encoders, decoders, penalties and the optimizer's step.

N tokens, D = d_in, F = d_sae, K = k; both weight matrices are [F, D], one row a latent. Where the
compiled module is not in use, every op is the one in `reference`: the results agree within
rounding, many times slower.
"""

from sae_fast.ops.bookkeeping import add_squares_, batch_statistics, finish_step_
from sae_fast.ops.code import NORMALIZED, RAW, Code, DenseCode, SparseCode, Units
from sae_fast.ops.decode import (
    PrefixReconstruction,
    Reconstruction,
    decode,
    reconstruct,
    reconstruct_prefixes,
)
from sae_fast.ops.dense_product import dense_product
from sae_fast.ops.encode import (
    encode_abs_topk,
    encode_batch_topk,
    encode_dense,
    encode_groupmax,
    encode_last,
    encode_threshold,
    encode_topk,
    full_batches,
)
from sae_fast.ops.gather_rows import gather_rows_
from sae_fast.ops.penalties import CodeCorrelation, code_correlation, decorrelation
from sae_fast.ops.row_factors import RowFactor, accumulate_rows, gather_entries, latent_major
from sae_fast.ops.update import (
    fused_update_,
    normalize_rows_,
    row_gradient_norm,
    update_scalars,
    update_vector_,
)
from sae_fast.ops.working_copies import drop_copies, kept_copies

__all__ = [
    "NORMALIZED",
    "RAW",
    "Code",
    "CodeCorrelation",
    "DenseCode",
    "PrefixReconstruction",
    "Reconstruction",
    "RowFactor",
    "SparseCode",
    "Units",
    "accumulate_rows",
    "add_squares_",
    "batch_statistics",
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
    "finish_step_",
    "full_batches",
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
