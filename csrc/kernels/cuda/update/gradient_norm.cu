// The first pass: the norm of the gradient's rows.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/update.h"
#include "kernels/cuda/update/row.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kLatentsPerBlock = 4;

// ---- kernels

// Blocks take latents in turn, one at a time; the last one adds the rows' squares up, in an order
// that depends on shapes alone. A thread reads back from shared memory only what it wrote itself.
template <typename Dense, int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    gradient_norm_kernel(LatentLists lists, LatentPlan plan, const Dense* __restrict__ dense,
                         const float* __restrict__ shift, const float* __restrict__ extra_grad,
                         const float* __restrict__ project_onto, int64_t d_in,
                         double* squared_norms, double* __restrict__ squared_norm,
                         float* __restrict__ sums, float* __restrict__ cached,
                         int32_t* __restrict__ cache_slots) {
  float* const gradient = static_cast<float*>(dynamic_shared_memory());  // [D]
  __shared__ float dots[kRowWarps];
  __shared__ double squares[kRowWarps];
  const int columns = static_cast<int>(d_in);  // as many as shared memory holds
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  const int stride = static_cast<int>(blockDim.x) * kWidth;
  for (int64_t latent = blockIdx.x; latent < lists.latents; latent += gridDim.x) {
    const int64_t slot = cached_of(plan.counts[latent]);
    const bool keep = cached_of(plan.counts[latent + 1]) > slot;
    float dot = 0.0f;
    float square = 0.0f;
    for (int column = first; column < columns; column += stride) {
      auto sum = sum_latent<Dense, kWidth>(lists, plan, latent, dense, shift, column, d_in);
      if (keep) store<float, kWidth>(cached + slot * d_in + column, sum);
      add_row(sum, extra_grad, latent * d_in + column);
      if (project_onto == nullptr) {
        square = add_dot(square, sum, sum);
      } else {
        dot = add_dot(dot, sum, load<float, kWidth>(project_onto + latent * d_in + column));
        store<float, kWidth>(gradient + column, sum);
      }
    }
    if (project_onto != nullptr) {
      dot = block_sum(dot, dots);
      for (int column = first; column < columns; column += stride) {
        auto rest = load<float, kWidth>(gradient + column);
        add_scaled(rest, -dot, load<float, kWidth>(project_onto + latent * d_in + column));
        square = add_dot(square, rest, rest);
      }
    }
    const double row_square = block_sum(static_cast<double>(square), squares);
    if (threadIdx.x < kWarpSize) {
      const float sum = sum_coefficients(lists, latent);
      if (threadIdx.x == 0) {
        squared_norms[latent] = row_square;
        sums[latent] = sum;
        cache_slots[latent] = keep ? static_cast<int32_t>(slot) : -1;
      }
    }
  }
  if (!is_last_block(plan.ticket)) return;
  double mine = 0.0;
#pragma unroll 16
  for (int64_t i = threadIdx.x; i < lists.latents; i += blockDim.x) {
    mine += load_written(&squared_norms[i]);
  }
  const double total = block_sum(mine, squares);
  if (threadIdx.x == 0) *squared_norm = total;
}

// ---- launchers

struct NormScratch {
  LatentPlan plan;
  double* squared_norms;  // [F]

  NormScratch(Scratch& scratch, int64_t entries, int64_t latents, int64_t d_in)
      : plan(scratch, entries, latents, d_in), squared_norms(scratch.take<double>(latents)) {}
};

}  // namespace

cudaError_t row_gradient_norm_scratch_bytes(int64_t entries, int64_t latents, int64_t d_in,
                                            size_t* bytes) {
  Scratch scratch(nullptr);
  const NormScratch pieces(scratch, entries, latents, d_in);
  *bytes = scratch.bytes();
  return cudaSuccess;
}

cudaError_t row_gradient_norm(const GradientFactors& factors, RowCache cache,
                              const float* project_onto, double* squared_norm, float* sums,
                              float* cached, int32_t* cache_slots, void* scratch,
                              cudaStream_t stream) {
  const LatentLists& lists = factors.lists;
  const int64_t d_in = factors.d_in;
  Scratch remaining(scratch);
  const NormScratch pieces(remaining, lists.entries, lists.latents, d_in);
  cudaError_t error = plan_latents(lists.offsets, lists.latents, cache.above, pieces.plan, stream);
  const auto then = [&error](auto&& start) {
    if (error == cudaSuccess) error = start();
  };
  then([&] { return sum_chunks(lists, pieces.plan, factors.dense, factors.shift, d_in, stream); });
  then([&] {
    return with_rows<kRowWidth>(
        factors.dense, d_in,
        {factors.shift, factors.extra_grad, project_onto, cached, pieces.plan.partials},
        [&](const auto* dense, auto width) {
          using Dense = std::decay_t<decltype(*dense)>;
          constexpr int kWidth = decltype(width)::value;
          const int64_t blocks =
              std::max(ceil_div(lists.latents, int64_t{kLatentsPerBlock}), int64_t{1});
          return launch(gradient_norm_kernel<Dense, kWidth>, blocks, row_threads(d_in, kWidth),
                        project_onto != nullptr ? row_bytes(1, d_in) : 0, stream, lists,
                        pieces.plan, dense, factors.shift, factors.extra_grad, project_onto, d_in,
                        pieces.squared_norms, squared_norm, sums, cached, cache_slots);
        });
  });
  return error;
}

}  // namespace sae_fast::cuda
