// Orders lists whose items atomics have put into place, so that a result does not depend on which
// thread came first. The items of a list have different positions, which say how they are ordered.
#pragma once

#include <cstdint>

#include "kernels/cuda/reduce.cuh"

namespace sae_fast::cuda {

constexpr int kOrderThreads = 256;
constexpr int kOrderWarps = kOrderThreads / kWarpSize;
constexpr int kOrderItems = 4;         // of a scan, a thread
constexpr int64_t kWarpEntries = 128;  // of a list that one warp orders
constexpr int kMaskWords = 2048;
constexpr int64_t kMaskPositions = int64_t{32} * kMaskWords;

struct OrderShared {
  uint32_t mask[kMaskWords];
  int before[kMaskWords];  // the bits in the words before
  int partial[kOrderWarps];
};

// Calls write(i, number of smaller positions) for the items i of a short list, by one warp.
template <typename Position, typename Write>
__device__ inline void order_short(int count, Position&& position, Write&& write) {
  for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < count; i += kWarpSize) {
    const auto own = position(i);
    int before = 0;
#pragma unroll 4
    for (int other = 0; other < count; ++other) before += position(other) < own ? 1 : 0;
    write(i, before);
  }
}

// Calls write(i, number of smaller positions) for the items i of a long list, by one block: they
// are bits in a mask, of some positions after the other.
template <typename Position, typename Write>
__device__ inline void order_long(int64_t count, OrderShared& shared, Position&& position,
                                  Write&& write) {
  int64_t written = 0;
  for (int64_t start = 0; written < count; start += kMaskPositions) {
    for (int word = static_cast<int>(threadIdx.x); word < kMaskWords; word += kOrderThreads) {
      shared.mask[word] = 0;
    }
    __syncthreads();
    const auto for_each_bit = [&](auto&& call) {
#pragma unroll 4
      for (int64_t i = threadIdx.x; i < count; i += kOrderThreads) {
        const int64_t bit = position(i) - start;
        if (bit >= 0 && bit < kMaskPositions) call(i, bit / 32, 1u << bit % 32);
      }
    };
    for_each_bit([&](int64_t, int64_t word, uint32_t bit) { atomicOr(&shared.mask[word], bit); });
    __syncthreads();
    const int listed = block_scan<kOrderItems>(
        kMaskWords, shared.partial, [&](int64_t word) { return __popc(shared.mask[word]); },
        [&](int64_t word, int before) { shared.before[word] = before; });
    __syncthreads();
    for_each_bit([&](int64_t i, int64_t word, uint32_t bit) {
      write(i, written + shared.before[word] + __popc(shared.mask[word] & (bit - 1)));
    });
    written += listed;
    __syncthreads();  // the mask has been read
  }
}

// Orders `lists` lists by a grid of blocks of kOrderThreads: one warp a list, then the block takes
// the long ones, one after the other. begin(list) and end(list) are its items' numbers,
// position(i) orders them and write(i, to) gets each item with its new number.
template <typename Begin, typename End, typename Position, typename Write>
__device__ inline void order_lists(int64_t lists, OrderShared& shared, Begin&& begin, End&& end,
                                   Position&& position, Write&& write) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kOrderWarps;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kOrderWarps;
  for (; first < lists; first += stride) {
    const int here = static_cast<int>(min(lists - first, int64_t{kOrderWarps}));
    if (warp < here) {
      const int64_t from = begin(first + warp);
      const int64_t count = end(first + warp) - from;
      if (count <= kWarpEntries) {
        order_short(
            static_cast<int>(count), [&](int i) { return position(from + i); },
            [&](int i, int before) { write(from + i, from + before); });
      }
    }
    for (int i = 0; i < here; ++i) {
      const int64_t from = begin(first + i);
      const int64_t count = end(first + i) - from;
      if (count <= kWarpEntries) continue;
      order_long(
          count, shared, [&](int64_t item) { return position(from + item); },
          [&](int64_t item, int64_t before) { write(from + item, from + before); });
    }
  }
}

}  // namespace sae_fast::cuda
