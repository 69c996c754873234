// The optimisers' formulas in double, as torch.optim.AdamW, torch.optim.SGD and the paper of Signum
// give them: what kernels must agree with.
#pragma once

#include <cmath>

#include "kernels/common/update_rule.h"

namespace sae_fast::testing {

constexpr UpdateRule kRules[] = {UpdateRule::kAdam, UpdateRule::kSgd, UpdateRule::kSignum};

constexpr UpdateSettings some_settings(UpdateRule rule) {
  return {rule, 0.0, 0.9, 0.999, 1e-8, 0.01, false};
}

// A weight with its moments.
struct DoubleWeight {
  double weight, exp_avg, exp_avg_sq;
};

inline DoubleWeight step_in_double(const UpdateSettings& settings, double lr, int64_t step,
                                   double grad, DoubleWeight before) {
  const auto& [weight, exp_avg, exp_avg_sq] = before;
  const double beta1 = settings.beta1, beta2 = settings.beta2;
  if (settings.rule == UpdateRule::kSgd) {
    const double momentum = beta1 * exp_avg + grad + settings.weight_decay * weight;
    return {weight - lr * momentum, momentum, exp_avg_sq};
  }
  const double decayed = weight * (1.0 - lr * settings.weight_decay);
  const double mean = beta1 * exp_avg + (1.0 - beta1) * grad;
  if (settings.rule == UpdateRule::kSignum) {
    const double sign = mean > 0.0 ? 1.0 : mean < 0.0 ? -1.0 : 0.0;
    return {decayed - lr * sign, mean, exp_avg_sq};
  }
  const double square = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad;
  const double bias_correction1 = 1.0 - std::pow(beta1, step);
  const double bias_correction2 = 1.0 - std::pow(beta2, step);
  const double root = std::sqrt(square / bias_correction2);
  return {decayed - lr / bias_correction1 * mean / (root + settings.eps), mean, square};
}

}  // namespace sae_fast::testing
