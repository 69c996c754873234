#include <cub/device/device_scan.cuh>

#include "kernels/cuda/latent_sum.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kPlanThreads = 256;

// ---- kernels

// One thread a latent; the last one writes the zero that the scan turns into the totals.
__global__ void __launch_bounds__(kPlanThreads)
    count_kernel(const int64_t* __restrict__ latent_offsets, int64_t latents, int64_t cached_above,
                 int64_t* __restrict__ counts) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPlanThreads;
  int64_t latent = static_cast<int64_t>(blockIdx.x) * kPlanThreads + threadIdx.x;
  for (; latent <= latents; latent += stride) {
    int64_t count = 0;
    if (latent < latents) {
      const int64_t entries = latent_offsets[latent + 1] - latent_offsets[latent];
      count = (chunks_in(entries) << 32) + (entries > cached_above ? 1 : 0);
    }
    counts[latent] = count;
  }
}

// The latent that a chunk belongs to: the last whose first chunk is not beyond it.
__device__ int64_t latent_of_chunk(const int64_t* __restrict__ counts, int64_t latents,
                                   int64_t chunk) {
  int64_t low = 0;
  int64_t high = latents;  // chunks_of(counts[low]) <= chunk < chunks_of(counts[high])
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (chunks_of(counts[middle]) <= chunk ? low : high) = middle;
  }
  return low;
}

// One block a chunk. How many there are is known on the device only: the grid has room for the most
// that there can be, and the rest return at once.
template <typename Dense, int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    chunk_kernel(LatentLists lists, LatentPlan plan, const Dense* __restrict__ dense,
                 const float* __restrict__ shift, int64_t d_in) {
  const int64_t chunks = chunks_of(plan.counts[lists.latents]);
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t latent = latent_of_chunk(plan.counts, lists.latents, chunk);
    const int64_t begin =
        lists.offsets[latent] + (chunk - chunks_of(plan.counts[latent])) * kChunkEntries;
    const int64_t end = min(begin + kChunkEntries, lists.offsets[latent + 1]);
    for (int64_t column = threadIdx.x * kWidth; column < d_in; column += blockDim.x * kWidth) {
      Vector<float, kWidth> shifted{};
      if (shift != nullptr) shifted = load<float, kWidth>(shift + column);
      const auto sum = sum_list<Dense, kWidth>(lists, begin, end, dense + column, shifted, d_in);
      store<float, kWidth>(plan.partials + chunk * d_in + column, sum);
    }
  }
}

}  // namespace

// ---- launchers

cudaError_t plan_scratch_bytes(int64_t latents, size_t* bytes) {
  int64_t* const counts = nullptr;
  return cub::DeviceScan::ExclusiveSum(nullptr, *bytes, counts, counts, latents + 1);
}

cudaError_t plan_latents(const int64_t* latent_offsets, int64_t latents, int64_t cached_above,
                         const LatentPlan& plan, void* scratch, size_t scratch_bytes,
                         cudaStream_t stream) {
  const cudaError_t error =
      launch(count_kernel, ceil_div<int64_t>(latents + 1, kPlanThreads), kPlanThreads, 0, stream,
             latent_offsets, latents, cached_above, plan.counts);
  if (error != cudaSuccess) return error;
  return cub::DeviceScan::ExclusiveSum(scratch, scratch_bytes, plan.counts, plan.counts,
                                       latents + 1, stream);
}

cudaError_t sum_chunks(const LatentLists& lists, const LatentPlan& plan, TypedPointer dense,
                       const float* shift, int64_t d_in, cudaStream_t stream) {
  return with_rows<kRowWidth>(
      dense, d_in, {shift, plan.partials}, [&](const auto* rows, auto width) {
        using Dense = std::decay_t<decltype(*rows)>;
        constexpr int kWidth = decltype(width)::value;
        return launch(chunk_kernel<Dense, kWidth>, max_chunks(lists.entries),
                      row_threads(d_in, kWidth), 0, stream, lists, plan, rows, shift, d_in);
      });
}

}  // namespace sae_fast::cuda
