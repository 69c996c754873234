// The gradient of the squared correlations (correlation.cpp). For a unit latent z it is a matrix of
// tokens times z, less the part along z, which is the normalisation's:
//   within a group    4 K z
//   between groups    2 K z with the other group's K
#include "kernels/cpu/isa/active_latents.h"
#include "kernels/cpu/isa/kernels.h"
#include "kernels/cpu/isa/tasks.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

constexpr int64_t kRows = 192;  // tokens at once in a product

// `of_own` times a matrix and `of_other` times another, either null for none, less the mean of the
// diagonal, which is along z in the product with z and would only cost accuracy there: packed for
// a product, to[group of tokens][token][kGroup].
struct Mixture {
  const float* own;
  const float* other;
  double of_own, of_other;

  double at(int64_t element) const {
    return (own != nullptr ? of_own * static_cast<double>(own[element]) : 0.0) +
           (other != nullptr ? of_other * static_cast<double>(other[element]) : 0.0);
  }
  void pack(int64_t size, float* to, const cpu::Parallel& parallel) const {
    double trace = 0.0;
    for (int64_t n = 0; n < size; ++n) trace += at(n * size + n);
    const double mean = trace / static_cast<double>(size);
    parallel.for_each(size, [&](int64_t row) {
      float* column = to + row / kGroup * kGroup * size + row % kGroup;
      for (int64_t m = 0; m < size; ++m) {
        const double value = at(row * size + m) - (m == row ? mean : 0.0);
        column[m * kGroup] = static_cast<float>(value);
      }
    });
  }
};

// Gradient columns of some latents from p = matrix · z, both [panel][tokens][kPanel]:
// (1 / |h - mean|) (p - (p·z) z).
void write_gradient(const cpu::GroupedCodes& codes, const Latents& latents, const float* z,
                    const float* p, float* grad_h) {
  float along[kBlock];
  for (int64_t panel = 0; panel < latents.panels(); ++panel) {
    double sums[kPanel] = {};
    const float* column_z = z + panel * codes.tokens * kPanel;
    const float* column_p = p + panel * codes.tokens * kPanel;
    for (int64_t i = 0; i < codes.tokens * kPanel; i += kPanel) {
      for (int64_t c = 0; c < kPanel; ++c) {
        sums[c] += static_cast<double>(column_p[i + c]) * static_cast<double>(column_z[i + c]);
      }
    }
    for (int64_t c = 0; c < kPanel; ++c) along[panel * kPanel + c] = static_cast<float>(sums[c]);
  }
  for (int64_t n = 0; n < codes.tokens; ++n) {
    for (int64_t panel = 0; panel < latents.panels(); ++panel) {
      const int64_t first = panel * kPanel;
      const int64_t width = latents.end_of(panel) - first;
      const float* zn = z + (panel * codes.tokens + n) * kPanel;
      const float* pn = p + (panel * codes.tokens + n) * kPanel;
      float result[kPanel];
      for (int64_t c = 0; c < width; ++c) {
        result[c] = latents.inverse[first + c] * (pn[c] - along[first + c] * zn[c]);
      }
      float* to = grad_h + n * codes.d_sae;
      if (latents.neighbours(first, first + width)) {
        std::memcpy(to + latents.at[first], result, static_cast<size_t>(width) * sizeof(float));
      } else {
        for (int64_t c = 0; c < width; ++c) to[latents.at[first + c]] = result[c];
      }
    }
  }
}

// The gradient of some active latents; `scratch` holds their z and p.
void gradient_block(const cpu::GroupedCodes& codes, const Latents& latents, const float* matrix,
                    float* scratch, float* grad_h) {
  const int64_t N = codes.tokens;
  float* z = scratch;
  float* p = scratch + kBlock * N;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t panel = 0; panel < latents.panels(); ++panel) {
      latents.load_unit(codes.h + n * codes.d_sae, panel, z + (panel * N + n) * kPanel);
    }
  }
  for (int64_t row = 0; row < N; row += kRows) {
    const int64_t rows = N - row < kRows ? N - row : kRows;
    for (int64_t panel = 0; panel < latents.panels(); ++panel) {
      multiply_panel(matrix + row * N, rows, z + panel * N * kPanel, N,
                     p + (panel * N + row) * kPanel);
    }
  }
  write_gradient(codes, latents, z, p, grad_h);
}

// The gradient of the active latents of a group.
void group_gradient(const cpu::CorrelationGradient& gradient, const float* matrix,
                    const int64_t* latents, int64_t count, const Scratch& scratch, float* grad_h,
                    const cpu::Parallel& parallel) {
  const int64_t bytes = 2 * kBlock * gradient.codes.tokens * 4;
  SharedLoop blocks(count, kBlock);
  parallel.for_each(parallel.threads(), [&](int64_t thread) {
    for (int64_t first; blocks.take(first);) {
      const Latents some(latents + first, count - first, gradient.means, gradient.inverse_norms);
      gradient_block(gradient.codes, some, matrix, scratch.as<float>(thread * bytes), grad_h);
    }
  });
}

}  // namespace

bool code_correlation_backward(const cpu::CorrelationGradient& gradient, float* grad_h,
                               const cpu::Parallel& parallel) {
  const cpu::GroupedCodes& codes = gradient.codes;
  const int64_t N = codes.tokens;
  const bool two = codes.groups() == 2 && gradient.grad_between != nullptr;
  const bool one = two || gradient.grad_within != nullptr;
  Scratch active(codes.d_sae * 8);
  Scratch matrix((N + kGroup - 1) / kGroup * kGroup * N * 4);
  Scratch scratch(parallel.threads() * 2 * kBlock * N * 4);
  if (!active || !matrix || !scratch) return false;
  auto* latents = active.as<int64_t>();
  const int64_t first =
      one ? list_active(gradient.inverse_norms, 0, codes.split, latents) : int64_t{0};
  const int64_t second =
      two ? list_active(gradient.inverse_norms, codes.split, codes.d_sae, latents + first)
          : int64_t{0};
  if (first + second < codes.d_sae) {
    parallel.for_each(N, [&](int64_t row) {
      std::memset(grad_h + row * codes.d_sae, 0, static_cast<size_t>(codes.d_sae) * sizeof(float));
    });
  }
  const double within = gradient.grad_within != nullptr ? 4.0 * *gradient.grad_within : 0.0;
  const double between = two ? 2.0 * *gradient.grad_between : 0.0;
  if (first > 0) {
    const Mixture own{gradient.grad_within != nullptr ? gradient.gram : nullptr,
                      two ? gradient.gram + N * N : nullptr, within, between};
    own.pack(N, matrix.as<float>(), parallel);
    group_gradient(gradient, matrix.as<float>(), latents, first, scratch, grad_h, parallel);
  }
  if (second > 0) {
    const Mixture other{nullptr, gradient.gram, 0.0, between};
    other.pack(N, matrix.as<float>(), parallel);
    group_gradient(gradient, matrix.as<float>(), latents + first, second, scratch, grad_h,
                   parallel);
  }
  return true;
}

}  // namespace sae_fast::SAE_FAST_ISA
