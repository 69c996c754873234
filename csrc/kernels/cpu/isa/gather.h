// Weighted sums of gathered rows, the inner loop of decoding and of gradients.
#pragma once

#include "kernels/cpu/encode.h"
#include "kernels/cpu/isa/simd.h"

namespace sae_fast::SAE_FAST_ISA {

// Accumulators that fit in registers beside the operands.
constexpr int kGatherVectors = kLanes == 16 ? 16 : 8;
constexpr int kGatherColumns = kGatherVectors * kLanes;

// to[0, d_in) = start + sum over entries of coefficients[i] * table[indices[i]], in entry order,
// column tile by column tile with the sums in registers. `start` may be null: zeros.
template <class T>
inline void gather_sum(const T* table, int64_t d_in, const int32_t* indices,
                       const float* coefficients, int64_t count, const float* start, float* to) {
  constexpr int64_t kAhead = 2;  // rows fetched before they are needed
  int64_t column = 0;
  for (; column + kGatherColumns <= d_in; column += kGatherColumns) {
    Vec sum[kGatherVectors];
    SAE_FAST_UNROLL
    for (int v = 0; v < kGatherVectors; ++v) {
      sum[v] = start != nullptr ? load(start + column + v * kLanes) : Vec{};
    }
    for (int64_t i = 0; i < count; ++i) {
      const T* row = table + indices[i] * d_in + column;
      if (i + kAhead < count) {
        prefetch_row(table + indices[i + kAhead] * d_in + column,
                     kGatherColumns * static_cast<int64_t>(sizeof(T)));
      }
      const Vec coefficient = broadcast(coefficients[i]);
      SAE_FAST_UNROLL
      for (int v = 0; v < kGatherVectors; ++v) sum[v] += coefficient * load(row + v * kLanes);
    }
    SAE_FAST_UNROLL
    for (int v = 0; v < kGatherVectors; ++v) store(to + column + v * kLanes, sum[v]);
  }
  for (; column < d_in; column += kLanes) {
    const int64_t width = d_in - column < kLanes ? d_in - column : kLanes;
    Vec sum = {};
    if (start != nullptr) sum = load_tail(start + column, width % kLanes);
    if (start != nullptr && width == kLanes) sum = load(start + column);
    for (int64_t i = 0; i < count; ++i) {
      const T* row = table + indices[i] * d_in + column;
      sum += broadcast(coefficients[i]) * (width == kLanes ? load(row) : load_tail(row, width));
    }
    store_tail(to + column, sum, width);
  }
}

// Calls function(T{}) for the element type of a table.
template <class Function>
inline bool with_element(cpu::Rows type, Function&& function) {
  switch (type) {
    case cpu::Rows::kBFloat16: return function(BFloat16{});
    case cpu::Rows::kFloat16: return function(Float16{});
    default: return function(0.0f);
  }
}

}  // namespace sae_fast::SAE_FAST_ISA
