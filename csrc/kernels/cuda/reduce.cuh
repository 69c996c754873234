// Sums across a warp and across a block, and largest numbers. Every order of addition is fixed, so
// results are the same bits in every run; every participating thread gets the result.
#pragma once

#include "kernels/cuda/launch.cuh"

namespace sae_fast::cuda {

template <typename Number>
__device__ inline Number warp_sum(Number value) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, step);
  }
  return value;
}

__device__ inline uint32_t warp_max(uint32_t value) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  return value;
}

// `partial` has room for one number a warp and must not be in use. All threads of the block call.
template <typename Number>
__device__ inline Number block_sum(Number value, Number* partial) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  value = warp_sum(value);
  __syncthreads();  // the caller may still be reading the last sum's partials
  if (threadIdx.x % kWarpSize == 0) partial[warp] = value;
  __syncthreads();
  Number sum = 0;
  for (int i = 0; i < warps; ++i) sum += partial[i];
  return sum;
}

// Sums kCount numbers across a warp with 2 log2 + kCount shuffles instead of 5 kCount: each step
// hands half of the numbers to the other half of the lanes. Lane l returns the sum of number
// owned_sum(l); kCount is a power of two up to 32.
template <int kCount>
__device__ inline float warp_sums(float (&values)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int step = kWarpSize / 2;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? values[i] : values[i + half];
      const float kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kFullWarp, sent, step);
    }
    step /= 2;
  }
  float sum = values[0];
  for (; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}

// Returns which of kCount sums warp_sums leaves in this lane: its leading bits, one a halving.
template <int kCount>
__device__ inline int owned_sum() {
  return (static_cast<int>(threadIdx.x) % kWarpSize) / (kWarpSize / kCount);
}

// One of the lanes that own a sum stores it.
template <int kCount>
__device__ inline bool stores_sum() {
  return (static_cast<int>(threadIdx.x) % kWarpSize) % (kWarpSize / kCount) == 0;
}

}  // namespace sae_fast::cuda
