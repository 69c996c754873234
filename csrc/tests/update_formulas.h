// The optimisers' formulas in double, as torch.optim.AdamW, torch.optim.SGD and the papers of
// Signum and of schedule-free learning give them: what kernels must agree with.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "kernels/common/update_rule.h"
#include "tests/testing.h"

namespace sae_fast::testing {

constexpr UpdateRule kRules[] = {UpdateRule::kAdam, UpdateRule::kSgd, UpdateRule::kSignum,
                                 UpdateRule::kScheduleFreeSignum};

inline UpdateRule any_rule(Random& random) {
  return kRules[random.integer(0, static_cast<int64_t>(std::size(kRules)) - 1)];
}

constexpr UpdateSettings some_settings(UpdateRule rule) {
  return {rule, 0.0, 0.9, 0.999, 1e-8, 0.01, false};
}

// Step number `step` of a run whose learning rate does not change.
inline UpdateStep some_update_step(const UpdateSettings& settings, double lr, int64_t step) {
  return make_update_step(settings, lr, step, static_cast<double>(step) * lr * lr);
}

// Returns true if rounding cannot decide the sign of a gradient, a sum of numbers of about 1.
inline bool has_clear_signs(UpdateRule rule, const std::vector<double>& gradient) {
  return rule != UpdateRule::kScheduleFreeSignum ||
         std::all_of(gradient.begin(), gradient.end(),
                     [](double g) { return g == 0.0 || std::fabs(g) > 1e-4; });
}

// A weight with its moments.
struct DoubleWeight {
  double weight, exp_avg, exp_avg_sq;
};

// The algorithm of the paper, with y in the weight and z - y in exp_avg.
inline DoubleWeight schedule_free_in_double(const UpdateSettings& settings, double lr, int64_t step,
                                            double grad, DoubleWeight before) {
  const double beta = settings.beta1, y = before.weight, z = y + before.exp_avg;
  const double x = (y - (1.0 - beta) * z) / beta;
  const double sign = grad > 0.0 ? 1.0 : grad < 0.0 ? -1.0 : 0.0;
  const double new_z = z - lr * (sign + settings.weight_decay * y);
  const double share = 1.0 / static_cast<double>(step);
  const double new_x = (1.0 - share) * x + share * new_z;
  const double new_y = (1.0 - beta) * new_z + beta * new_x;
  return {new_y, new_z - new_y, before.exp_avg_sq};
}

inline DoubleWeight step_in_double(const UpdateSettings& settings, double lr, int64_t step,
                                   double grad, DoubleWeight before) {
  const auto& [weight, exp_avg, exp_avg_sq] = before;
  if (settings.rule == UpdateRule::kScheduleFreeSignum) {
    return schedule_free_in_double(settings, lr, step, grad, before);
  }
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
