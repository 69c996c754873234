#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "tests/cuda_emulation/cuda_runtime_api.h"

namespace cub {

// The standard library's stable sort, by the same bits of the keys.
struct DeviceRadixSort {
  template <typename Key, typename Value>
  static cudaError_t SortPairs(void* scratch, size_t& scratch_bytes, const Key* keys,
                               Key* sorted_keys, const Value* values, Value* sorted_values,
                               int count, int begin_bit, int end_bit,
                               cudaStream_t /*stream*/ = nullptr) {
    if (scratch == nullptr) {
      scratch_bytes = 1;
      return cudaSuccess;
    }
    ++emulated_cuda::nodes.sorts;
    const auto digits = [&](int i) {
      return (static_cast<uint64_t>(keys[i]) & ((uint64_t{1} << end_bit) - 1)) >> begin_bit;
    };
    std::vector<int> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return digits(a) < digits(b); });
    for (int i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[static_cast<size_t>(i)]];
      sorted_values[i] = values[order[static_cast<size_t>(i)]];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
