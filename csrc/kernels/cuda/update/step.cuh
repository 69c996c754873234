// The second pass: every row of the gradient, and the step of the row's weights and moments.
#pragma once

#include "kernels/cuda/moments.cuh"
#include "kernels/cuda/update.h"

namespace sae_fast::cuda {

// The arguments of fused_update.
struct RowUpdate {
  GradientFactors factors;
  RowState state;
  const float* cached;         // [rows, D]
  const int32_t* cache_slots;  // [F]
  UpdateRule rule;
  const UpdateScalars* scalars;
  bool project, unit_norm;
};

// Rows that the kernel has in shared memory: gradient, weights, and what the moments take.
template <UpdateRule kRule, DType kMoments>
constexpr int64_t kUpdateRows = 2 + RowMoments<kRule, kMoments>::kSharedRows;

// The pass for moments that are kept as kMoments; each type is compiled in a file of its own,
// step_float32.cu, step_bfloat16.cu and step_uint8.cu, because it takes the compiler long.
template <DType kMoments>
cudaError_t update_rows(const RowUpdate& update, cudaStream_t stream);

}  // namespace sae_fast::cuda
