// Shared by the optimizer's two passes over the rows of a weight matrix.
#pragma once

#include "kernels/cuda/latent_sum.cuh"

namespace sae_fast::cuda {

constexpr int kRowWarps = kRowThreads / kWarpSize;

// vector += row[column ...], where there is such a row.
template <int kWidth>
__device__ inline void add_row(Vector<float, kWidth>& vector, const float* rows, int64_t offset) {
  if (rows != nullptr) add_scaled(vector, 1.0f, load<float, kWidth>(rows + offset));
}

inline size_t row_bytes(int64_t rows, int64_t d_in) {
  return static_cast<size_t>(rows * d_in) * sizeof(float);
}

}  // namespace sae_fast::cuda
