#include "kernels/cuda/update.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/common/row_norm.h"
#include "kernels/cuda/encode/encoder_stats.cuh"
#include "kernels/cuda/latent_sum.cuh"
#include "kernels/cuda/moments.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kSumThreads = 1024;
// Blocks that a multiprocessor's registers must hold. Left to itself the assembler aims higher on
// some architectures and spills.
constexpr int kUpdateBlocks = 4;
constexpr int kRowWarps = kRowThreads / kWarpSize;

// ---- kernels

// vector += row[column ...], where there is such a row.
template <int kWidth>
__device__ inline void add_row(Vector<float, kWidth>& vector, const float* rows, int64_t offset) {
  if (rows != nullptr) add_scaled(vector, 1.0f, load<float, kWidth>(rows + offset));
}

// One block a latent. A thread reads back from shared memory only what it wrote itself.
template <typename Dense, int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    gradient_norm_kernel(LatentLists lists, LatentPlan plan, const Dense* __restrict__ dense,
                         const float* __restrict__ shift, const float* __restrict__ extra_grad,
                         const float* __restrict__ project_onto, int64_t d_in,
                         double* __restrict__ squared_norms, float* __restrict__ sums,
                         float* __restrict__ cached, int32_t* __restrict__ cache_slots) {
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
}

// One block in all, so that the order of additions depends on their number alone.
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const double* __restrict__ numbers, int64_t count, double* __restrict__ sum) {
  __shared__ double partial[kSumThreads / kWarpSize];
  double mine = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) mine += numbers[i];
  const double total = block_sum(mine, partial);
  if (threadIdx.x == 0) *sum = total;
}

