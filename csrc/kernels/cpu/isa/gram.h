// The Gram matrix S = ÛᵀÛ [size, size] of a tall matrix of rows, each brought to unit length: sums
// of squared cosines between all pairs of rows are |S|², whatever the number of rows.
#pragma once

#include "kernels/cpu/isa/product.h"

namespace sae_fast::SAE_FAST_ISA {

constexpr int64_t kStepsPerSum = 512;  // rows summed in float before the sum goes to double

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

// Columns [0, groups * kGroup) of the same rows in groups of kGroup: to[group][step][kGroup].
// `scaled` is scratch for one row.
inline void pack_unit_groups(const UnitRows& unit, int64_t begin, int64_t steps, int64_t groups,
                             float* scaled, float* to) {
  const int64_t columns = groups * kGroup < unit.size ? groups * kGroup : unit.size;
  for (int64_t c = columns; c < groups * kGroup; ++c) scaled[c] = 0.0f;
  for (int64_t step = 0; step < steps; ++step) {
    const float* row = unit.rows + (begin + step) * unit.size;
    const float inverse = unit.inverse[begin + step];
    for (int64_t c = 0; c < columns; ++c) scaled[c] = row[c] * inverse;
    for (int64_t group = 0; group < groups; ++group) {
      std::memcpy(to + (group * steps + step) * kGroup, scaled + group * kGroup,
                  kGroup * sizeof(float));
    }
  }
}

// Adds the part of S that rows [begin, end) make to a panel of it, S[padded][padded]: the panel's
// columns, rows down to its end (the rest is the transpose).
inline void gram_panel(const UnitRows& unit, int64_t begin, int64_t end, int64_t panel,
                       float* scratch, double* S) {
  const int64_t rows = (panel + 1) * kPanel;
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  float* columns = scratch;
  float* left = columns + kStepsPerSum * kPanel;
  float* tile = left + kStepsPerSum * groups * kGroup;
  float* scaled = tile + groups * kGroup * kPanel;
  for (; begin < end; begin += kStepsPerSum) {
    const int64_t steps = end - begin < kStepsPerSum ? end - begin : kStepsPerSum;
    pack_unit_panel(unit, begin, steps, panel * kPanel, columns);
    pack_unit_groups(unit, begin, steps, groups, scaled, left);
    multiply_panel(left, groups * kGroup, columns, steps, tile);
    for (int64_t row = 0; row < rows; ++row) {
      double* to = S + row * unit.padded() + panel * kPanel;
      for (int64_t c = 0; c < kPanel; ++c) to[c] += static_cast<double>(tile[row * kPanel + c]);
    }
  }
}

inline int64_t gram_scratch_floats(const UnitRows& unit) {
  const int64_t groups = (unit.padded() + kGroup - 1) / kGroup;
  return kStepsPerSum * (kPanel + groups * kGroup) + (groups * kGroup) * (kPanel + 1);
}

}  // namespace sae_fast::SAE_FAST_ISA
