// Squared correlations between latents' activations by the N x N Gram matrix of tokens, never the
// F x F one. With z_i [N] the activations of latent i less their mean, at unit length, and K the
// sum of z_i z_iᵀ over a group:
//   within a group    sum over i != j of (z_i·z_j)² = |K|² - (number of latents that are active)
//   between groups    sum over i in A, j in B of (z_i·z_j)² = <K_A, K_B>
// A silent latent counts in no sum: the cost of a sparse code depends on its active latents.
#include "kernels/cpu/isa/active_latents.h"
#include "kernels/cpu/isa/gram.h"
#include "kernels/cpu/isa/kernels.h"
#include "kernels/cpu/isa/tasks.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

constexpr int64_t kColumns = 256;   // latents whose moments a task takes
constexpr int64_t kTokens = 16;     // of a tile that is turned: a cache line of floats
constexpr int64_t kGramTasks = 64;  // where S has fewer panels, several tasks share one

// Means and lengths of latents [first, first + count). The second pass over them finds their
// columns in the cache.
void column_moments(const cpu::GroupedCodes& codes, int64_t first, int64_t count, double* means,
                    float* inverse_norms) {
  double sums[kColumns] = {};
  for (int64_t n = 0; n < codes.tokens; ++n) {
    const float* h = codes.h + n * codes.d_sae + first;
    for (int64_t c = 0; c < count; ++c) sums[c] += static_cast<double>(h[c]);
  }
  const double tokens = codes.tokens > 0 ? static_cast<double>(codes.tokens) : 1.0;
  for (int64_t c = 0; c < count; ++c) means[first + c] = sums[c] / tokens;
  double squares[kColumns] = {};
  for (int64_t n = 0; n < codes.tokens; ++n) {
    const float* h = codes.h + n * codes.d_sae + first;
    for (int64_t c = 0; c < count; ++c) {
      const double distance = static_cast<double>(h[c]) - means[first + c];
      squares[c] += distance * distance;
    }
  }
  for (int64_t c = 0; c < count; ++c) {
    inverse_norms[first + c] = inverse_length(squares[c], means[first + c], codes.tokens);
  }
}

// Unit latents as rows: to[count][tokens].
void turn_latents(const cpu::GroupedCodes& codes, const Latents& latents, float* to) {
  float tile[kTokens][kBlock];
  for (int64_t begin = 0; begin < codes.tokens; begin += kTokens) {
    const int64_t live = codes.tokens - begin < kTokens ? codes.tokens - begin : kTokens;
    for (int64_t n = 0; n < live; ++n) {
      const float* h = codes.h + (begin + n) * codes.d_sae;
      for (int64_t panel = 0; panel < latents.panels(); ++panel) {
        latents.load_unit(h, panel, tile[n] + panel * kPanel);
      }
    }
    for (int64_t c = 0; c < latents.count; ++c) {
      for (int64_t n = 0; n < live; ++n) to[c * codes.tokens + begin + n] = tile[n][c];
    }
  }
}

// Partial sums of S, each over a range of the rows that does not depend on the threads.
struct Parts {
  explicit Parts(const UnitRows& unit_rows) : unit(unit_rows) {
    const int64_t blocks = (unit.count + kStepsPerSum - 1) / kStepsPerSum;
    const int64_t wanted = kGramTasks / (unit.panels() > 0 ? unit.panels() : 1);
    count = wanted < blocks ? wanted : blocks;
    if (count < 1) count = 1;
    rows = (blocks + count - 1) / count * kStepsPerSum;
  }
  int64_t size() const { return unit.padded() * unit.padded(); }

  // Element (row, column) of S, of which only the upper panels are there.
  double at(const double* sums, int64_t row, int64_t column) const {
    const bool above = row / kPanel <= column / kPanel;
    const double* element =
        sums + (above ? row * unit.padded() + column : column * unit.padded() + row);
    double total = 0.0;
    for (int64_t part = 0; part < count; ++part) total += element[part * size()];
    return total;
  }
  UnitRows unit;
  int64_t count, rows;
};

// S in float, and |S|².
double finish_gram(const Parts& parts, const double* sums, double* row_squares, float* gram,
                   const cpu::Parallel& parallel) {
  const int64_t size = parts.unit.size;
  parallel.for_each(parts.unit.panels(), [&](int64_t panel) {
    const int64_t end = (panel + 1) * kPanel < size ? (panel + 1) * kPanel : size;
    for (int64_t row = panel * kPanel; row < end; ++row) row_squares[row] = 0.0;
    for (int64_t first = 0; first < size; first += kPanel) {  // tile by tile, for the cache
      const int64_t last = first + kPanel < size ? first + kPanel : size;
      for (int64_t row = panel * kPanel; row < end; ++row) {
        for (int64_t c = first; c < last; ++c) {
          const double value = parts.at(sums, row, c);
          row_squares[row] += value * value;
          gram[row * size + c] = static_cast<float>(value);
        }
      }
    }
  });
  double squares = 0.0;
  for (int64_t row = 0; row < size; ++row) squares += row_squares[row];
  return squares;
}

