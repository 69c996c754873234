#include "kernels/cuda/latent_sum.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kPlanItems = 8;

// ---- kernels

// One block in all: a scan of some hundred thousand numbers takes less time than launches between
// the parts of a divided one.
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const int64_t* __restrict__ latent_offsets, int64_t latents, int64_t cached_above,
                LatentPlan plan) {
  __shared__ int64_t partial[kPlanThreads / kWarpSize];
  const int64_t total = block_scan<kPlanItems>(
      latents, partial,
      [&](int64_t latent) {
        const int64_t entries = latent_offsets[latent + 1] - latent_offsets[latent];
        return (chunks_in(entries) << 32) + (entries > cached_above ? 1 : 0);
      },
      [&](int64_t latent, int64_t before) { plan.counts[latent] = before; });
  if (threadIdx.x != 0) return;
  plan.counts[latents] = total;
  *plan.ticket = 0;
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

cudaError_t plan_latents(const int64_t* latent_offsets, int64_t latents, int64_t cached_above,
                         const LatentPlan& plan, cudaStream_t stream) {
  return launch(plan_kernel, 1, kPlanThreads, 0, stream, latent_offsets, latents, cached_above,
                plan);
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
