// The decoder's decorrelation penalty by its D x D Gram matrix, never the F x F one:
// sum over i != j of (ŵ_i·ŵ_j)² = |ŴᵀŴ|² - (number of rows), and its gradient for ŵ_j is 4 ŴᵀŴ ŵ_j
// up to a part along ŵ_j, which the normalisation removes.
#include "kernels/cpu/isa/product.h"
#include "kernels/cpu/isa/rows.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

constexpr int64_t kStepsPerSum = 512;  // rows of W summed in float before the sum goes to double
constexpr int64_t kBlock = 192;        // rows of W at once in the gradient

struct Shape {
  int64_t d_sae, d_in;
  int64_t panels() const { return (d_in + kPanel - 1) / kPanel; }
  int64_t padded() const { return panels() * kPanel; }
};

// 1 / |w_j|; 0 for a row of zeros.
void inverse_norms(const float* W, const Shape& shape, float* inverse,
                   const cpu::Parallel& parallel) {
  const int64_t tasks = (shape.d_sae + kBlock - 1) / kBlock;
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t end = (task + 1) * kBlock < shape.d_sae ? (task + 1) * kBlock : shape.d_sae;
    for (int64_t j = task * kBlock; j < end; ++j) {
      const float norm = std::sqrt(dot(W + j * shape.d_in, W + j * shape.d_in, shape.d_in));
      inverse[j] = norm > 0.0f ? 1.0f / norm : 0.0f;
    }
  });
}

// Columns [first, first + kPanel) of unit rows [begin, begin + steps), one operand of a product:
// to[step][kPanel], zeros where there is no such column.
void pack_unit_panel(const float* W, const float* inverse, const Shape& shape, int64_t begin,
                     int64_t steps, int64_t first, float* to) {
  const int64_t live = shape.d_in - first < kPanel ? shape.d_in - first : kPanel;
  for (int64_t step = 0; step < steps; ++step) {
    const float* row = W + (begin + step) * shape.d_in + first;
    for (int64_t c = 0; c < live; ++c) to[step * kPanel + c] = row[c] * inverse[begin + step];
    for (int64_t c = live; c < kPanel; ++c) to[step * kPanel + c] = 0.0f;
  }
}

// Columns [0, groups * kGroup) of the same rows in groups of kGroup: to[group][step][kGroup].
// `scaled` is scratch for one row.
void pack_unit_groups(const float* W, const float* inverse, const Shape& shape, int64_t begin,
                      int64_t steps, int64_t groups, float* scaled, float* to) {
  const int64_t columns = groups * kGroup < shape.d_in ? groups * kGroup : shape.d_in;
  for (int64_t c = columns; c < groups * kGroup; ++c) scaled[c] = 0.0f;
  for (int64_t step = 0; step < steps; ++step) {
    const float* row = W + (begin + step) * shape.d_in;
    for (int64_t c = 0; c < columns; ++c) scaled[c] = row[c] * inverse[begin + step];
    for (int64_t group = 0; group < groups; ++group) {
      std::memcpy(to + (group * steps + step) * kGroup, scaled + group * kGroup,
                  kGroup * sizeof(float));
    }
  }
}

// Panel of S = ŴᵀŴ: columns of the panel, rows down to its end (the rest is the transpose).
void gram_panel(const float* W, const float* inverse, const Shape& shape, int64_t panel,
                float* scratch, double* S) {
  const int64_t rows = (panel + 1) * kPanel;
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  float* columns = scratch;
  float* left = columns + kStepsPerSum * kPanel;
  float* tile = left + kStepsPerSum * groups * kGroup;
  float* scaled = tile + groups * kGroup * kPanel;
  for (int64_t begin = 0; begin < shape.d_sae; begin += kStepsPerSum) {
    const int64_t steps = shape.d_sae - begin < kStepsPerSum ? shape.d_sae - begin : kStepsPerSum;
    pack_unit_panel(W, inverse, shape, begin, steps, panel * kPanel, columns);
    pack_unit_groups(W, inverse, shape, begin, steps, groups, scaled, left);
    multiply_panel(left, groups * kGroup, columns, steps, tile);
    for (int64_t row = 0; row < rows; ++row) {
      double* to = S + row * shape.padded() + panel * kPanel;
      for (int64_t c = 0; c < kPanel; ++c) to[c] += static_cast<double>(tile[row * kPanel + c]);
    }
  }
}

