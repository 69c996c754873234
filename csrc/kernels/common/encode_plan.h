// The division of the CUDA encoder's work: tokens into blocks, latents into chunks whose product
// is in memory at a time; and the number of candidates of a row that it keeps. Plain arithmetic,
// tested on the host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/common/host_device.h"

namespace sae_fast {

// Latents that a warp visits in one step and that share one coarse error bound; a strip of them is
// read by one load of four numbers a lane.
constexpr int kSegment = 256;
constexpr int kStrip = 128;

// Columns of a chunk are a multiple of this where there are that many latents.
constexpr int64_t kColumnUnit = 1024;

// Every position in an array of rows is formed here: N * d_sae and d_sae * d_in pass 2^31.
SAE_FAST_HOST_DEVICE constexpr int64_t flat_index(int64_t row, int64_t width, int64_t column) {
  return row * width + column;
}

SAE_FAST_HOST_DEVICE constexpr int64_t segment_count(int64_t d_sae) {
  return (d_sae + kSegment - 1) / kSegment;
}

// Room for a row's candidates where k are wanted. The rounding error of bfloat16 lets through 1.2
// to 3.3 times k (less the larger k is); the rest keeps compactions rare. A strip must always fit.
SAE_FAST_HOST_DEVICE constexpr int64_t candidate_capacity(int64_t k) {
  return 2 * k + 512 + kStrip;
}

SAE_FAST_HOST_DEVICE constexpr int64_t next_power_of_two(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

struct EncodePlan {
  int64_t rows;     // tokens of a block, at most
  int64_t columns;  // latents of a chunk, at most

  int64_t product_elements() const { return rows * columns; }
};

// `row_bytes`: what a token of the block needs beside its product.
inline EncodePlan plan_encode(int64_t tokens, int64_t d_sae, int64_t row_bytes) {
  // 192 MiB, so that a step of 4096 tokens and 24576 latents has two chunks. In chunks of 32 MiB,
  // which an H200's L2 holds, the launches would take longer than memory does to give the product
  // back (benchmarks/results/gpu_model.md); and fewer chunks read the tokens less often.
  constexpr int64_t kProductElements = int64_t{48} << 20;
  constexpr int64_t kMostRows = 8192;
  constexpr int64_t kFewestRows = 256;
  constexpr int64_t kListBytes = int64_t{192} << 20;
  const int64_t affordable = kListBytes / std::max<int64_t>(row_bytes, 1);
  const int64_t most_rows = std::clamp(affordable, kFewestRows, kMostRows);
  const int64_t blocks = std::max<int64_t>((tokens + most_rows - 1) / most_rows, 1);
  EncodePlan plan{};
  plan.rows = std::max<int64_t>((tokens + blocks - 1) / blocks, 1);
  // Whole units, so that only the rest of an odd d_sae cannot be read four columns at a time.
  const int64_t units = std::min(kProductElements / plan.rows, d_sae) / kColumnUnit;
  plan.columns = units > 0 ? units * kColumnUnit : std::clamp<int64_t>(d_sae, 1, kColumnUnit);
  return plan;
}

}  // namespace sae_fast
