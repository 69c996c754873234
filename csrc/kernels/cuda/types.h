// The types in the signatures of all CUDA launchers. Launchers take raw device pointers and a
// stream, return the launch's error, never allocate and never wait for the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/common/dtype.h"

namespace sae_fast::cuda {

// A device array whose element type is known at run time.
struct TypedPointer {
  const void* data;
  DType type;
};

// The entries of each row in a flat code: offsets[row] .. offsets[row + 1], or k each where offsets
// is null.
struct CodeRows {
  const int64_t* offsets;  // [N + 1] or null
  int64_t k;               // entries a row, where offsets is null
  int64_t rows;            // N
  int64_t entries;         // in all rows, below 2^31
};

}  // namespace sae_fast::cuda
