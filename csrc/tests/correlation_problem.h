// Dense codes and the correlations of all pairs of their latents in double, for the CPU's kernels
// and for CUDA's.
#pragma once

#include <algorithm>

#include "tests/testing.h"

namespace sae_fast::testing {

struct CorrelationProblem {
  // With many latents a sum over them is made of parts.
  CorrelationProblem(Random& random, bool many, int64_t most_tokens)
      : N(many ? random.integer(1, 12) : random.integer(1, most_tokens)),
        F(many ? random.integer(600, 1100) : random.integer(1, 120)),
        split(random.integer(0, 2) == 0 ? F : random.integer(0, F)),
        h(random.numbers(N * F, Numbers::kNormal)) {
    // Latents that never fire, that never change, that are small, that mostly do not fire.
    for (int64_t j = 0; j < F; ++j) {
      const int64_t kind = random.integer(0, 7);
      for (int64_t n = 0; n < N; ++n) {
        float& value = h[static_cast<size_t>(n * F + j)];
        if (kind == 0) value = 0.0f;
        if (kind == 1) value = 3e3f;
        if (kind == 2) value *= 1e-4f;
        if (kind == 3) value = random.integer(0, 9) == 0 ? value : 0.0f;
      }
    }
    for (int64_t j = 0; j < F; ++j) add_unit(j);
  }

  int64_t groups() const { return split < F ? 2 : 1; }
  int64_t group_of(int64_t j) const { return j < split ? 0 : 1; }
  double correlation(int64_t i, int64_t j) const {
    double sum = 0.0;
    for (int64_t n = 0; n < N; ++n) sum += unit(n, i) * unit(n, j);
    return sum;
  }
  double unit(int64_t n, int64_t j) const { return units[static_cast<size_t>(j * N + n)]; }

  int64_t N, F, split;
  std::vector<float> h;       // [N][F]
  std::vector<double> units;  // [F][N]: columns less their mean, at unit length; zeros where silent
  std::vector<double> inverse_norms;
  int64_t n_active[2] = {};

 private:
  void add_unit(int64_t j) {
    double mean = 0.0, whole = 0.0, square = 0.0;
    for (int64_t n = 0; n < N; ++n) mean += at(n, j) / static_cast<double>(N);
    for (int64_t n = 0; n < N; ++n) {
      whole += at(n, j) * at(n, j);
      square += (at(n, j) - mean) * (at(n, j) - mean);
    }
    const bool silent = square <= whole * 0x1p-40;
    const double inverse = silent ? 0.0 : 1.0 / std::sqrt(square);
    for (int64_t n = 0; n < N; ++n) units.push_back((at(n, j) - mean) * inverse);
    inverse_norms.push_back(inverse);
    n_active[group_of(j)] += silent ? 0 : 1;
  }
  double at(int64_t n, int64_t j) const {
    return static_cast<double>(h[static_cast<size_t>(n * F + j)]);
  }
};

// The results of the kernels.
struct CorrelationResult {
  double within, between;
  int64_t n_active[2];
  std::vector<float> grad_h;  // of grad_within * within + grad_between * between
};

// Compares with the sums over all pairs, to a tolerance relative to them; the gradients of the two
// sums, 0 where there is none.
inline void check_correlation(const CorrelationProblem& p, const CorrelationResult& result,
                              double grad_within, double grad_between, double tolerance) {
  double sums[2] = {};
  for (int64_t j = 0; j < p.F; ++j) {
    // 4 or 2 times the sum of correlation * z, less its part along z, times 1 / |h - mean|.
    std::vector<double> sum(static_cast<size_t>(p.N));
    double along = 0.0, size = 0.0;
    for (int64_t i = 0; i < p.F; ++i) {
      if (i == j || (p.group_of(i) == 1 && p.group_of(j) == 1)) continue;
      const double correlation = p.correlation(i, j);
      const bool same_group = p.group_of(i) == p.group_of(j);
      const double factor = same_group ? 4.0 * grad_within : 2.0 * grad_between;
      sums[same_group ? 0 : 1] += correlation * correlation * (same_group ? 1.0 : 0.5);
      along += factor * correlation * correlation;
      size += std::fabs(factor * correlation) + std::fabs(factor) / static_cast<double>(p.N);
      for (int64_t n = 0; n < p.N; ++n) {
        sum[static_cast<size_t>(n)] += factor * correlation * p.unit(n, i);
      }
    }
    const double inverse = p.inverse_norms[static_cast<size_t>(j)];
    for (int64_t n = 0; n < p.N; ++n) {
      const double wanted = inverse * (sum[static_cast<size_t>(n)] - along * p.unit(n, j));
      const auto found = static_cast<double>(result.grad_h[static_cast<size_t>(n * p.F + j)]);
      const double own = 4.0 * std::fabs(grad_within) + 2.0 * std::fabs(grad_between);
      check(std::fabs(found - wanted) <= tolerance * inverse * (size + own),
            "latent %ld: gradient %.9g of its correlations, not %.9g", j, found, wanted);
    }
  }
  const double within = sums[0], between = sums[1];
  const auto active = static_cast<double>(p.n_active[0]);
  check(std::fabs(result.within - within) <= tolerance * (within + active),
        "correlations within a group: %.9g, not %.9g", result.within, within);
  check(std::fabs(result.between - between) <= tolerance * (between + active),
        "correlations between groups: %.9g, not %.9g", result.between, between);
  check(result.n_active[0] == p.n_active[0] && result.n_active[1] == p.n_active[1],
        "%ld and %ld latents are active, not %ld and %ld", result.n_active[0], result.n_active[1],
        p.n_active[0], p.n_active[1]);
}

}  // namespace sae_fast::testing
