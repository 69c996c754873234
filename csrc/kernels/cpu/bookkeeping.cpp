#include "kernels/cpu/bookkeeping.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

namespace sae_fast::cpu {
namespace {

constexpr int64_t kRows = 256;     // of x, that one task sums
constexpr int64_t kNumbers = 256;  // whose sum is added to the others'

template <class Term>
double blocked_sum(const float* numbers, int64_t count, Term&& term) {
  double total = 0.0;
  for (int64_t first = 0; first < count; first += kNumbers) {
    const int64_t end = std::min(first + kNumbers, count);
    double sum = 0.0;
    for (int64_t i = first; i < end; ++i) sum += term(static_cast<double>(numbers[i]));
    total += sum;
  }
  return total;
}

}  // namespace

bool total_variance(const float* x, int64_t rows, int64_t d_in, double* variance,
                    const Parallel& parallel) {
  // One pass, in double and relative to the first row: so the mean is not far from the origin, and
  // the difference of the squares' sum and the mean's square loses no digits that a float has.
  const int64_t tasks = (rows + kRows - 1) / kRows;
  std::vector<double> sums, squares;
  try {
    sums.assign(static_cast<size_t>(tasks * d_in), 0.0);
    squares.assign(static_cast<size_t>(tasks), 0.0);
  } catch (const std::bad_alloc&) {
    return false;
  }
  parallel.for_each(tasks, [&](int64_t task) {
    double* const own = sums.data() + task * d_in;
    double square = 0.0;
    for (int64_t row = task * kRows; row < std::min((task + 1) * kRows, rows); ++row) {
      const float* const numbers = x + row * d_in;
      double of_row = 0.0;
      for (int64_t d = 0; d < d_in; ++d) {
        const double moved = static_cast<double>(numbers[d]) - static_cast<double>(x[d]);
        own[d] += moved;
        of_row += moved * moved;
      }
      square += of_row;
    }
    squares[static_cast<size_t>(task)] = square;
  });
  double total = 0.0;
  for (const double square : squares) total += square;
  double centre = 0.0;
  for (int64_t d = 0; d < d_in; ++d) {
    double sum = 0.0;
    for (int64_t task = 0; task < tasks; ++task) sum += sums[static_cast<size_t>(task * d_in + d)];
    centre += sum * sum;
  }
  const double found = rows > 0 ? total - centre / static_cast<double>(rows) : NAN;
  *variance = found < 0.0 ? 0.0 : found;
  return true;
}

int64_t mark_fired(const float* values, const int32_t* indices, int64_t entries, bool is_signed,
                   int64_t d_sae, bool* fired) {
  std::fill_n(fired, d_sae, false);
  int64_t active = 0;
  for (int64_t entry = 0; entry < entries; ++entry) {
    const float amount = is_signed ? std::fabs(values[entry]) : values[entry];
    if (!(amount > 0.0f)) continue;
    fired[indices[entry]] = true;
    ++active;
  }
  return active;
}

double sum_of(const float* numbers, int64_t count) {
  return blocked_sum(numbers, count, [](double number) { return number; });
}

double square_sum(const float* numbers, int64_t count) {
  return blocked_sum(numbers, count, [](double number) { return number * number; });
}

void code_gradients(const CodeGradients& gradients, const Parallel& parallel) {
  constexpr int64_t kPart = 64;
  parallel.for_each((gradients.rows + kPart - 1) / kPart, [&](int64_t part) {
    for (int64_t n = part * kPart; n < std::min((part + 1) * kPart, gradients.rows); ++n) {
      const float scale = 2.0f * gradients.grad_error[n * gradients.grad_stride];
      gradients.scale[n] = scale;
      for (int64_t entry = n * gradients.k; entry < (n + 1) * gradients.k; ++entry) {
        gradients.grad_values[entry] = gradients.residual_dot[entry] * scale;
        gradients.coefficients[entry] = gradients.values[entry] * scale;
      }
    }
  });
}

void sum_row_parts(const float* partials, int64_t d_in, float factor, float* sum) {
  // Sixteen at a time, as torch sums a matrix over its rows.
  constexpr int64_t kGroup = 16;
  std::fill_n(sum, d_in, 0.0f);
  std::vector<float> group(static_cast<size_t>(d_in));
  for (int64_t first = 0; first < kRowParts; first += kGroup) {
    std::fill(group.begin(), group.end(), 0.0f);
    for (int64_t part = first; part < first + kGroup; ++part) {
      for (int64_t d = 0; d < d_in; ++d) {
        group[static_cast<size_t>(d)] += partials[part * d_in + d];
      }
    }
    for (int64_t d = 0; d < d_in; ++d) sum[d] += group[static_cast<size_t>(d)];
  }
  for (int64_t d = 0; d < d_in; ++d) sum[d] *= factor;
}

void count_silent(int64_t* tokens, const bool* fired, int64_t d_sae, int64_t n_tokens) {
  for (int64_t j = 0; j < d_sae; ++j) tokens[j] = fired[j] ? 0 : tokens[j] + n_tokens;
}

}  // namespace sae_fast::cpu
