// Weighted sums of gathered rows, the inner loop of decoding and of gradients.
#pragma once

#include "kernels/cpu/encode.h"
#include "kernels/cpu/isa/simd.h"

namespace sae_fast::SAE_FAST_ISA {

// One tile of gather_sum: kVectors running sums in registers, starting at `column`.
template <int kVectors, class T>
inline void gather_tile(const T* table, int64_t d_in, const int32_t* indices,
                        const float* coefficients, int64_t count, const float* start,
                        int64_t column, float* to) {
  constexpr int64_t kAhead = 3;  // rows fetched before they are needed
  Vec sum[kVectors];
  SAE_FAST_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = start != nullptr ? load(start + column + v * kLanes) : Vec{};
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* row = table + indices[i] * d_in + column;
    if (i + kAhead < count) {
      prefetch_row(table + indices[i + kAhead] * d_in + column,
                   kVectors * kLanes * static_cast<int64_t>(sizeof(T)));
    }
    const Vec coefficient = broadcast(coefficients[i]);
    SAE_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[v] += coefficient * load(row + v * kLanes);
  }
  SAE_FAST_UNROLL
  for (int v = 0; v < kVectors; ++v) store(to + column + v * kLanes, sum[v]);
}

// to[0, d_in) = start + sum over entries of coefficients[i] * table[indices[i]], in entry order,
// column tile by column tile with the sums in registers. `start` may be null: zeros.
template <class T>
inline void gather_sum(const T* table, int64_t d_in, const int32_t* indices,
                       const float* coefficients, int64_t count, const float* start, float* to) {
  constexpr int kWide = kLanes == 16 ? 24 : 8;  // sums that fit in registers beside the operands
  int64_t column = 0;
  const auto tiles = [&](auto width) {
    constexpr int kVectors = decltype(width)::value;
    for (; column + kVectors * kLanes <= d_in; column += kVectors * kLanes) {
      gather_tile<kVectors>(table, d_in, indices, coefficients, count, start, column, to);
    }
  };
  tiles(std::integral_constant<int, kWide>{});
  tiles(std::integral_constant<int, 8>{});
  tiles(std::integral_constant<int, 4>{});
  tiles(std::integral_constant<int, 1>{});
  if (column == d_in) return;
  const int64_t width = d_in - column;
  Vec sum = start != nullptr ? load_tail(start + column, width) : Vec{};
  for (int64_t i = 0; i < count; ++i) {
    sum += broadcast(coefficients[i]) * load_tail(table + indices[i] * d_in + column, width);
  }
  store_tail(to + column, sum, width);
}

// Calls function(T{}) for the element type of a table.
template <class Function>
inline bool with_element(DType type, Function&& function) {
  switch (type) {
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
    default:
      return function(0.0f);
  }
}

}  // namespace sae_fast::SAE_FAST_ISA
