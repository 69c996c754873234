// The encoder's product X Wᵀ in tiles of kPanel latents, in 16-bit integers or in float: packing
// of both operands, the micro-kernels, and how far a product can be from the exact one.
//
// Integers, because one int16 multiply-add instruction does twice the work of a float one and sums
// without rounding. A row is scaled so that its quantised L2 norm stays below 2^15.5: by
// Cauchy-Schwarz no sum of products, nor any part of one, can leave int32. The error is the
// rounding of the two operands alone, about 1e-4 of |x||w|: a tenth of bfloat16's.
#pragma once

#include "kernels/cpu/isa/transpose.h"

namespace sae_fast::SAE_FAST_ISA {

constexpr int kPanel = 64;  // latents side by side in a packed panel

// A packed row stands for scale * integers. norm and error are upper bounds on |row| and on
// |row - scale * integers|; both are infinite where the row is not finite.
struct RowStats {
  float scale;
  float norm;
  float error;
};

// Upper bound on |row|: rounding of the sum of squares, and squares that underflow, included.
inline float norm_bound(const float* row, int64_t d_in) {
  Vec sum = {};
  int64_t i = 0;
  for (; i + kLanes <= d_in; i += kLanes) sum += load(row + i) * load(row + i);
  if (i < d_in) {
    const Vec tail = load_tail(row + i, d_in - i);
    sum += tail * tail;
  }
  const double size = static_cast<double>(d_in);
  const double norm = std::sqrt(static_cast<double>(reduce_add(sum)));
  const double bound = norm * (1.0 + (size / kLanes + 32.0) * 0x1p-24) + std::sqrt(size) * 2e-19;
  return bound < 1e18 ? static_cast<float>(bound * (1.0 + 0x1p-22)) : INFINITY;
}

inline float max_abs(const float* row, int64_t d_in) {
  Vec best = {};
  int64_t i = 0;
  for (; i + kLanes <= d_in; i += kLanes) best = vec_max(best, vec_abs(load(row + i)));
  if (i < d_in) best = vec_max(best, vec_abs(load_tail(row + i, d_in - i)));
  return reduce_max(best);
}

// Quantises a row to pairs of int16, the last of which is padded with zero.
inline RowStats quantize_row(const float* row, int64_t d_in, int32_t* pairs) {
  auto* to = reinterpret_cast<int16_t*>(pairs);
  const int64_t padded = (d_in + 1) / 2 * 2;
  const float norm = norm_bound(row, d_in);
  const double half_root = 0.5 * std::sqrt(static_cast<double>(d_in));
  const double limit = 46340.0 - half_root - 1.0;  // 46340² < 2^31
  if (!(norm < 1e18f) || norm < 1e-15f || limit < 1.0) {
    std::memset(pairs, 0, static_cast<size_t>(padded) * sizeof(int16_t));
    return {0.0f, norm, norm};
  }
  const double scale = std::fmax(norm / limit, max_abs(row, d_in) / 32766.0);
  const auto step = static_cast<float>(scale);
  const float inverse = 1.0f / step;
  for (int64_t i = 0; i < d_in; ++i) {
    to[i] = static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(row[i] * inverse)));
  }
  for (int64_t i = d_in; i < padded; ++i) to[i] = 0;
  float squares[16] = {};
  int64_t i = 0;
  for (; i + 16 <= d_in; i += 16) {
    for (int lane = 0; lane < 16; ++lane) {
      const float lost = row[i + lane] - step * static_cast<float>(to[i + lane]);
      squares[lane] += lost * lost;
    }
  }
  for (; i < d_in; ++i) {
    const float lost = row[i] - step * static_cast<float>(to[i]);
    squares[i % 16] += lost * lost;
  }
  double error = 0.0;
  for (const float square : squares) error += square;
  const double inflate = 1.0 + (static_cast<double>(d_in) / 16 + 32.0) * 0x1p-24;
  return {step, norm, static_cast<float>(std::sqrt(error) * inflate + norm * 0x1p-22 + 1e-19)};
}

constexpr int kGroup = 6;  // rows of x that a micro-kernel multiplies with a panel at once

