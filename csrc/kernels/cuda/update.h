// The optimiser's two passes over the rows of a weight matrix. The gradient of a row exists in
// shared memory only, never as a [F, D] array.
#pragma once

#include "kernels/common/chunks.h"
#include "kernels/common/moments.h"
#include "kernels/common/update_rule.h"
#include "kernels/cuda/latent_sum.h"
#include "kernels/cuda/types.h"

namespace sae_fast::cuda {

// Gradient row j: the sum over latent j's list of coefficient * (dense[row] - shift), plus
// extra_grad[j].
struct GradientFactors {
  LatentLists lists;
  TypedPointer dense;       // [N, D]
  const float* shift;       // [D] or null
  const float* extra_grad;  // [F, D] or null
  int64_t d_in;
};

// The most columns that shared memory has room for, where the moments of the rule are of this type.
cudaError_t row_update_max_d_in(UpdateRule rule, DType moments, int64_t* d_in);

// squared_norm = sum over j of |g_j|^2, g_j less its part along project_onto[j] where that is given
// (unit rows); sums[j] of the coefficients; the rows that `cache` keeps and where (-1: nowhere).
cudaError_t row_gradient_norm_scratch_bytes(int64_t entries, int64_t latents, int64_t d_in,
                                            size_t* bytes);
cudaError_t row_gradient_norm(const GradientFactors& factors, RowCache cache,
                              const float* project_onto,  // [F, D] or null
                              double* squared_norm,       // []
                              float* sums,                // [F]
                              float* cached,              // [cache.rows, D]
                              int32_t* cache_slots,       // [F]
                              void* scratch, cudaStream_t stream);

// The arrays that the second pass writes.
struct RowState {
  float* W;         // [F, D]
  Moments moments;  // of W; its step is on the device
  void* rounded;    // [F, D] or null: W in a 16-bit type
  DType rounded_type;
  float* stats;  // [2, F] or null: row_bounds of the rows and of what rounding took off them
};

// Per row: g_j, less its part along W[j] if `project`, times the scale; the rule's step; unit
// length if `unit_norm`; the rounded copy and its stats. Nothing where the scale is not finite.
cudaError_t fused_update(const GradientFactors& factors, const RowState& state,
                         const float* cached,         // [rows, D]
                         const int32_t* cache_slots,  // [F]
                         UpdateRule rule, const UpdateScalars* scalars, bool project,
                         bool unit_norm, cudaStream_t stream);

}  // namespace sae_fast::cuda
