// The k best of many numbers: keys in the order of kernels/common/order.h, radix selection by a
// warp or a block, and the sort of what was selected. Which thread met a candidate first never
// shows in a result: the order is total.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/common/order.h"
#include "kernels/cuda/launch.cuh"

namespace sae_fast::cuda {

constexpr int kDigits = 256;  // of 8 bits

// ---- keys, the best first: value descending with NaN before everything, then index ascending

__device__ inline uint32_t value_key(float value) {
  return ~(static_cast<uint32_t>(ordered_key(value)) ^ 0x80000000u);
}

__device__ inline float value_of_key(uint32_t key) {
  const auto ordered = static_cast<int32_t>(~key ^ 0x80000000u);
  const uint32_t bits =
      ordered < 0 ? 0x80000000u | static_cast<uint32_t>(-ordered) : static_cast<uint32_t>(ordered);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__device__ inline uint64_t entry_key(float value, int32_t index) {
  return static_cast<uint64_t>(value_key(value)) << 32 | static_cast<uint32_t>(index);
}

constexpr uint64_t kNoEntry = ~uint64_t{0};

// ---- inside a warp

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }

__device__ inline unsigned lanes_before() { return (1u << lane_index()) - 1u; }

// The sum of the lanes before this one.
__device__ inline int warp_exclusive_sum(int value) {
  int sum = value;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int below = __shfl_up_sync(kFullWarp, sum, step);
    if (lane_index() >= step) sum += below;
  }
  return sum - value;
}

struct Digit {
  int digit;
  int wanted;  // how many of that digit's numbers are still wanted
  int count;   // of how many
};

// The digit of the wanted-th number (from 1) of a histogram that has so many. All lanes of a warp
// call and get the result.
__device__ inline Digit find_digit(const int* histogram, int wanted) {
  constexpr int kOwned = kDigits / kWarpSize;
  const int first = lane_index() * kOwned;
  int own = 0;
  for (int i = 0; i < kOwned; ++i) own += histogram[first + i];
  const int before = warp_exclusive_sum(own);
  const bool mine = before < wanted && wanted <= before + own;
  int digit = first;
  int rest = wanted - before;
  if (mine) {
    while (rest > histogram[digit]) rest -= histogram[digit++];
  }
  const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, mine))) - 1;
  digit = __shfl_sync(kFullWarp, digit, owner);
  return {digit, __shfl_sync(kFullWarp, rest, owner), histogram[digit]};
}

// The key of the k-th best of the values value_of(i) for i in [0, count), 1 <= k <= count, by one
// warp with a histogram [kDigits] of its own.
template <typename ValueOf>
__device__ uint32_t kth_value_key(int count, int k, int* histogram, ValueOf&& value_of) {
  uint32_t prefix = 0;
  uint32_t fixed_bits = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = lane_index(); i < kDigits; i += kWarpSize) histogram[i] = 0;
    __syncwarp();
    for (int i = lane_index(); i < count; i += kWarpSize) {
      const uint32_t key = value_key(value_of(i));
      if ((key & fixed_bits) == prefix) atomicAdd(&histogram[key >> shift & 255u], 1);
    }
    __syncwarp();
    const Digit found = find_digit(histogram, k);
    k = found.wanted;
    prefix |= static_cast<uint32_t>(found.digit) << shift;
    fixed_bits |= 255u << shift;
    __syncwarp();  // the histogram has been read
  }
  return prefix;
}

// ---- inside a block

struct BlockSelect {
  int histogram[kDigits];
  Digit digit;
  int total;
};

// The key of the k-th best of the entries that key_of(i) gives for i in [0, count), or of the last
// where there are fewer: how many are selected is left in shared.total. kNoEntry is none, and a
// place that gives it has no entry. All threads of the block call, k >= 1.
template <typename KeyOf>
__device__ uint64_t kth_entry_key(int64_t count, int k, BlockSelect& shared, KeyOf&& key_of) {
  const auto thread = static_cast<int>(threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  uint64_t prefix = 0;
  uint64_t fixed_bits = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = thread; i < kDigits; i += threads) shared.histogram[i] = 0;
    if (shift == 56 && thread == 0) shared.total = 0;
    __syncthreads();
    int own = 0;
    for (int64_t i = thread; i < count; i += threads) {
      const uint64_t key = key_of(i);
      if (key == kNoEntry || (key & fixed_bits) != prefix) continue;
      atomicAdd(&shared.histogram[key >> shift & 255u], 1);
      ++own;
    }
    if (shift == 56 && own > 0) atomicAdd(&shared.total, own);
    __syncthreads();
    if (shift == 56) {
      k = min(k, shared.total);
      __syncthreads();  // all threads have read the total
      if (thread == 0) shared.total = k;
      if (k == 0) break;
    }
    if (thread < kWarpSize) {
      const Digit found = find_digit(shared.histogram, k);
      if (thread == 0) shared.digit = found;
    }
    __syncthreads();
    const Digit found = shared.digit;
    k = found.wanted;
    prefix |= static_cast<uint64_t>(found.digit) << shift;
    fixed_bits |= uint64_t{255} << shift;
    if (found.wanted == found.count) break;  // all of them: whatever the lower digits are
    __syncthreads();
  }
  __syncthreads();
  return prefix | ~fixed_bits;
}

// Sorts keys [padded], a power of two, ascending; in shared memory or in global memory that no
// other block touches. What is beyond `count` is filled first.
__device__ inline void sort_keys(uint64_t* keys, int count, int padded) {
  const auto thread = static_cast<int>(threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  for (int i = count + thread; i < padded; i += threads) keys[i] = kNoEntry;
  __syncthreads();
  for (int size = 2; size <= padded; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int pair = thread; pair < padded / 2; pair += threads) {
        const int low = 2 * pair - (pair & (stride - 1));
        const uint64_t a = keys[low];
        const uint64_t b = keys[low + stride];
        const bool ascending = (low & size) == 0;
        if ((a > b) == ascending) {
          keys[low] = b;
          keys[low + stride] = a;
        }
      }
      __syncthreads();
    }
  }
}

// The first k of `count` sorted keys as a row of a code, after ReLU: NaN stays and -0 is 0. Where
// there are fewer the rest is (0, 0).
__device__ inline void write_entries(const uint64_t* keys, int count, int64_t k,
                                     float* __restrict__ values, int32_t* __restrict__ indices) {
  for (int64_t i = threadIdx.x; i < k; i += blockDim.x) {
    const bool found = i < count;
    const float value = found ? value_of_key(static_cast<uint32_t>(keys[i] >> 32)) : 0.0f;
    values[i] = value > 0.0f || value != value ? value : 0.0f;
    indices[i] = found ? static_cast<int32_t>(keys[i] & 0xffffffffu) : 0;
  }
}

}  // namespace sae_fast::cuda
