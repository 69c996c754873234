#include "kernels/cuda/rows.h"

#include <cub/device/device_radix_sort.cuh>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/common/row_norm.h"
#include "kernels/cuda/latent_sum.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kEntryThreads = 256;
constexpr int kLatentsPerBlock = kEntryThreads / kWarpSize;

// ---- kernels

// One block a row. The second read of the row comes from the cache.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    normalize_kernel(float* W, int64_t rows, int64_t d_in) {
  __shared__ float partial[kRowThreads / kWarpSize];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float* const w = W + row * d_in;
    float square = 0.0f;
    for (int64_t column = threadIdx.x * kWidth; column < d_in; column += blockDim.x * kWidth) {
      const auto weights = load<float, kWidth>(w + column);
      square = add_dot(square, weights, weights);
    }
    const float norm = row_norm(block_sum(square, partial));
    for (int64_t column = threadIdx.x * kWidth; column < d_in; column += blockDim.x * kWidth) {
      auto weights = load<float, kWidth>(w + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) weights.at[i] /= norm;
      store<float, kWidth>(w + column, weights);
    }
  }
}

// One thread an entry: its sort key is its latent, or d_sae where it does not count.
__global__ void __launch_bounds__(kEntryThreads)
    key_kernel(const float* __restrict__ values, const int32_t* __restrict__ indices,
               int64_t entries, int64_t d_sae, uint32_t* __restrict__ keys,
               int32_t* __restrict__ positions) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kEntryThreads;
  int64_t entry = static_cast<int64_t>(blockIdx.x) * kEntryThreads + threadIdx.x;
  for (; entry < entries; entry += stride) {
    keys[entry] = static_cast<uint32_t>(values[entry] != 0.0f ? indices[entry] : d_sae);
    positions[entry] = static_cast<int32_t>(entry);
  }
}

// Returns how many of the ascending numbers are below `bound`.
template <typename Number>
__device__ int64_t count_below(const Number* __restrict__ ascending, int64_t count, Number bound) {
  int64_t low = 0;
  int64_t high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ascending[middle] < bound) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One thread a latent. A search each rather than marking the borders between keys: a single
// thread would have to fill the gap that many silent latents leave.
__global__ void __launch_bounds__(kEntryThreads)
    offset_kernel(const uint32_t* __restrict__ sorted_keys, int64_t entries, int64_t d_sae,
                  int64_t* __restrict__ latent_offsets) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kEntryThreads;
  int64_t latent = static_cast<int64_t>(blockIdx.x) * kEntryThreads + threadIdx.x;
  for (; latent <= d_sae; latent += stride) {
    latent_offsets[latent] = count_below(sorted_keys, entries, static_cast<uint32_t>(latent));
  }
}

// One thread an entry.
__global__ void __launch_bounds__(kEntryThreads)
    row_kernel(const int32_t* __restrict__ entries, CodeRows code, int32_t* __restrict__ rows) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kEntryThreads;
  int64_t p = static_cast<int64_t>(blockIdx.x) * kEntryThreads + threadIdx.x;
  for (; p < code.entries; p += stride) {
    const int64_t entry = entries[p];
    const int64_t row = code.offsets == nullptr
                            ? entry / code.k
                            : count_below(code.offsets + 1, code.rows, entry + 1);
    rows[p] = static_cast<int32_t>(row);
  }
}

__global__ void __launch_bounds__(kEntryThreads)
    gather_kernel(const float* __restrict__ from, const int32_t* __restrict__ entries,
                  int64_t count, float* __restrict__ to) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kEntryThreads;
  int64_t p = static_cast<int64_t>(blockIdx.x) * kEntryThreads + threadIdx.x;
  for (; p < count; p += stride) to[p] = from[entries[p]];
}

