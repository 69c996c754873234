// The kernel of the second pass, and update_rows, which starts it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/common/row_norm.h"
#include "kernels/cuda/encode/encoder_stats.cuh"
#include "kernels/cuda/update/row.cuh"
#include "kernels/cuda/update/step.cuh"

namespace sae_fast::cuda {

// Blocks that a multiprocessor's registers must hold. Left to itself the assembler aims higher on
// some architectures and spills.
constexpr int kUpdateBlocks = 4;

// ---- kernels

// Returns what the copy holds, as floats; the weights themselves where there is none.
template <int kWidth>
__device__ inline Vector<float, kWidth> store_weights(const RowState& state, int64_t offset,
                                                      const Vector<float, kWidth>& weights) {
  store_once(state.W + offset, weights);
  if (state.rounded == nullptr) return weights;
  if (state.rounded_type == DType::kBFloat16) {
    auto* const copy = static_cast<__nv_bfloat16*>(state.rounded);
    return store<__nv_bfloat16, kWidth>(copy + offset, weights);
  }
  return store<__half, kWidth>(static_cast<__half*>(state.rounded) + offset, weights);
}

// The finished row in `row` divided by `norm`, its copy and the copy's stats. Every thread stores
// the columns that it has put into `row`.
template <int kWidth>
__device__ inline void store_row(const RowState& state, int64_t latent, int64_t latents,
                                 int64_t d_in, const float* row, float norm, float* partial) {
  float square = 0.0f;
  float lost = 0.0f;
  for (int column = static_cast<int>(threadIdx.x) * kWidth; column < d_in;
       column += static_cast<int>(blockDim.x) * kWidth) {
    auto weights = load<float, kWidth>(row + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) weights.at[i] /= norm;
    auto rest = store_weights(state, latent * d_in + column, weights);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) rest.at[i] = weights.at[i] - rest.at[i];
    square = add_dot(square, weights, weights);
    lost = add_dot(lost, rest, rest);
  }
  if (state.stats == nullptr) return;
  square = block_sum(square, partial);
  lost = block_sum(lost, partial);
  if (threadIdx.x != 0) return;
  const float2 bounds = row_bounds(square, lost, d_in);
  state.stats[latent] = bounds.x;
  state.stats[latents + latent] = bounds.y;
}

// One block a latent: its gradient and weights stay in shared memory between the reductions, where
// each thread reads back only what it wrote itself.
template <typename Dense, int kWidth, UpdateRule kRule, DType kMoments>
__global__ void __launch_bounds__(kRowThreads, kUpdateBlocks)
    update_kernel(LatentLists lists, const Dense* __restrict__ dense,
                  const float* __restrict__ shift, const float* __restrict__ extra_grad,
                  int64_t d_in, RowState state, const float* __restrict__ cached,
                  const int32_t* __restrict__ cache_slots,
                  const UpdateScalars* __restrict__ scalars, bool project, bool unit_norm) {
  float* const gradient = static_cast<float*>(dynamic_shared_memory());  // [D]
  float* const row = gradient + d_in;                                    // [D]
  float* const new_moments = row + d_in;                                 // [kSharedRows, D]
  __shared__ float partial[kRowWarps];
  const int columns = static_cast<int>(d_in);  // as many as shared memory holds
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  const int stride = static_cast<int>(blockDim.x) * kWidth;
  const UpdateScalars numbers = *scalars;
  if (!is_finite(numbers.grad_scale)) return;
  for (int64_t latent = blockIdx.x; latent < lists.latents; latent += gridDim.x) {
    const int64_t start = latent * d_in;
    // While the gradient is summed, whose lists are found by one read after the other.
    prefetch_row(state.W + start, columns);
    prefetch_moments<kRule, kMoments>(state.moments, start, columns);
    const int32_t slot = cache_slots[latent];
    const int64_t begin = lists.offsets[latent];
    const int64_t end = slot < 0 ? lists.offsets[latent + 1] : begin;
    float dot = 0.0f;
    for (int column = first; column < columns; column += stride) {
      const auto weights = load_once<float, kWidth>(state.W + start + column);
      Vector<float, kWidth> shifted{};
      add_row(shifted, shift, column);
      auto sum = sum_list<Dense, kWidth>(lists, begin, end, dense + column, shifted, d_in);
      if (slot >= 0) sum = load_once<float, kWidth>(cached + slot * d_in + column);
      add_row(sum, extra_grad, start + column);
      dot = add_dot(dot, sum, weights);
      store<float, kWidth>(gradient + column, sum);
      store<float, kWidth>(row + column, weights);
    }
    dot = project ? block_sum(dot, partial) : 0.0f;
    const RowMoments<kRule, kMoments> moments(state.moments, latent, d_in, new_moments);
    float square = 0.0f;
    for (int column = first; column < columns; column += stride) {
      auto rest = load<float, kWidth>(gradient + column);
      auto weights = load<float, kWidth>(row + column);
      add_scaled(rest, -dot, weights);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) rest.at[i] *= numbers.grad_scale;
      weights = moments.template update<kWidth>(numbers.step, column, weights, rest);
      square = add_dot(square, weights, weights);
      store<float, kWidth>(row + column, weights);
    }
    const float norm = unit_norm ? row_norm(block_sum(square, partial)) : 1.0f;
    moments.template finish<kWidth>(norm);
    store_row<kWidth>(state, latent, lists.latents, d_in, row, norm, partial);
  }
}

// ---- launcher

template <UpdateRule kRule, DType kMoments>
cudaError_t update_rows(const RowUpdate& update, cudaStream_t stream) {
  const GradientFactors& factors = update.factors;
  const RowState& state = update.state;
  const int64_t d_in = factors.d_in;
  return with_rows<kRowWidth>(
      factors.dense, d_in,
      {factors.shift, factors.extra_grad, state.W, state.moments.exp_avg, state.moments.exp_avg_sq,
       state.rounded, update.cached},
      [&](const auto* dense, auto width) {
        using Dense = std::decay_t<decltype(*dense)>;
        constexpr int kWidth = decltype(width)::value;
        return launch(update_kernel<Dense, kWidth, kRule, kMoments>, factors.lists.latents,
                      row_threads(d_in, kWidth), row_bytes(kUpdateRows<kRule, kMoments>, d_in),
                      stream, factors.lists, dense, factors.shift, factors.extra_grad, d_in, state,
                      update.cached, update.cache_slots, update.scalars, update.project,
                      update.unit_norm);
      });
}

}  // namespace sae_fast::cuda
