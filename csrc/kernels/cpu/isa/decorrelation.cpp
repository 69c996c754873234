// The decoder's decorrelation penalty by its D x D Gram matrix, never the F x F one:
// sum over i != j of (ŵ_i·ŵ_j)² = |ŴᵀŴ|² - (number of rows), and its gradient for ŵ_j is 4 ŴᵀŴ ŵ_j
// up to a part along ŵ_j, which the normalisation removes.
#include "kernels/cpu/isa/gram.h"
#include "kernels/cpu/isa/kernels.h"
#include "kernels/cpu/isa/tasks.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

constexpr int64_t kBlock = 192;  // rows of W at once in the norms and in the gradient

// 1 / |w_j|; 0 for a row of zeros.
void inverse_norms(const float* W, int64_t d_sae, int64_t d_in, float* inverse,
                   const cpu::Parallel& parallel) {
  const int64_t tasks = (d_sae + kBlock - 1) / kBlock;
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t end = (task + 1) * kBlock < d_sae ? (task + 1) * kBlock : d_sae;
    for (int64_t j = task * kBlock; j < end; ++j) {
      const float norm = std::sqrt(dot(W + j * d_in, W + j * d_in, d_in));
      inverse[j] = norm > 0.0f ? 1.0f / norm : 0.0f;
    }
  });
}

// Fills the part of S below its upper panels, and S in packed panels of floats for the gradient.
double finish_gram(const UnitRows& unit, double* S, float* packed) {
  const int64_t padded = unit.padded();
  double squares = 0.0;
  for (int64_t row = 0; row < padded; ++row) {
    for (int64_t c = 0; c < padded; ++c) {
      if (row / kPanel > c / kPanel) S[row * padded + c] = S[c * padded + row];
      const double value = S[row * padded + c];
      squares += value * value;
      if (row < unit.size) {
        packed[(c / kPanel) * unit.size * kPanel + row * kPanel + c % kPanel] =
            static_cast<float>(value);
      }
    }
  }
  return squares;
}

// Gradient rows [first, first + count): (4 / |w|) (p - (p·ŵ) ŵ) with p = S ŵ.
void gradient_block(const UnitRows& unit, const float* packed, int64_t first, int64_t count,
                    float* scratch, float* grad) {
  const int64_t d_in = unit.size;
  float* left = scratch;
  float* tile = left + kBlock * d_in;
  for (int64_t row = 0; row < count; ++row) {
    const float* from = unit.rows + (first + row) * d_in;
    const float inverse = unit.inverse[first + row];
    float* to = left + (row / kGroup) * kGroup * d_in + row % kGroup;
    for (int64_t i = 0; i < d_in; ++i) to[i * kGroup] = from[i] * inverse;
  }
  for (int64_t panel = 0; panel < unit.panels(); ++panel) {
    multiply_panel(left, count, packed + panel * d_in * kPanel, d_in, tile);
    const int64_t width = d_in - panel * kPanel < kPanel ? d_in - panel * kPanel : kPanel;
    for (int64_t row = 0; row < count; ++row) {
      std::memcpy(grad + (first + row) * d_in + panel * kPanel, tile + row * kPanel,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }
  for (int64_t row = first; row < first + count; ++row) {
    const float* w = unit.rows + row * d_in;
    const float inverse = unit.inverse[row];
    float* to = grad + row * d_in;
    const float along = dot(to, w, d_in) * inverse * inverse;
    const float scale = 4.0f * inverse;
    for (int64_t i = 0; i < d_in; ++i) to[i] = scale * (to[i] - along * w[i]);
  }
}

}  // namespace

bool decorrelation(const float* W, int64_t d_sae, int64_t d_in, double* loss, float* grad,
                   const cpu::Parallel& parallel) {
  Scratch inverse(d_sae * 4);
  if (!inverse) return false;
  const UnitRows unit{W, inverse.as<float>(), d_sae, d_in};
  const int64_t threads = parallel.threads();
  const int64_t block = kBlock * (d_in + kPanel);
  const int64_t floats = kGramScratchFloats > block ? kGramScratchFloats : block;
  Scratch sums(unit.padded() * unit.padded() * 8);
  Scratch packed(unit.padded() * d_in * 4);
  Scratch scratch(threads * floats * 4);
  if (!sums || !packed || !scratch) return false;
  auto* S = sums.as<double>();
  std::memset(S, 0, static_cast<size_t>(unit.padded() * unit.padded()) * sizeof(double));
  inverse_norms(W, d_sae, d_in, inverse.as<float>(), parallel);
  SharedLoop panels(unit.panels(), 1);
  parallel.for_each(threads, [&](int64_t thread) {
    for (int64_t number; panels.take(number);) {
      const int64_t panel = unit.panels() - 1 - number;  // the longest panels first
      gram_panel(unit, 0, d_sae, panel, scratch.as<float>(thread * floats * 4), S);
    }
  });
  *loss = finish_gram(unit, S, packed.as<float>());
  for (int64_t j = 0; j < d_sae; ++j) *loss -= unit.inverse[j] > 0.0f ? 1.0 : 0.0;
  SharedLoop blocks(d_sae, kBlock);
  parallel.for_each(threads, [&](int64_t thread) {
    for (int64_t first; blocks.take(first);) {
      gradient_block(unit, packed.as<float>(), first, blocks.end(first) - first,
                     scratch.as<float>(thread * floats * 4), grad);
    }
  });
  return true;
}

}  // namespace sae_fast::SAE_FAST_ISA
