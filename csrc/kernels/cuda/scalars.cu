#include "kernels/cuda/scalars.h"

#include "kernels/common/bookkeeping.h"
#include "kernels/cuda/launch.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kVectorThreads = 256;

// ---- kernels

// One thread.
__global__ void __launch_bounds__(kWarpSize)
    scalars_kernel(UpdateSettings settings, StepPointers step) {
  if (threadIdx.x != 0) return;
  const float scale = *step.loss_scale + fault_of(step.fault, step.losses);
  const UpdateInputs inputs{*step.squared_norm, *step.lr, scale};
  *step.norm = update_scalars(settings, inputs, *step.step_count, *step.halted, step.lr_squares,
                              *step.scalars);
}

// One thread a number.
template <UpdateRule kRule>
__global__ void __launch_bounds__(kVectorThreads)
    vector_kernel(const UpdateScalars* __restrict__ scalars, VectorState first,
                  VectorState second) {
  const UpdateScalars numbers = *scalars;
  if (!is_finite(numbers.grad_scale)) return;
  float unused = 0.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kVectorThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kVectorThreads + threadIdx.x;
  for (; i < first.size + second.size; i += stride) {
    // Pointer by pointer: a choice between the structs would lie in local memory.
    const bool in_first = i < first.size;
    const int64_t at = in_first ? i : i - first.size;
    const float* const grad = in_first ? first.grad : second.grad;
    float* const w = in_first ? first.w : second.w;
    float* const exp_avg = in_first ? first.exp_avg : second.exp_avg;
    float* const exp_avg_sq = in_first ? first.exp_avg_sq : second.exp_avg_sq;
    const float scaled = grad != nullptr ? grad[at] * numbers.grad_scale : 0.0f;
    float& square = has_exp_avg_sq(kRule) ? exp_avg_sq[at] : unused;
    w[at] = update_weight<kRule>(numbers.step, w[at], scaled, exp_avg[at], square);
  }
}

}  // namespace

// ---- launchers

cudaError_t compute_update_scalars(const UpdateSettings& settings, const StepPointers& step,
                                   cudaStream_t stream) {
  return launch(scalars_kernel, 1, kWarpSize, 0, stream, settings, step);
}

cudaError_t update_vectors(UpdateRule rule, const UpdateScalars* scalars, const VectorState& first,
                           const VectorState& second, cudaStream_t stream) {
  return with_rule(rule, [&](auto known_rule) {
    return launch(vector_kernel<decltype(known_rule)::value>,
                  ceil_div<int64_t>(first.size + second.size, kVectorThreads), kVectorThreads, 0,
                  stream, scalars, first, second);
  });
}

}  // namespace sae_fast::cuda