// C[row][kPanel] (+)= A · B over `steps`: A packed [steps][kGroup], B packed [steps][kPanel].
template <int kRows>
inline void multiply_tile(const int32_t* a, const int32_t* b, int64_t steps, int32_t* c,
                          bool accumulate) {
#if defined(__AVX512BW__)
  __m512i sum[kRows][4];
  SAE_FAST_UNROLL
  for (int row = 0; row < kRows; ++row) {
    SAE_FAST_UNROLL
    for (int v = 0; v < 4; ++v) {
      sum[row][v] =
          accumulate ? _mm512_loadu_si512(c + row * kPanel + v * 16) : _mm512_setzero_si512();
    }
  }
  for (int64_t step = 0; step < steps; ++step, a += kGroup, b += kPanel) {
    __m512i columns[4];
    SAE_FAST_UNROLL
    for (int v = 0; v < 4; ++v) {
      columns[v] = _mm512_loadu_si512(b + v * 16);
      prefetch(b + 8 * kPanel + v * 16);  // the panel streams from L2
    }
    SAE_FAST_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const __m512i value = _mm512_set1_epi32(a[row]);
      SAE_FAST_UNROLL
      for (int v = 0; v < 4; ++v) {
#if defined(__AVX512VNNI__)
        sum[row][v] = _mm512_dpwssd_epi32(sum[row][v], columns[v], value);
#else
        sum[row][v] = _mm512_add_epi32(sum[row][v], _mm512_madd_epi16(columns[v], value));
#endif
      }
    }
  }
  SAE_FAST_UNROLL
  for (int row = 0; row < kRows; ++row) {
    SAE_FAST_UNROLL
    for (int v = 0; v < 4; ++v) _mm512_storeu_si512(c + row * kPanel + v * 16, sum[row][v]);
  }
#elif defined(__AVX2__)
  for (int column = 0; column < kPanel; column += 16) {
    __m256i sum[kRows][2];
    for (int row = 0; row < kRows; ++row) {
      for (int v = 0; v < 2; ++v) {
        const auto* from = reinterpret_cast<const __m256i*>(c + row * kPanel + column + v * 8);
        sum[row][v] = accumulate ? _mm256_loadu_si256(from) : _mm256_setzero_si256();
      }
    }
    for (int64_t step = 0; step < steps; ++step) {
      const auto* from = reinterpret_cast<const __m256i*>(b + step * kPanel + column);
      prefetch(b + (step + 8) * kPanel + column);
      const __m256i columns[2] = {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
      SAE_FAST_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const __m256i value = _mm256_set1_epi32(a[step * kGroup + row]);
        SAE_FAST_UNROLL
        for (int v = 0; v < 2; ++v) {
          sum[row][v] = _mm256_add_epi32(sum[row][v], _mm256_madd_epi16(columns[v], value));
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int v = 0; v < 2; ++v) {
        auto* to = reinterpret_cast<__m256i*>(c + row * kPanel + column + v * 8);
        _mm256_storeu_si256(to, sum[row][v]);
      }
    }
  }
#else
  const auto* a16 = reinterpret_cast<const int16_t*>(a);
  const auto* b16 = reinterpret_cast<const int16_t*>(b);
  for (int row = 0; row < kRows; ++row) {
    int32_t* to = c + row * kPanel;
    if (!accumulate) std::memset(to, 0, kPanel * sizeof(int32_t));
    for (int64_t step = 0; step < steps; ++step) {
      const int32_t first = a16[2 * (step * kGroup + row)];
      const int32_t second = a16[2 * (step * kGroup + row) + 1];
      const int16_t* columns = b16 + 2 * step * kPanel;
      for (int j = 0; j < kPanel; ++j) {
        to[j] += first * columns[2 * j] + second * columns[2 * j + 1];
      }
    }
  }
#endif
}

template <int kRows>
inline void multiply_tile(const float* a, const float* b, int64_t steps, float* c,
                          bool accumulate) {
  // As many columns at once as registers hold: 4 vectors of 16, or 2 of 8 or of 4.
  constexpr int kVectors = kLanes == 16 ? 4 : 2;
  for (int column = 0; column < kPanel; column += kVectors * kLanes) {
    Vec sum[kRows][kVectors];
    SAE_FAST_UNROLL
    for (int row = 0; row < kRows; ++row) {
      SAE_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[row][v] = accumulate ? load(c + row * kPanel + column + v * kLanes) : Vec{};
      }
    }
    const float* columns = b + column;
    for (int64_t step = 0; step < steps; ++step, columns += kPanel) {
      Vec values[kVectors];
      SAE_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        values[v] = load(columns + v * kLanes);
        prefetch(columns + 8 * kPanel + v * kLanes);
      }
      SAE_FAST_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const Vec value = broadcast(a[step * kGroup + row]);
        SAE_FAST_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[row][v] += value * values[v];
      }
    }
    SAE_FAST_UNROLL
    for (int row = 0; row < kRows; ++row) {
      SAE_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        store(c + row * kPanel + column + v * kLanes, sum[row][v]);
      }
    }
  }
}

