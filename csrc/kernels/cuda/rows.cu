#include "kernels/cuda/rows.h"

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

struct AccumulateScratch {
  int64_t* latent_offsets;
  int32_t* entries;
  int32_t* rows;
  float* coefficients;
  LatentPlan plan;
  char* latent_major;
  cudaError_t error;

  AccumulateScratch(Scratch& scratch, int64_t count, int64_t d_sae, int64_t d_in)
      : latent_offsets(scratch.take<int64_t>(d_sae + 1)),
        entries(scratch.take<int32_t>(count)),
        rows(scratch.take<int32_t>(count)),
        coefficients(scratch.take<float>(count)) {
    plan = LatentPlan(scratch, count, d_sae, d_in);
    size_t bytes = 0;
    error = latent_major_scratch_bytes(count, d_sae, &bytes);
    latent_major = scratch.take<char>(static_cast<int64_t>(bytes));
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
    return plan_latents(pieces.latent_offsets, d_sae, kChunkEntries, pieces.plan, stream);
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
