#include "kernels/cuda/scalars.h"

#include "kernels/cuda/launch.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kVectorThreads = 256;

// ---- kernels

// One thread.
__global__ void __launch_bounds__(kWarpSize)
    scalars_kernel(UpdateSettings settings, StepPointers step) {
  if (threadIdx.x != 0) return;
  const UpdateInputs inputs{*step.squared_norm, *step.lr, *step.loss_scale};
  *step.norm = update_scalars(settings, inputs, *step.step_count, *step.halted, step.lr_squares,
                              *step.scalars);
}

// One thread a number.
template <UpdateRule kRule>
__global__ void __launch_bounds__(kVectorThreads)
    vector_kernel(const UpdateScalars* __restrict__ scalars, const float* __restrict__ grad,
                  float* __restrict__ w, float* __restrict__ exp_avg,
                  float* __restrict__ exp_avg_sq, int64_t size) {
  const UpdateScalars numbers = *scalars;
  if (!is_finite(numbers.grad_scale)) return;
  float unused = 0.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kVectorThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kVectorThreads + threadIdx.x;
  for (; i < size; i += stride) {
    const float scaled = grad != nullptr ? grad[i] * numbers.grad_scale : 0.0f;
    float& square = has_exp_avg_sq(kRule) ? exp_avg_sq[i] : unused;
    w[i] = update_weight<kRule>(numbers.step, w[i], scaled, exp_avg[i], square);
  }
}

}  // namespace

// ---- launchers

cudaError_t compute_update_scalars(const UpdateSettings& settings, const StepPointers& step,
                                   cudaStream_t stream) {
  return launch(scalars_kernel, 1, kWarpSize, 0, stream, settings, step);
}

cudaError_t update_vector(UpdateRule rule, const UpdateScalars* scalars, const float* grad,
                          float* w, float* exp_avg, float* exp_avg_sq, int64_t size,
                          cudaStream_t stream) {
  return with_rule(rule, [&](auto known_rule) {
    return launch(vector_kernel<decltype(known_rule)::value>,
                  ceil_div<int64_t>(size, kVectorThreads), kVectorThreads, 0, stream, scalars, grad,
                  w, exp_avg, exp_avg_sq, size);
  });
}

}  // namespace sae_fast::cuda