template <class Element>
inline void multiply_group(int rows, const Element* a, const Element* b, int64_t steps, Element* c,
                           bool accumulate) {
  switch (rows) {
    case 6:
      return multiply_tile<6>(a, b, steps, c, accumulate);
    case 5:
      return multiply_tile<5>(a, b, steps, c, accumulate);
    case 4:
      return multiply_tile<4>(a, b, steps, c, accumulate);
    case 3:
      return multiply_tile<3>(a, b, steps, c, accumulate);
    case 2:
      return multiply_tile<2>(a, b, steps, c, accumulate);
    default:
      return multiply_tile<1>(a, b, steps, c, accumulate);
  }
}

// Steps of the product whose share of both operands stays in a 1 MB L2 beside the tile of sums.
inline int64_t steps_per_pass(int64_t steps, int64_t rows) {
  const int64_t fitting = int64_t{640} * 1024 / (4 * (rows + kPanel));
  if (fitting >= steps) return steps;
  const int64_t passes = (steps + fitting - 1) / fitting;
  return (steps + passes - 1) / passes;
}

// C [rows][kPanel] = rows of x, packed in groups, times one panel.
template <class Element>
inline void multiply_panel(const Element* groups, int64_t rows, const Element* panel, int64_t steps,
                           Element* c) {
  const int64_t pass = steps_per_pass(steps, rows);
  int64_t begin = 0;
  do {  // of no steps too, which make zeros
    const int64_t count = steps - begin < pass ? steps - begin : pass;
    for (int64_t row = 0; row < rows; row += kGroup) {
      const int live = static_cast<int>(rows - row < kGroup ? rows - row : kGroup);
      const Element* a = groups + (row * steps) + begin * kGroup;
      multiply_group(live, a, panel + begin * kPanel, count, c + row * kPanel, begin != 0);
    }
    begin += pass;
  } while (begin < steps);
}

// A product has the types of packed elements and of sums, and the functions that pack rows of x and
// multiply a block of them with a panel. `Registers` sets the processor up before and resets it
// after.
struct NoRegisters {
  NoRegisters() {}  // not trivial: an object of it is no unused variable
};

// The part that the micro-kernels above share: a product in groups of kGroup rows.
template <class ElementType>
struct GroupedProduct {
  using Element = ElementType;
  using Sum = ElementType;
  using Registers = NoRegisters;
  static constexpr int kGroup = SAE_FAST_ISA::kGroup;

  // Writes a packed row to its position among the rows of a block.
  static void place(const Element* row, int64_t steps, int64_t position, Element* groups) {
    Element* to = groups + (position / kGroup) * kGroup * steps + position % kGroup;
    for (int64_t step = 0; step < steps; ++step) to[step * kGroup] = row[step];
  }

  // Writes 16 packed rows of `steps` to latents [first, first + 16) of a panel of `panel_steps`.
  static void place_latents(const int32_t* rows, int64_t panel_steps, int64_t steps, int64_t first,
                            int32_t* panel) {
    write_columns(rows, steps, steps, panel + first, kPanel);
    for (int64_t step = steps; step < panel_steps; ++step) {  // not read, but defined
      std::memset(panel + step * kPanel + first, 0, 16 * sizeof(int32_t));
    }
  }

  // Rows in a block at most: 16-bit ones that stay in a 1 MB L2 beside a panel, up to where
  // measured gains end.
  static int64_t most_rows(int64_t d_in) {
    const int64_t rows = int64_t{640} * 1024 / (2 * d_in + 1) - kPanel;
    return rows < 96 ? 96 : (rows > 240 ? 240 : rows);
  }

  // The most sums of `positions` rows.
  static int64_t most_sums(int64_t positions) { return positions * kPanel; }

  // Returns the sums of a row of a block, from a latent of the panel on.
  static const Element* sums_at(const Element* sums, int64_t row, int64_t latent) {
    return sums + row * kPanel + latent;
  }

  static void multiply(NoRegisters&, const Element* groups, int64_t rows, const Element* panel,
                       int64_t steps, Element* sums) {
    multiply_panel(groups, rows, panel, steps, sums);
  }
};

struct Int16Product : GroupedProduct<int32_t> {  // elements are two int16 columns
  static constexpr bool kScaled = true;
  static int64_t steps(int64_t d_in) { return (d_in + 1) / 2; }
  static double roundings(int64_t) { return 0.0; }  // integers
  static RowStats round(const float* row, int64_t d_in, int32_t* pairs) {
    return quantize_row(row, d_in, pairs);
  }
};

struct FloatProduct : GroupedProduct<float> {
  static constexpr bool kScaled = false;
  static int64_t steps(int64_t d_in) { return d_in; }
  static double roundings(int64_t d_in) { return 1.01 * static_cast<double>(d_in); }
  static RowStats round(const float* row, int64_t d_in, float* to) {
    std::memcpy(to, row, static_cast<size_t>(d_in) * sizeof(float));
    return {1.0f, norm_bound(row, d_in), 0.0f};
  }
};

}  // namespace sae_fast::SAE_FAST_ISA
