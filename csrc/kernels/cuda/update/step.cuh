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
  const UpdateScalars* scalars;
  bool project, unit_norm;
};

// Rows that the kernel has in shared memory: gradient, weights, and what the moments take.
template <UpdateRule kRule, DType kMoments>
constexpr int64_t kUpdateRows = 2 + RowMoments<kRule, kMoments>::kSharedRows;

// The pass of one rule for moments that are kept as kMoments. Each pair is compiled in a file of
// its own, step_<rule>_<moments>.cu: all together they would be most of a build's time.
template <UpdateRule kRule, DType kMoments>
cudaError_t update_rows(const RowUpdate& update, cudaStream_t stream);

}  // namespace sae_fast::cuda
