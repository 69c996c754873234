"""Every op in plain PyTorch: its definition, its oracle, and what runs without the compiled module.

Any float dtype is accepted, float64 included, and sums are taken in at least float32. Work is cut
into chunks, so that neither an [N, F] nor an [N, K, D] array is ever whole in memory.
"""

from sae_fast.ops.reference.bookkeeping import (
    add_squares_,
    batch_statistics,
    code_gradients,
    finish_step_,
    weighted_row_sum,
)
from sae_fast.ops.reference.decode import decode, decode_backward, reconstruct
from sae_fast.ops.reference.dense_product import dense_product
from sae_fast.ops.reference.encode import (
    ROUNDED_DTYPES,
    encode_batch_topk,
    encode_threshold,
    encode_topk,
    full_batches,
    pack_encoder,
)
from sae_fast.ops.reference.gather_rows import gather_rows_
from sae_fast.ops.reference.moments import EXP_AVG, EXP_AVG_SQ, decode_moment, encode_moment_
from sae_fast.ops.reference.penalties import (
    code_correlation,
    code_correlation_backward,
    decorrelation,
)
from sae_fast.ops.reference.row_factors import (
    accumulate_rows,
    gather_entries,
    latent_major,
    latent_sums,
)
from sae_fast.ops.reference.update import (
    fused_update_,
    normalize_rows_,
    row_gradient_norm,
    update_scalars,
    update_vector_,
)

__all__ = [
    "EXP_AVG",
    "EXP_AVG_SQ",
    "ROUNDED_DTYPES",
    "accumulate_rows",
    "add_squares_",
    "batch_statistics",
    "code_correlation",
    "code_correlation_backward",
    "code_gradients",
    "decode",
    "decode_backward",
    "decode_moment",
    "decorrelation",
    "dense_product",
    "encode_batch_topk",
    "encode_moment_",
    "encode_threshold",
    "encode_topk",
    "finish_step_",
    "full_batches",
    "fused_update_",
    "gather_entries",
    "gather_rows_",
    "latent_major",
    "latent_sums",
    "normalize_rows_",
    "pack_encoder",
    "reconstruct",
    "row_gradient_norm",
    "update_scalars",
    "update_vector_",
    "weighted_row_sum",
]
