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
  *step.norm = update_scalars(settings, inputs, *step.step_count, *step.halted, *step.scalars);
}

// One thread a number.
__global__ void __launch_bounds__(kVectorThreads)
    vector_kernel(const UpdateScalars* __restrict__ scalars, const float* __restrict__ grad,
                  float* __restrict__ w, float* __restrict__ exp_avg,
                  float* __restrict__ exp_avg_sq, int64_t size) {
  const UpdateScalars step = *scalars;
  if (!is_finite(step.grad_scale)) return;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kVectorThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kVectorThreads + threadIdx.x;
  for (; i < size; i += stride) {
    const float scaled = grad != nullptr ? grad[i] * step.grad_scale : 0.0f;
    w[i] = adam_update(step.adam, w[i], scaled, exp_avg[i], exp_avg_sq[i]);
  }
}

}  // namespace

// ---- launchers

cudaError_t compute_update_scalars(const UpdateSettings& settings, const StepPointers& step,
                                   cudaStream_t stream) {
  return launch(scalars_kernel, 1, kWarpSize, 0, stream, settings, step);
}

cudaError_t update_vector(const UpdateScalars* scalars, const float* grad, float* w, float* exp_avg,
                          float* exp_avg_sq, int64_t size, cudaStream_t stream) {
  return launch(vector_kernel, ceil_div<int64_t>(size, kVectorThreads), kVectorThreads, 0, stream,
                scalars, grad, w, exp_avg, exp_avg_sq, size);
}

}  // namespace sae_fast::cuda