// One warp a latent.
__global__ void __launch_bounds__(kEntryThreads)
    latent_sums_kernel(const int64_t* __restrict__ latent_offsets,
                       const int32_t* __restrict__ entries, const float* __restrict__ coefficients,
                       int64_t latents, float* __restrict__ sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kLatentsPerBlock;
  int64_t latent = static_cast<int64_t>(blockIdx.x) * kLatentsPerBlock + threadIdx.x / kWarpSize;
  for (; latent < latents; latent += stride) {
    const int64_t end = latent_offsets[latent + 1];
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t p = latent_offsets[latent] + lane; p < end; p += kWarpSize) {
      sum += coefficients[entries[p]];
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[latent] = sum;
  }
}

// One block a latent.
template <typename Dense, int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    accumulate_kernel(LatentLists lists, LatentPlan plan, const Dense* __restrict__ dense,
                      int64_t d_in, float* __restrict__ rows, float* __restrict__ sums) {
  for (int64_t latent = blockIdx.x; latent < lists.latents; latent += gridDim.x) {
    for (int64_t column = threadIdx.x * kWidth; column < d_in; column += blockDim.x * kWidth) {
      const auto sum = sum_latent<Dense, kWidth>(lists, plan, latent, dense, nullptr, column, d_in);
      store<float, kWidth>(rows + latent * d_in + column, sum);
    }
    if (threadIdx.x < kWarpSize) {
      const float sum = sum_coefficients(lists, latent);
      if (threadIdx.x == 0) sums[latent] = sum;
    }
  }
}

// ---- launchers

// The sort looks at no more bits than its largest key, d_sae, has.
int key_bits(int64_t d_sae) {
  int bits = 0;
  while (d_sae >> bits != 0) ++bits;
  return bits;
}

struct LatentMajorScratch {
  uint32_t* keys;
  uint32_t* sorted_keys;
  int32_t* positions;
  void* sort;
  size_t sort_bytes = 0;
  cudaError_t error;

  LatentMajorScratch(Scratch& scratch, int64_t entries, int64_t d_sae)
      : keys(scratch.take<uint32_t>(entries)),
        sorted_keys(scratch.take<uint32_t>(entries)),
        positions(scratch.take<int32_t>(entries)),
        error(cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, keys, sorted_keys, positions,
                                              positions, static_cast<int>(entries), 0,
                                              key_bits(d_sae))) {
    sort = scratch.take<char>(static_cast<int64_t>(sort_bytes));
  }
};

struct AccumulateScratch {
  int64_t* latent_offsets;
  int32_t* entries;
  int32_t* rows;
  float* coefficients;
  LatentPlan plan;
  char* latent_major;
  void* scan;
  size_t scan_bytes = 0;
  cudaError_t error;

  AccumulateScratch(Scratch& scratch, int64_t count, int64_t d_sae, int64_t d_in)
      : latent_offsets(scratch.take<int64_t>(d_sae + 1)),
        entries(scratch.take<int32_t>(count)),
        rows(scratch.take<int32_t>(count)),
        coefficients(scratch.take<float>(count)) {
    plan.counts = scratch.take<int64_t>(d_sae + 1);
    plan.partials = scratch.take<float>(max_chunks(count) * d_in);
    size_t bytes = 0;
    error = latent_major_scratch_bytes(count, d_sae, &bytes);
    latent_major = scratch.take<char>(static_cast<int64_t>(bytes));
    if (error == cudaSuccess) error = plan_scratch_bytes(d_sae, &scan_bytes);
    scan = scratch.take<char>(static_cast<int64_t>(scan_bytes));
  }
};

int64_t entry_blocks(int64_t entries) { return ceil_div<int64_t>(entries, kEntryThreads); }

}  // namespace

cudaError_t normalize_rows(float* W, int64_t rows, int64_t d_in, cudaStream_t stream) {
  return with_width<kRowWidth, float>(W, d_in, {}, [&](const float*, auto width) {
    constexpr int kWidth = decltype(width)::value;
    return launch(normalize_kernel<kWidth>, rows, row_threads(d_in, kWidth), 0, stream, W, rows,
                  d_in);
  });
}

cudaError_t latent_major_scratch_bytes(int64_t entries, int64_t d_sae, size_t* bytes) {
  Scratch scratch(nullptr);
  const LatentMajorScratch pieces(scratch, entries, d_sae);
  *bytes = scratch.bytes();
  return pieces.error;
}