int64_t gram_scratch_floats(const Shape& shape) {
  const int64_t groups = (shape.padded() + kGroup - 1) / kGroup;
  return kStepsPerSum * (kPanel + groups * kGroup) + (groups * kGroup) * (kPanel + 1);
}

// Fills the part of S below its upper panels, and S in packed panels of floats for the gradient.
double finish_gram(const Shape& shape, double* S, float* packed) {
  const int64_t padded = shape.padded();
  double squares = 0.0;
  for (int64_t row = 0; row < padded; ++row) {
    for (int64_t c = 0; c < padded; ++c) {
      if (row / kPanel > c / kPanel) S[row * padded + c] = S[c * padded + row];
      const double value = S[row * padded + c];
      squares += value * value;
      if (row < shape.d_in) {
        packed[(c / kPanel) * shape.d_in * kPanel + row * kPanel + c % kPanel] =
            static_cast<float>(value);
      }
    }
  }
  return squares;
}

// Gradient rows [first, first + count): (4 / |w|) (p - (p·ŵ) ŵ) with p = S ŵ.
void gradient_block(const float* W, const float* inverse, const Shape& shape, const float* packed,
                    int64_t first, int64_t count, float* scratch, float* grad) {
  float* left = scratch;
  float* tile = left + kBlock * shape.d_in;
  for (int64_t row = 0; row < count; ++row) {
    const float* from = W + (first + row) * shape.d_in;
    float* to = left + (row / kGroup) * kGroup * shape.d_in + row % kGroup;
    for (int64_t i = 0; i < shape.d_in; ++i) to[i * kGroup] = from[i] * inverse[first + row];
  }
  for (int64_t panel = 0; panel < shape.panels(); ++panel) {
    multiply_panel(left, count, packed + panel * shape.d_in * kPanel, shape.d_in, tile);
    const int64_t width =
        shape.d_in - panel * kPanel < kPanel ? shape.d_in - panel * kPanel : kPanel;
    for (int64_t row = 0; row < count; ++row) {
      std::memcpy(grad + (first + row) * shape.d_in + panel * kPanel, tile + row * kPanel,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }
  for (int64_t row = first; row < first + count; ++row) {
    const float* w = W + row * shape.d_in;
    float* to = grad + row * shape.d_in;
    const float along = dot(to, w, shape.d_in) * inverse[row] * inverse[row];
    const float scale = 4.0f * inverse[row];
    for (int64_t i = 0; i < shape.d_in; ++i) to[i] = scale * (to[i] - along * w[i]);
  }
}

}  // namespace

bool decorrelation(const float* W, int64_t d_sae, int64_t d_in, double* loss, float* grad,
                   const cpu::Parallel& parallel) {
  const Shape shape{d_sae, d_in};
  const int64_t threads = parallel.threads();
  const int64_t gram = gram_scratch_floats(shape);
  const int64_t block = kBlock * (d_in + kPanel);
  const int64_t floats = gram > block ? gram : block;
  Scratch sums(shape.padded() * shape.padded() * 8);
  Scratch packed(shape.padded() * d_in * 4);
  Scratch inverse(d_sae * 4);
  Scratch scratch(threads * floats * 4);
  if (!sums || !packed || !inverse || !scratch) return false;
  auto* S = sums.as<double>();
  auto* inverses = inverse.as<float>();
  std::memset(S, 0, static_cast<size_t>(shape.padded() * shape.padded()) * sizeof(double));
  inverse_norms(W, shape, inverses, parallel);
  int64_t next = 0;
  parallel.for_each(threads, [&](int64_t thread) {
    for (;;) {  // the longest panels first
      const int64_t panel = shape.panels() - 1 - __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (panel < 0) return;
      gram_panel(W, inverses, shape, panel, scratch.as<float>(thread * floats * 4), S);
    }
  });
  *loss = finish_gram(shape, S, packed.as<float>());
  for (int64_t j = 0; j < d_sae; ++j) *loss -= inverses[j] > 0.0f ? 1.0 : 0.0;
  next = 0;
  parallel.for_each(threads, [&](int64_t thread) {
    for (;;) {
      const int64_t first = __atomic_fetch_add(&next, kBlock, __ATOMIC_RELAXED);
      if (first >= d_sae) return;
      const int64_t count = d_sae - first < kBlock ? d_sae - first : kBlock;
      gradient_block(W, inverses, shape, packed.as<float>(), first, count,
                     scratch.as<float>(thread * floats * 4), grad);
    }
  });
  return true;
}

}  // namespace sae_fast::SAE_FAST_ISA
