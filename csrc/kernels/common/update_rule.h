// The optimisers' step on one parameter, host and device: Adam, SGD and Signum. The order of
// operations is torch.optim's, so that every back end walks the same trajectory as separate PyTorch
// calls.
//
// Adam is torch.optim.AdamW. SGD is torch.optim.SGD with momentum, without dampening or Nesterov:
//   m = beta1 m + (g + weight_decay w),   w = w - lr m
// Signum (Bernstein et al. 2018, arXiv:1802.04434, algorithm 2) with decoupled weight decay:
//   m = beta1 m + (1 - beta1) g,          w = (1 - lr weight_decay) w - lr sign(m)
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/common/host_device.h"

namespace sae_fast {

enum class UpdateRule { kAdam, kSgd, kSignum };

// Whether a rule has exp_avg_sq beside exp_avg.
SAE_FAST_HOST_DEVICE constexpr bool has_exp_avg_sq(UpdateRule rule) {
  return rule == UpdateRule::kAdam;
}

// Returns call(std::integral_constant of the rule).
template <class Call>
auto with_rule(UpdateRule rule, Call&& call) {
  switch (rule) {
    case UpdateRule::kSgd:
      return call(std::integral_constant<UpdateRule, UpdateRule::kSgd>{});
    case UpdateRule::kSignum:
      return call(std::integral_constant<UpdateRule, UpdateRule::kSignum>{});
    case UpdateRule::kAdam:
      break;
  }
  return call(std::integral_constant<UpdateRule, UpdateRule::kAdam>{});
}

// A run's settings; grad_clip 0: no clipping. beta2 and eps are Adam's alone.
struct UpdateSettings {
  UpdateRule rule;
  double grad_clip, beta1, beta2, eps, weight_decay;
  bool skip_overflow;  // whether a gradient that is not finite is left out rather than the end
};

// What a step needs that does not depend on the parameter; 0 where the rule has no use for it. All
// of it is computed in double first: 1 - beta2 taken in float would be off by 5e-5 relative, which
// shows after one step.
struct UpdateStep {
  float decay;  // 1 - lr * weight_decay; SGD: 1
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;              // Adam: lr / (1 - beta1^step); else lr
  float sqrt_bias_correction2;  // sqrt(1 - beta2^step)
  float eps;                    // added after the division by sqrt_bias_correction2
  float beta1;                  // SGD
  float grad_decay;             // SGD: weight_decay, as a part of the gradient
};

// `step` counts from 1. A device's pow may differ from the host's by a unit in the last place of a
// double, which hardly ever survives the rounding to float.
SAE_FAST_HOST_DEVICE inline UpdateStep make_update_step(const UpdateSettings& settings, double lr,
                                                        int64_t step) {
  UpdateStep update{};
  update.step_size = static_cast<float>(lr);
  if (settings.rule == UpdateRule::kSgd) {
    update.decay = 1.0f;
    update.beta1 = static_cast<float>(settings.beta1);
    update.grad_decay = static_cast<float>(settings.weight_decay);
    return update;
  }
  update.decay = static_cast<float>(1.0 - lr * settings.weight_decay);
  update.one_minus_beta1 = static_cast<float>(1.0 - settings.beta1);
  if (settings.rule == UpdateRule::kSignum) return update;
  const double bias_correction1 = 1.0 - std::pow(settings.beta1, static_cast<double>(step));
  const double bias_correction2 = 1.0 - std::pow(settings.beta2, static_cast<double>(step));
  update.beta2 = static_cast<float>(settings.beta2);
  update.one_minus_beta2 = static_cast<float>(1.0 - settings.beta2);
  update.step_size = static_cast<float>(lr / bias_correction1);
  update.sqrt_bias_correction2 = static_cast<float>(std::sqrt(bias_correction2));
  update.eps = static_cast<float>(settings.eps);
  return update;
}

// The clip and the step, as an op hands them to the next in one tensor of 10 numbers.
struct UpdateScalars {
  float grad_scale;  // not finite: no parameter changes
  UpdateStep step;
};
constexpr int64_t kUpdateScalars = 10;
static_assert(sizeof(UpdateScalars) == kUpdateScalars * sizeof(float), "no padding");

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
    scalars.step = make_update_step(settings, inputs.lr, step_count);
    return rounded_norm;
  }
  if (!settings.skip_overflow && halted < 0) halted = step_count;
  scalars = {NAN, {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}};
  return rounded_norm;
}

// The new weight; exp_avg, and Adam's exp_avg_sq, are updated in place. The first moment of Adam
// and Signum moves as torch's lerp does, m + (1 - beta1) (g - m), which leaves m alone where it
// equals g.
template <UpdateRule kRule>
SAE_FAST_ALWAYS_INLINE float update_weight(const UpdateStep& step, float weight, float grad,
                                           float& exp_avg, float& exp_avg_sq) {
  if constexpr (kRule == UpdateRule::kSgd) {
    exp_avg = step.beta1 * exp_avg + (grad + step.grad_decay * weight);
    return weight - step.step_size * exp_avg;
  } else if constexpr (kRule == UpdateRule::kSignum) {
    exp_avg += step.one_minus_beta1 * (grad - exp_avg);
    const float sign = exp_avg > 0.0f ? 1.0f : exp_avg < 0.0f ? -1.0f : 0.0f;
    return step.decay * weight - step.step_size * sign;
  } else {
    exp_avg += step.one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = step.beta2 * exp_avg_sq + step.one_minus_beta2 * (grad * grad);
    const float denominator = std::sqrt(exp_avg_sq) / step.sqrt_bias_correction2 + step.eps;
    return step.decay * weight - step.step_size * (exp_avg / denominator);
  }
}

}  // namespace sae_fast