// Returns what the copy holds, as floats; the weights themselves where there is none.
template <int kWidth>
__device__ inline Vector<float, kWidth> store_weights(const RowState& state, int64_t offset,
                                                      const Vector<float, kWidth>& weights) {
  store<float, kWidth>(state.W + offset, weights);
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
    const int32_t slot = cache_slots[latent];
    const int64_t begin = lists.offsets[latent];
    const int64_t end = slot < 0 ? lists.offsets[latent + 1] : begin;
    float dot = 0.0f;
    for (int column = first; column < columns; column += stride) {
      const auto weights = load<float, kWidth>(state.W + start + column);
      Vector<float, kWidth> shifted{};
      add_row(shifted, shift, column);
      auto sum = sum_list<Dense, kWidth>(lists, begin, end, dense + column, shifted, d_in);
      if (slot >= 0) sum = load<float, kWidth>(cached + slot * d_in + column);
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

// ---- launchers

struct NormScratch {
  LatentPlan plan;
  double* squared_norms;
  void* scan;
  size_t scan_bytes = 0;
  cudaError_t error;

  NormScratch(Scratch& scratch, int64_t entries, int64_t latents, int64_t d_in) {
    plan.counts = scratch.take<int64_t>(latents + 1);
    plan.partials = scratch.take<float>(max_chunks(entries) * d_in);
    squared_norms = scratch.take<double>(latents);
    error = plan_scratch_bytes(latents, &scan_bytes);
    scan = scratch.take<char>(static_cast<int64_t>(scan_bytes));
  }
};

size_t row_bytes(int64_t rows, int64_t d_in) {
  return static_cast<size_t>(rows * d_in) * sizeof(float);
}

// Rows that update_kernel has in shared memory: gradient, weights, and what the moments take.
template <UpdateRule kRule, DType kMoments>
constexpr int64_t kUpdateRows = 2 + RowMoments<kRule, kMoments>::kSharedRows;

// Calls call(rule, type) with both as std::integral_constant.
template <typename Call>
cudaError_t with_moments(UpdateRule wanted, DType type, Call&& call) {
  return with_rule(wanted, [&](auto rule) {
    switch (type) {
      case DType::kBFloat16:
        return call(rule, std::integral_constant<DType, DType::kBFloat16>{});
      case DType::kUInt8:
        return call(rule, std::integral_constant<DType, DType::kUInt8>{});
      default:
        return call(rule, std::integral_constant<DType, DType::kFloat32>{});
    }
  });
}

}  // namespace

cudaError_t row_update_max_d_in(UpdateRule rule, DType moments, int64_t* d_in) {
  int device = 0;
  int bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  const auto fixed = static_cast<int64_t>(kRowWarps * (sizeof(float) + sizeof(double)));
  return with_moments(rule, moments, [&](auto known_rule, auto type) {
    constexpr int64_t kRows = kUpdateRows<decltype(known_rule)::value, decltype(type)::value>;
    *d_in = (bytes - fixed) / static_cast<int64_t>(row_bytes(kRows, 1));
    return error;
  });
}

cudaError_t row_gradient_norm_scratch_bytes(int64_t entries, int64_t latents, int64_t d_in,
                                            size_t* bytes) {
  Scratch scratch(nullptr);
  const NormScratch pieces(scratch, entries, latents, d_in);
  *bytes = scratch.bytes();
  return pieces.error;
}

cudaError_t row_gradient_norm(const GradientFactors& factors, RowCache cache,
                              const float* project_onto, double* squared_norm, float* sums,
                              float* cached, int32_t* cache_slots, void* scratch,
                              cudaStream_t stream) {
  const LatentLists& lists = factors.lists;
  const int64_t d_in = factors.d_in;
  Scratch remaining(scratch);
  const NormScratch pieces(remaining, lists.entries, lists.latents, d_in);
  cudaError_t error = pieces.error;
  const auto then = [&error](auto&& start) {
    if (error == cudaSuccess) error = start();
  };
  then([&] {
    return plan_latents(lists.offsets, lists.latents, cache.above, pieces.plan, pieces.scan,
                        pieces.scan_bytes, stream);
  });
  then([&] { return sum_chunks(lists, pieces.plan, factors.dense, factors.shift, d_in, stream); });
  then([&] {
    return with_rows<kRowWidth>(
        factors.dense, d_in,
        {factors.shift, factors.extra_grad, project_onto, cached, pieces.plan.partials},
        [&](const auto* dense, auto width) {
          using Dense = std::decay_t<decltype(*dense)>;
          constexpr int kWidth = decltype(width)::value;
          return launch(gradient_norm_kernel<Dense, kWidth>, lists.latents,
                        row_threads(d_in, kWidth), project_onto != nullptr ? row_bytes(1, d_in) : 0,
                        stream, lists, pieces.plan, dense, factors.shift, factors.extra_grad,
                        project_onto, d_in, pieces.squared_norms, sums, cached, cache_slots);
        });
  });
  then([&] {
    return launch(sum_kernel, 1, kSumThreads, 0, stream, pieces.squared_norms, lists.latents,
                  squared_norm);
  });
  return error;
}

cudaError_t fused_update(const GradientFactors& factors, const RowState& state, const float* cached,
                         const int32_t* cache_slots, UpdateRule rule, const UpdateScalars* scalars,
                         bool project, bool unit_norm, cudaStream_t stream) {
  const int64_t d_in = factors.d_in;
  return with_moments(rule, state.moments.type, [&](auto known_rule, auto type) {
    constexpr UpdateRule kRule = decltype(known_rule)::value;
    constexpr DType kMoments = decltype(type)::value;
    return with_rows<kRowWidth>(
        factors.dense, d_in,
        {factors.shift, factors.extra_grad, state.W, state.moments.exp_avg,
         state.moments.exp_avg_sq, state.rounded, cached},
        [&](const auto* dense, auto width) {
          using Dense = std::decay_t<decltype(*dense)>;
          constexpr int kWidth = decltype(width)::value;
          return launch(update_kernel<Dense, kWidth, kRule, kMoments>, factors.lists.latents,
                        row_threads(d_in, kWidth), row_bytes(kUpdateRows<kRule, kMoments>, d_in),
                        stream, factors.lists, dense, factors.shift, factors.extra_grad, d_in,
                        state, cached, cache_slots, scalars, project, unit_norm);
        });
  });
}

}  // namespace sae_fast::cuda
