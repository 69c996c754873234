// The optimisers' step on one parameter, host and device: Adam, SGD, Signum and schedule-free
// Signum. The order of operations is torch.optim's, so that every back end walks the same
// trajectory as separate PyTorch calls.
//
// Adam is torch.optim.AdamW. SGD is torch.optim.SGD with momentum, without dampening or Nesterov:
//   m = beta1 m + (g + weight_decay w),   w = w - lr m
// Signum (Bernstein et al. 2018, arXiv:1802.04434, algorithm 2) with decoupled weight decay:
//   m = beta1 m + (1 - beta1) g,          w = (1 - lr weight_decay) w - lr sign(m)
// Schedule-free Signum (Defazio et al. 2024, arXiv:2405.15682, algorithm of section 2 round sign
// descent) walks a z, averages it in x, and trains at y = (1 - beta1) z + beta1 x:
//   z = z - lr (sign(g) + weight_decay y),   x = (1 - c) x + c z
// with c = lr^2 over the sum of lr^2 of all steps, this one included. The weight is y, exp_avg is
// the difference e = z - y, of which 16 bits are enough where of z they are not:
//   d = sign(g) + weight_decay y,   u = e - lr beta1 d
//   y = y - lr (1 - beta1) d + c u,   e = (1 - c) u;   x = y - (1 - beta1) / beta1 e
// Where rows are brought to unit norm y, z and x are divided by the same number.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/common/host_device.h"

namespace sae_fast {

enum class UpdateRule { kAdam, kSgd, kSignum, kScheduleFreeSignum };

// Returns true if a rule has exp_avg_sq beside exp_avg.
SAE_FAST_HOST_DEVICE constexpr bool has_exp_avg_sq(UpdateRule rule) {
  return rule == UpdateRule::kAdam;
}

// Returns true if exp_avg is a difference of weights, which is divided by the norm of its row too.
SAE_FAST_HOST_DEVICE constexpr bool scales_with_weights(UpdateRule rule) {
  return rule == UpdateRule::kScheduleFreeSignum;
}

// Returns call(std::integral_constant of the rule).
template <class Call>
auto with_rule(UpdateRule rule, Call&& call) {
  switch (rule) {
    case UpdateRule::kSgd:
      return call(std::integral_constant<UpdateRule, UpdateRule::kSgd>{});
    case UpdateRule::kSignum:
      return call(std::integral_constant<UpdateRule, UpdateRule::kSignum>{});
    case UpdateRule::kScheduleFreeSignum:
      return call(std::integral_constant<UpdateRule, UpdateRule::kScheduleFreeSignum>{});
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

// The numbers of a step that all parameters share; 0 where the rule does not use them. All of
// them are computed in double first: 1 - beta2 taken in float would be off by 5e-5 relative, which
// shows after one step.
struct UpdateStep {
  float decay;  // 1 - lr * weight_decay; SGD and schedule-free: 1
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;              // Adam: lr / (1 - beta1^step); else lr
  float sqrt_bias_correction2;  // sqrt(1 - beta2^step)
  float eps;                    // added after the division by sqrt_bias_correction2
  float beta1;                  // SGD and schedule-free
  float grad_decay;             // SGD and schedule-free: weight_decay, beside gradient and sign
  float average_share;          // schedule-free: c
};

// `step` counts from 1; lr_squares is the sum of lr^2 up to this step, for schedule-free. A
// device's pow may differ from the host's by a unit in the last place of a double, which hardly
// ever survives the rounding to float.
SAE_FAST_HOST_DEVICE inline UpdateStep make_update_step(const UpdateSettings& settings, double lr,
                                                        int64_t step, double lr_squares) {
  UpdateStep update{};
  update.step_size = static_cast<float>(lr);
  if (settings.rule == UpdateRule::kSgd || settings.rule == UpdateRule::kScheduleFreeSignum) {
    update.decay = 1.0f;
    update.beta1 = static_cast<float>(settings.beta1);
    update.grad_decay = static_cast<float>(settings.weight_decay);
    if (settings.rule == UpdateRule::kSgd) return update;
    update.one_minus_beta1 = static_cast<float>(1.0 - settings.beta1);
    update.average_share = lr_squares > 0.0 ? static_cast<float>(lr * lr / lr_squares) : 0.0f;
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

// The clip and the step, as an op hands them to the next in one tensor of 11 numbers.
struct UpdateScalars {
  float grad_scale;  // not finite: no parameter changes
  UpdateStep step;
};
constexpr int64_t kUpdateScalars = 11;
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
// negative until then, is the number of steps before. lr_squares, null where the rule has no use
// for it, is the sum of lr^2 of the steps that counted.
SAE_FAST_HOST_DEVICE inline float update_scalars(const UpdateSettings& settings,
                                                 const UpdateInputs& inputs, int64_t& step_count,
                                                 int64_t& halted, double* lr_squares,
                                                 UpdateScalars& scalars) {
  const double loss_scale = inputs.loss_scale;
  const double norm = std::sqrt(inputs.squared_norm) / loss_scale;
  const auto rounded_norm = static_cast<float>(norm);
  if (is_finite(rounded_norm) && halted < 0) {
    ++step_count;
    scalars.grad_scale = static_cast<float>(clip_factor(settings.grad_clip, norm) / loss_scale);
    if (lr_squares != nullptr) *lr_squares += inputs.lr * inputs.lr;
    scalars.step = make_update_step(settings, inputs.lr, step_count,
                                    lr_squares != nullptr ? *lr_squares : 0.0);
    return rounded_norm;
  }
  if (!settings.skip_overflow && halted < 0) halted = step_count;
  scalars = {NAN, {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}};
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
  } else if constexpr (kRule == UpdateRule::kScheduleFreeSignum) {
    const float sign = grad > 0.0f ? 1.0f : grad < 0.0f ? -1.0f : 0.0f;
    const float direction = sign + step.grad_decay * weight;
    const float moved = exp_avg - (step.step_size * step.beta1) * direction;
    exp_avg = moved - step.average_share * moved;
    return weight - (step.step_size * step.one_minus_beta1) * direction +
           step.average_share * moved;
  } else {
    exp_avg += step.one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = step.beta2 * exp_avg_sq + step.one_minus_beta2 * (grad * grad);
    const float denominator = std::sqrt(exp_avg_sq) / step.sqrt_bias_correction2 + step.eps;
    return step.decay * weight - step.step_size * (exp_avg / denominator);
  }
}

}  // namespace sae_fast
