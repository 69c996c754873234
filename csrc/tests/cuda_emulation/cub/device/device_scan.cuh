#pragma once

#include <numeric>

#include "tests/cuda_emulation/cuda_runtime_api.h"

namespace cub {

struct DeviceScan {
  template <typename Number>
  static cudaError_t ExclusiveSum(void* scratch, size_t& scratch_bytes, const Number* from,
                                  Number* to, int64_t count, cudaStream_t /*stream*/ = nullptr) {
    if (scratch == nullptr) {
      scratch_bytes = 1;
      return cudaSuccess;
    }
    ++emulated_cuda::nodes.scans;
    Number sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Number number = from[i];  // `to` may be `from`
      to[i] = sum;
      sum += number;
    }
    return cudaSuccess;
  }
};

}  // namespace cub