struct GramScratch {
  Scratch rows, inverse, sums, row_squares, panels;
};

// The Gram matrix of `count` active latents, and its squared length in `squares`. Returns false if
// memory ran out.
bool group_gram(const cpu::GroupedCodes& codes, const cpu::Correlation& result,
                const int64_t* latents, int64_t count, GramScratch& scratch, float* gram,
                double* squares, const cpu::Parallel& parallel) {
  const int64_t N = codes.tokens;
  if (!scratch.rows.reset(count * N * 4) || !scratch.inverse.reset(count * 4)) return false;
  auto* rows = scratch.rows.as<float>();
  auto* ones = scratch.inverse.as<float>();
  for (int64_t i = 0; i < count; ++i) ones[i] = 1.0f;
  parallel.for_each((count + kBlock - 1) / kBlock, [&](int64_t task) {
    const int64_t first = task * kBlock;
    const Latents some(latents + first, count - first, result.means, result.inverse_norms);
    turn_latents(codes, some, rows + first * N);
  });
  const Parts parts(UnitRows{rows, ones, count, N});
  if (!scratch.sums.reset(parts.count * parts.size() * 8) || !scratch.row_squares.reset(N * 8) ||
      !scratch.panels.reset(parallel.threads() * kGramScratchFloats * 4)) {
    return false;
  }
  auto* sums = scratch.sums.as<double>();
  const int64_t panels = parts.unit.panels();
  parallel.for_each(parts.count * parts.unit.padded(), [&](int64_t row) {
    std::memset(sums + row * parts.unit.padded(), 0,
                static_cast<size_t>(parts.unit.padded()) * sizeof(double));
  });
  SharedLoop tasks(parts.count * panels, 1);
  parallel.for_each(parallel.threads(), [&](int64_t thread) {
    auto* const thread_scratch = scratch.panels.as<float>(thread * kGramScratchFloats * 4);
    for (int64_t task; tasks.take(task);) {
      const int64_t panel = panels - 1 - task / parts.count;  // the longest first
      const int64_t begin = task % parts.count * parts.rows;
      const int64_t end = begin + parts.rows < count ? begin + parts.rows : count;
      gram_panel(parts.unit, begin, end, panel, thread_scratch,
                 sums + task % parts.count * parts.size());
    }
  });
  *squares = finish_gram(parts, sums, scratch.row_squares.as<double>(), gram, parallel);
  return true;
}

// <a, b> of two Gram matrices, row by row in double.
double matrix_dot(const float* a, const float* b, int64_t size, double* row_sums,
                  const cpu::Parallel& parallel) {
  parallel.for_each(size, [&](int64_t row) {
    double sum = 0.0;
    for (int64_t i = row * size; i < (row + 1) * size; ++i) {
      sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    }
    row_sums[row] = sum;
  });
  double total = 0.0;
  for (int64_t row = 0; row < size; ++row) total += row_sums[row];
  return total;
}

}  // namespace

bool code_correlation(const cpu::GroupedCodes& codes, cpu::Correlation& result,
                      const cpu::Parallel& parallel) {
  parallel.for_each((codes.d_sae + kColumns - 1) / kColumns, [&](int64_t task) {
    const int64_t first = task * kColumns;
    const int64_t count = codes.d_sae - first < kColumns ? codes.d_sae - first : kColumns;
    column_moments(codes, first, count, result.means, result.inverse_norms);
  });
  const int64_t N = codes.tokens;
  Scratch active(codes.d_sae * 8);
  if (!active) return false;
  GramScratch scratch;
  double squares[2] = {};
  for (int64_t group = 0; group < 2; ++group) {
    const int64_t first = group == 0 ? 0 : codes.split;
    const int64_t end = group == 0 ? codes.split : codes.d_sae;
    result.n_active[group] = list_active(result.inverse_norms, first, end, active.as<int64_t>());
    if (group == codes.groups()) break;
    if (!group_gram(codes, result, active.as<int64_t>(), result.n_active[group], scratch,
                    result.gram + group * N * N, &squares[group], parallel)) {
      return false;
    }
  }
  result.within = squares[0] - static_cast<double>(result.n_active[0]);
  result.between = 0.0;
  if (codes.groups() == 2) {
    result.between =
        matrix_dot(result.gram, result.gram + N * N, N, scratch.row_squares.as<double>(), parallel);
  }
  return true;
}

}  // namespace sae_fast::SAE_FAST_ISA
