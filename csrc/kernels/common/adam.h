// AdamW on one parameter, host and device. The order of operations is torch.optim.AdamW's, so that
// every back end walks the same trajectory as five separate PyTorch calls.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/host_device.h"

namespace sae_fast {

// What a step needs that does not depend on the parameter. All of it is computed in double first:
// 1 - beta2 taken in float would be off by 5e-5 relative, which shows after one step.
struct AdamStep {
  float decay;  // 1 - lr * weight_decay
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;              // lr / (1 - beta1^step)
  float sqrt_bias_correction2;  // sqrt(1 - beta2^step)
  float eps;                    // added after the division by sqrt_bias_correction2
};

// `step` counts from 1. A device's pow may differ from the host's by a unit in the last place of a
// double, which hardly ever survives the rounding to float.
SAE_FAST_HOST_DEVICE inline AdamStep make_adam_step(double lr, double beta1, double beta2,
                                                    double eps, double weight_decay, int64_t step) {
  const double bias_correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
  const double bias_correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
  AdamStep adam{};
  adam.decay = static_cast<float>(1.0 - lr * weight_decay);
  adam.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  adam.beta2 = static_cast<float>(beta2);
  adam.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  adam.step_size = static_cast<float>(lr / bias_correction1);
  adam.sqrt_bias_correction2 = static_cast<float>(std::sqrt(bias_correction2));
  adam.eps = static_cast<float>(eps);
  return adam;
}

// The clip and the step, as an op hands them to the next in one tensor of 8 numbers.
struct UpdateScalars {
  float grad_scale;  // not finite: no parameter changes
  AdamStep adam;
};
constexpr int64_t kUpdateScalars = 8;
static_assert(sizeof(UpdateScalars) == kUpdateScalars * sizeof(float), "no padding");

// A run's settings; grad_clip 0: no clipping.
struct UpdateSettings {
  double grad_clip, beta1, beta2, eps, weight_decay;
  bool skip_overflow;  // whether a gradient that is not finite is left out rather than the end
};

// Of the gradients of loss_scale * loss; lr of this step.
struct UpdateInputs {
  double squared_norm, lr;
  float loss_scale;
};

// As std::isfinite, which device code cannot call.
SAE_FAST_HOST_DEVICE inline bool is_finite(float value) { return value - value == 0.0f; }

// min(1, clip / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ scales.
SAE_FAST_HOST_DEVICE inline double clip_factor(double grad_clip, double norm) {
  if (grad_clip == 0.0) return 1.0;
  const double factor = grad_clip / (norm + 1e-6);
  return factor < 1.0 ? factor : 1.0;
}

// Returns the gradient's norm. Where that is finite the step counts and `scalars` are its own;
// otherwise they are NaN and, unless overflows are skipped, the run is halted for good: `halted`,
// negative until then, is the number of steps before.
SAE_FAST_HOST_DEVICE inline float update_scalars(const UpdateSettings& settings,
                                                 const UpdateInputs& inputs, int64_t& step_count,
                                                 int64_t& halted, UpdateScalars& scalars) {
  const double loss_scale = inputs.loss_scale;
  const double norm = std::sqrt(inputs.squared_norm) / loss_scale;
  const auto rounded_norm = static_cast<float>(norm);
  if (is_finite(rounded_norm) && halted < 0) {
    ++step_count;
    scalars.grad_scale = static_cast<float>(clip_factor(settings.grad_clip, norm) / loss_scale);
    scalars.adam = make_adam_step(inputs.lr, settings.beta1, settings.beta2, settings.eps,
                                  settings.weight_decay, step_count);
    return rounded_norm;
  }
  if (!settings.skip_overflow && halted < 0) halted = step_count;
  scalars = {NAN, {NAN, NAN, NAN, NAN, NAN, NAN, NAN}};
  return rounded_norm;
}

// The new weight; exp_avg and exp_avg_sq are updated in place. The first moment moves as torch's
// lerp does, m + (1 - beta1) (g - m), which leaves m alone where it equals g.
SAE_FAST_HOST_DEVICE inline float adam_update(const AdamStep& adam, float weight, float grad,
                                              float& exp_avg, float& exp_avg_sq) {
  exp_avg += adam.one_minus_beta1 * (grad - exp_avg);
  exp_avg_sq = adam.beta2 * exp_avg_sq + adam.one_minus_beta2 * (grad * grad);
  const float denominator = std::sqrt(exp_avg_sq) / adam.sqrt_bias_correction2 + adam.eps;
  return adam.decay * weight - adam.step_size * (exp_avg / denominator);
}

}  // namespace sae_fast
