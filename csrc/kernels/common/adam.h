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
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;              // lr / (1 - beta1^step)
  float sqrt_bias_correction2;  // sqrt(1 - beta2^step)
  float eps;                    // added after the division by sqrt_bias_correction2
};

// `step` counts from 1.
inline AdamStep make_adam_step(double lr, double beta1, double beta2, double eps,
                               double weight_decay, int64_t step) {
  const double bias_correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
  const double bias_correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
  AdamStep adam{};
  adam.decay = static_cast<float>(1.0 - lr * weight_decay);
  adam.beta1 = static_cast<float>(beta1);
  adam.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  adam.beta2 = static_cast<float>(beta2);
  adam.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  adam.step_size = static_cast<float>(lr / bias_correction1);
  adam.sqrt_bias_correction2 = static_cast<float>(std::sqrt(bias_correction2));
  adam.eps = static_cast<float>(eps);
  return adam;
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
