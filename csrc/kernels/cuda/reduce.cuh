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

// The sum of the lanes before this one.
template <typename Number>
__device__ inline Number warp_sum_before(Number value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  Number sum = value;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const Number below = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += below;
  }
  return sum - value;
}

// Calls put(i, sum of get(j) over j < i) for every i in [0, count), by one block; returns the sum
// of all to every thread. `partial` as for block_sum. get(i) may read what put(i) writes.
template <int kItems, typename Number, typename Get, typename Put>
__device__ inline Number block_scan(int64_t count, Number* partial, Get&& get, Put&& put) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t tile = static_cast<int64_t>(blockDim.x) * kItems;
  Number before = 0;
  for (int64_t start = 0; start < count; start += tile) {
    const int64_t first = start + static_cast<int64_t>(threadIdx.x) * kItems;
    Number own[kItems];
    Number sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) own[i] = first + i < count ? get(first + i) : Number{0};
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += own[i];
    const Number in_warp = warp_sum_before(sum);
    __syncthreads();  // the last tile's partials have been read
    if (threadIdx.x % kWarpSize == kWarpSize - 1) partial[warp] = in_warp + sum;
    __syncthreads();
    Number at = before + in_warp;
    for (int i = 0; i < warps; ++i) {
      if (i < warp) at += partial[i];
      before += partial[i];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (first + i < count) put(first + i, at);
      at += own[i];
    }
  }
  return before;
}

// Tells all threads of a block whether it is the last one of the launch to call this. The last one
// may read what the others have written before, by load_written. `ticket` was 0 before the launch.
__device__ inline bool is_last_block(unsigned* ticket) {
  __shared__ unsigned place;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) place = atomicAdd(ticket, 1u);
  __syncthreads();
  if (place != gridDim.x - 1) return false;
  __threadfence();
  return true;
}

// Reads what other blocks of the launch have written, which this multiprocessor's cache may lack.
template <typename Number>
__device__ inline Number load_written(const Number* from) {
  return __ldcg(from);
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
