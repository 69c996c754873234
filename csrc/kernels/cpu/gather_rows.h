// Rows of a table, gathered, widened to float and standardised: how a stream makes its batches.
#pragma once

#include <cstdint>

#include "kernels/cpu/encode.h"
#include "kernels/cpu/parallel.h"

namespace sae_fast::cpu {

// Row i of the result is (source[rows[i]] - mean) * scale.
struct RowGather {
  DType type;
  const void* source;     // [.][d_in]
  const int64_t* rows;    // [count]
  const int64_t* places;  // [count]: the row of out that row i goes to; null: i
  const float* mean;      // [d_in], or null: zeros
  float scale;
  float* out;  // [.][d_in]
  int64_t count, d_in;
};
using GatherRows = void (*)(const RowGather&, const Parallel&);

}  // namespace sae_fast::cpu
