// The device side of latent_sum.h.
#pragma once

#include "kernels/cuda/latent_sum.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {

constexpr int kRowThreads = 256;

// Rows of float32 parameters: 16 bytes of them a thread, whatever the dense side's type.
constexpr int kRowWidth = 4;

// Threads of a block that owns one row: few enough that hardly any is idle.
inline int row_threads(int64_t d_in, int width) {
  const int64_t warps = ceil_div<int64_t>(d_in, static_cast<int64_t>(width) * kWarpSize);
  return static_cast<int>(std::clamp<int64_t>(warps, 1, kRowThreads / kWarpSize)) * kWarpSize;
}

__host__ __device__ inline int64_t chunks_of(int64_t count) { return count >> 32; }
__host__ __device__ inline int64_t cached_of(int64_t count) { return count & 0xffffffff; }

// Sum of coefficient * (dense[row] - shift) over positions [begin, end) of the lists, in order.
// The columns are the kWidth that dense_column and shift start at.
template <typename Dense, int kWidth>
__device__ inline Vector<float, kWidth> sum_list(const LatentLists& lists, int64_t begin,
                                                 int64_t end,
                                                 const Dense* __restrict__ dense_column,
                                                 const Vector<float, kWidth>& shift, int64_t d_in) {
  Vector<float, kWidth> sum{};
  const int32_t* const rows = lists.rows + begin;
  const float* const coefficients = lists.coefficients + begin;
  const int count = static_cast<int>(end - begin);  // entries are below 2^31
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    auto dense = load_floats<Dense, kWidth>(dense_column + rows[i] * d_in);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) dense.at[c] -= shift.at[c];
    add_scaled(sum, coefficients[i], dense);
  }
  return sum;
}

// The kWidth columns from `column` of latent's sum, its chunks having been summed before.
template <typename Dense, int kWidth>
__device__ inline Vector<float, kWidth> sum_latent(const LatentLists& lists, const LatentPlan& plan,
                                                   int64_t latent, const Dense* __restrict__ dense,
                                                   const float* __restrict__ shift, int64_t column,
                                                   int64_t d_in) {
  const int64_t first_chunk = chunks_of(plan.counts[latent]);
  const int64_t end_chunk = chunks_of(plan.counts[latent + 1]);
  Vector<float, kWidth> sum{};
  if (first_chunk == end_chunk) {
    if (shift != nullptr) sum = load<float, kWidth>(shift + column);
    return sum_list<Dense, kWidth>(lists, lists.offsets[latent], lists.offsets[latent + 1],
                                   dense + column, sum, d_in);
  }
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    add_scaled(sum, 1.0f, load<float, kWidth>(plan.partials + chunk * d_in + column));
  }
  return sum;
}

// Sum of a latent's coefficients; called by one whole warp.
__device__ inline float sum_coefficients(const LatentLists& lists, int64_t latent) {
  float sum = 0.0f;
  const int64_t end = lists.offsets[latent + 1];
  for (int64_t p = lists.offsets[latent] + threadIdx.x % kWarpSize; p < end; p += kWarpSize) {
    sum += lists.coefficients[p];
  }
  return warp_sum(sum);
}

}  // namespace sae_fast::cuda
