// The Gram matrix S = ÛᵀÛ [size, size] of a tall matrix of rows, each brought to unit length: sums
// of squared cosines between all pairs of rows are |S|², whatever the number of rows.
#pragma once

#include "kernels/cpu/isa/product.h"

namespace sae_fast::SAE_FAST_ISA {

constexpr int64_t kStepsPerSum = 512;  // rows summed in float before the sum goes to double
constexpr int64_t kGramRows = 192;     // rows of S at once: both operands stay in the L2
static_assert(kGramRows % kGroup == 0, "whole groups");

struct UnitRows {
  const float* rows;     // [count][size]
  const float* inverse;  // [count]: 1 / length, or 0 for a row that counts nothing
  int64_t count, size;
  int64_t panels() const { return (size + kPanel - 1) / kPanel; }
  int64_t padded() const { return panels() * kPanel; }
};

// Columns [first, first + kPanel) of unit rows [begin, begin + steps), one operand of a product:
// to[step][kPanel], zeros where there is no such column.
inline void pack_unit_panel(const UnitRows& unit, int64_t begin, int64_t steps, int64_t first,
                            float* to) {
  const int64_t live = unit.size - first < kPanel ? unit.size - first : kPanel;
  for (int64_t step = 0; step < steps; ++step) {
    const float* row = unit.rows + (begin + step) * unit.size + first;
    const float inverse = unit.inverse[begin + step];
    for (int64_t c = 0; c < live; ++c) to[step * kPanel + c] = row[c] * inverse;
    for (int64_t c = live; c < kPanel; ++c) to[step * kPanel + c] = 0.0f;
  }
}

// Columns [first, first + groups * kGroup), at most kGramRows, of the same rows in groups of
// kGroup: to[group][step][kGroup]. Some steps at a time, so that whole cache lines of a group are
// written: the groups are a multiple of 4 KB apart, and evict each other.
inline void pack_unit_groups(const UnitRows& unit, int64_t begin, int64_t steps, int64_t first,
                             int64_t groups, float* to) {
  constexpr int64_t kSteps = 16;
  float scaled[kSteps][kGramRows];
  const int64_t columns = groups * kGroup;
  const int64_t live = unit.size - first < columns ? unit.size - first : columns;
  for (int64_t done = 0; done < steps; done += kSteps) {
    const int64_t some = steps - done < kSteps ? steps - done : kSteps;
    for (int64_t step = 0; step < some; ++step) {
      const float* row = unit.rows + (begin + done + step) * unit.size + first;
      const float inverse = unit.inverse[begin + done + step];
      for (int64_t c = 0; c < live; ++c) scaled[step][c] = row[c] * inverse;
      for (int64_t c = live; c < columns; ++c) scaled[step][c] = 0.0f;
    }
    for (int64_t group = 0; group < groups; ++group) {
      float* group_steps = to + (group * steps + done) * kGroup;
      for (int64_t step = 0; step < some; ++step) {
        std::memcpy(group_steps + step * kGroup, scaled[step] + group * kGroup,
                    kGroup * sizeof(float));
      }
    }
  }
}

// Adds the part of S that rows [begin, end) make to a panel of it, S[padded][padded]: the panel's
// columns, rows down to its end (the rest is the transpose).
inline void gram_panel(const UnitRows& unit, int64_t begin, int64_t end, int64_t panel,
                       float* scratch, double* S) {
  float* columns = scratch;
  float* left = columns + kStepsPerSum * kPanel;
  float* tile = left + kStepsPerSum * kGramRows;
  const int64_t rows = (panel + 1) * kPanel;
  for (; begin < end; begin += kStepsPerSum) {
    const int64_t steps = end - begin < kStepsPerSum ? end - begin : kStepsPerSum;
    pack_unit_panel(unit, begin, steps, panel * kPanel, columns);
    for (int64_t first = 0; first < rows; first += kGramRows) {
      const int64_t live = rows - first < kGramRows ? rows - first : kGramRows;
      pack_unit_groups(unit, begin, steps, first, (live + kGroup - 1) / kGroup, left);
      multiply_panel(left, live, columns, steps, tile);
      for (int64_t row = 0; row < live; ++row) {
        double* to = S + (first + row) * unit.padded() + panel * kPanel;
        for (int64_t c = 0; c < kPanel; ++c) to[c] += static_cast<double>(tile[row * kPanel + c]);
      }
    }
  }
}

constexpr int64_t kGramScratchFloats =
    kStepsPerSum * (kPanel + kGramRows) + int64_t{kGramRows} * kPanel;

}  // namespace sae_fast::SAE_FAST_ISA