cudaError_t latent_major(const float* values, const int32_t* indices, CodeRows code,
                         int64_t* latent_offsets, int32_t* entries, int32_t* rows, int64_t d_sae,
                         void* scratch, cudaStream_t stream) {
  Scratch remaining(scratch);
  LatentMajorScratch pieces(remaining, code.entries, d_sae);
  cudaError_t error = pieces.error;
  const auto then = [&error](auto&& start) {
    if (error == cudaSuccess) error = start();
  };
  then([&] {
    return launch(key_kernel, entry_blocks(code.entries), kEntryThreads, 0, stream, values, indices,
                  code.entries, d_sae, pieces.keys, pieces.positions);
  });
  then([&] {
    return cub::DeviceRadixSort::SortPairs(
        pieces.sort, pieces.sort_bytes, pieces.keys, pieces.sorted_keys, pieces.positions, entries,
        static_cast<int>(code.entries), 0, key_bits(d_sae), stream);
  });
  then([&] {
    return launch(offset_kernel, entry_blocks(d_sae + 1), kEntryThreads, 0, stream,
                  pieces.sorted_keys, code.entries, d_sae, latent_offsets);
  });
  then([&] {
    return launch(row_kernel, entry_blocks(code.entries), kEntryThreads, 0, stream, entries, code,
                  rows);
  });
  return error;
}

cudaError_t gather_entries(const float* from, const int32_t* entries, int64_t count, float* to,
                           cudaStream_t stream) {
  return launch(gather_kernel, entry_blocks(count), kEntryThreads, 0, stream, from, entries, count,
                to);
}

cudaError_t latent_sums(const int64_t* latent_offsets, const int32_t* entries,
                        const float* coefficients, int64_t latents, float* sums,
                        cudaStream_t stream) {
  return launch(latent_sums_kernel, ceil_div<int64_t>(latents, kLatentsPerBlock), kEntryThreads, 0,
                stream, latent_offsets, entries, coefficients, latents, sums);
}

cudaError_t accumulate_rows_scratch_bytes(int64_t entries, int64_t d_sae, int64_t d_in,
                                          size_t* bytes) {
  Scratch scratch(nullptr);
  const AccumulateScratch pieces(scratch, entries, d_sae, d_in);
  *bytes = scratch.bytes();
  return pieces.error;
}

cudaError_t accumulate_rows(const float* coefficients, const int32_t* indices, CodeRows code,
                            TypedPointer dense, float* rows, float* sums, int64_t d_sae,
                            int64_t d_in, void* scratch, cudaStream_t stream) {
  Scratch remaining(scratch);
  const AccumulateScratch pieces(remaining, code.entries, d_sae, d_in);
  cudaError_t error = pieces.error;
  const auto then = [&error](auto&& start) {
    if (error == cudaSuccess) error = start();
  };
  then([&] {
    return latent_major(coefficients, indices, code, pieces.latent_offsets, pieces.entries,
                        pieces.rows, d_sae, pieces.latent_major, stream);
  });
  then([&] {
    return gather_entries(coefficients, pieces.entries, code.entries, pieces.coefficients, stream);
  });
  then([&] {
    return plan_latents(pieces.latent_offsets, d_sae, kChunkEntries, pieces.plan, pieces.scan,
                        pieces.scan_bytes, stream);
  });
  const LatentLists lists{pieces.latent_offsets, pieces.rows, pieces.coefficients, d_sae,
                          code.entries};
  then([&] { return sum_chunks(lists, pieces.plan, dense, nullptr, d_in, stream); });
  then([&] {
    return with_rows<kRowWidth>(
        dense, d_in, {rows, pieces.plan.partials}, [&](const auto* typed, auto width) {
          using Dense = std::decay_t<decltype(*typed)>;
          constexpr int kWidth = decltype(width)::value;
          return launch(accumulate_kernel<Dense, kWidth>, d_sae, row_threads(d_in, kWidth), 0,
                        stream, lists, pieces.plan, typed, d_in, rows, sums);
        });
  });
  return error;
}

}  // namespace sae_fast::cuda
