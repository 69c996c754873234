// Operands of dense products as tiles, and the products of two strips of tiles.
//
// A strip is 16 rows of an operand. A step is 64 bytes of each row: a tile of the left operand
// holds them one below the other, a tile of the right operand has in row g the bytes 4 g to 4 g + 3
// of all 16 rows side by side, so that either is the transpose of the other in units of 4 bytes.
// Four bytes are of columns 16 apart (g, g + 16, g + 32 and g + 48 of a step; of bfloat16 g and
// g + 16), which vectors of columns give without a shuffle.
//
// Int8Slices makes a float32 product of 8-bit integers, after Ozaki's scheme. The part of a row
// that one pass multiplies is scaled to 24-bit integers, the largest number of it to nearly 2^23,
// and cut into three slices of signed bytes, q = 2^16 s_0 + 2^8 s_1 + s_2. Of the nine products of
// slices the six of the highest weight are made; their integer sums are exact.
//
// The error of a pair of parts of length d, with u = 2^-24 and |x|, |w| their largest numbers:
// scaling and rounding change a number of x by up to 2.1 u |x|, a number of w by up to 2.1 u |w|;
// leaving out 2^8 (s_1 s'_2 + s_2 s'_1) + s_2 s'_2 < 2^23.01 changes a product of two numbers by up
// to 2.1 u |x||w|. The sum loses at most 6.3 u d |x||w|, typically u sqrt(d) |x||w| / 2, because
// the errors have either sign. A float32 sum typically loses u sqrt(d) times the product of the
// root mean squares, which is the same where the largest of 768 numbers is 3.5 times their root
// mean square.
//
// BFloat16Pairs is the product of operands rounded to bfloat16, summed in float32.
#pragma once

#if defined(SAE_FAST_TILES)

#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/isa/simd.h"
#include "kernels/cpu/isa/tiles.h"
#include "kernels/cpu/isa/transpose.h"

namespace sae_fast::SAE_FAST_ISA {

constexpr int64_t kStripRows = kTileRows;
constexpr int64_t kTileSums = kTileRows * kTileRows;

// A tile of the right operand from one of the left, or the other way round.
inline void transpose_tile(const char* from, char* to) {
  write_columns(reinterpret_cast<const int32_t*>(from), kTileRows, kTileRows,
                reinterpret_cast<int32_t*>(to), kTileRows);
}

// `count` numbers, at most kLanes; zeros behind them.
inline Vec load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  return count > 0 ? load_tail(from, count) : Vec{};
}

inline VecInt round_to_integers(Vec value) {
#if defined(__AVX512F__)
  return (VecInt)_mm512_cvtps_epi32((__m512)value);
#else
  return (VecInt)_mm256_cvtps_epi32((__m256)value);
#endif
}

constexpr int64_t kPackedRows = 128;  // packed at once: whole lines of an operand kept by columns

// Part of an operand: columns [begin, begin + depth) of at most kPackedRows rows.
struct RowPart {
  const float* data;
  int64_t row_stride, depth_stride, rows, depth;

  bool is_by_rows() const { return depth_stride == 1; }
  int64_t strips() const { return (rows + kStripRows - 1) / kStripRows; }
  RowPart strip(int64_t number) const {
    const int64_t first = number * kStripRows, left = rows - first;
    return {data + first * row_stride, row_stride, depth_stride,
            left < kStripRows ? left : kStripRows, depth};
  }
};

struct Int8Slices {
  static constexpr bool kScaled = true;
  static constexpr int64_t kSlices = 3;
  static constexpr int64_t kStepDepth = 64;  // columns in a step
  static constexpr int64_t kMostSteps = 12;  // of a pass: a strip stays in L1
  static constexpr int64_t kBlockStrips = 1;
  static constexpr int64_t kStepBytes = kSlices * kTileBytes;
  static constexpr int64_t kSums = kSlices * kTileSums;

  // Writes strips as [strip][step][slice][tile]; the integers of a row are multiplied by its
  // number in `scales` [16 strips]. Returns false if a number is too large.
  template <bool kRight>
  static bool pack(const RowPart& part, int64_t steps, char* to, float* scales) {
    alignas(64) int32_t largest[kPackedRows] = {};
    if (part.is_by_rows()) {
      for (int64_t row = 0; row < part.rows; ++row) {
        VecInt most = {};
        const float* from = part.data + row * part.row_stride;
        for (int64_t k = 0; k < part.depth; k += kLanes) {
          most = larger(most, load_some(from + k, part.depth - k));
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          largest[row] = most[lane] > largest[row] ? most[lane] : largest[row];
        }
      }
    } else {
      for (int64_t k = 0; k < part.depth; ++k) {
        const float* from = part.data + k * part.depth_stride;
        for (int64_t row = 0; row < part.rows; row += kLanes) {
          VecInt most;
          std::memcpy(&most, largest + row, sizeof most);
          most = larger(most, load_some(from + row, part.rows - row));
          std::memcpy(largest + row, &most, sizeof most);
        }
      }
    }
    float before[kPackedRows], factor[kPackedRows];
    for (int64_t row = 0; row < part.strips() * kStripRows; ++row) {
      float most;
      std::memcpy(&most, largest + row, sizeof most);
      if (!(most < 0x1p100f)) return false;
      before[row] = most < 0x1p-60f ? 0x1p64f : 1.0f;  // so that no factor overflows
      factor[row] = most > 0.0f ? kMostInteger / (most * before[row]) : 0.0f;
      scales[row] = most * (65536.0f / kMostInteger);
    }
    const int64_t strip_bytes = steps * kStepBytes;
    if (part.is_by_rows()) {
      for (int64_t i = 0; i < part.strips(); ++i) {
        const float *prescale = before + i * kStripRows, *scale = factor + i * kStripRows;
        for (int64_t step = 0; step < steps; ++step) {
          pack_rows<kRight>(part.strip(i), step, prescale, scale,
                            to + i * strip_bytes + step * kStepBytes);
        }
      }
    } else {
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t i = 0; i < part.strips(); ++i) {
          const float *prescale = before + i * kStripRows, *scale = factor + i * kStripRows;
          pack_columns<kRight>(part.strip(i), step, prescale, scale,
                               to + i * strip_bytes + step * kStepBytes);
        }
      }
    }
    return true;
  }

  // sums [3][16][16] of one strip with one: the slices whose weights add up to 0, 1 and 2. After
  // every step work() is called, which the processor does while it multiplies.
  template <class Work>
  static void multiply(Tiles& tiles, const char* left, const char* right, int64_t steps,
                       int32_t* sums, Work&& work) {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    for (int64_t step = 0; step < steps; ++step) {
      tiles.load<3>(left);
      tiles.load_streamed<6>(right);
      tiles.multiply_int8<0, 3, 6>();
      tiles.load<4>(left + kTileBytes);
      tiles.multiply_int8<1, 4, 6>();
      tiles.load<5>(left + 2 * kTileBytes);
      tiles.multiply_int8<2, 5, 6>();
      tiles.load_streamed<7>(right + kTileBytes);
      tiles.multiply_int8<1, 3, 7>();
      tiles.multiply_int8<2, 4, 7>();
      tiles.load_streamed<6>(right + 2 * kTileBytes);
      tiles.multiply_int8<2, 3, 6>();
      left += kStepBytes;
      right += kStepBytes;
      work();
    }
    tiles.store<0>(sums);
    tiles.store<1>(sums + kTileSums);
    tiles.store<2>(sums + 2 * kTileSums);
  }

  // The product of a row of the strip with the columns from `column` on. The sums of the first
  // slices are below 2^24, and so exact in float32.
  static Vec product(const int32_t* sums, int64_t row, int64_t column, float left_scale,
                     Vec right_scale) {
    const int32_t* at = sums + row * kTileRows + column;
    const Vec weight = broadcast(0x1p-8f);
    Vec sum = to_floats(at + 2 * kTileSums);
    sum = sum * weight + to_floats(at + kTileSums);
    sum = sum * weight + to_floats(at);
    return sum * broadcast(left_scale) * right_scale;
  }

 private:
  // Three slices of signed bytes reach 127 (2^16 + 2^8 + 1); less by what roundings may add.
  static constexpr float kMostInteger = 8355700.0f;
  static constexpr int32_t kEveryDigit = 0x808080;
  static_assert(kMostSteps * kStepDepth * 128 * 128 < 1 << 24, "sums of first slices are exact");

  static VecInt larger(VecInt most, Vec value) {  // NaN is larger than infinity
    const auto bits = (VecInt)vec_abs(value);
    return bits > most ? bits : most;
  }

  // The integer whose bytes 0 to 2 are the slices s_2 to s_0: 128 is added to each digit, so that
  // none of them is negative, and taken off again without a carry.
  static VecInt slices(Vec value, Vec before, Vec factor) {
    return (round_to_integers(value * before * factor) + kEveryDigit) ^ kEveryDigit;
  }

  static Vec to_floats(const int32_t* from) {
    VecInt numbers;
    std::memcpy(&numbers, from, sizeof numbers);
    return __builtin_convertvector(numbers, Vec);
  }

  // One step of a strip.
  template <bool kRight>
  static void pack_rows(const RowPart& strip, int64_t step, const float* before,
                        const float* factor, char* to) {
    alignas(64) char tiles[kStepBytes];
    char* left = kRight ? tiles : to;
    if (strip.rows < kStripRows) std::memset(left, 0, kStepBytes);
    const float* from = strip.data + step * kStepDepth;
    const int64_t depth = strip.depth - step * kStepDepth;
    for (int64_t row = 0; row < strip.rows; ++row, from += strip.row_stride) {
      const Vec first = broadcast(before[row]), second = broadcast(factor[row]);
      char* place = left + row * kTileRowBytes;
      if (depth >= kStepDepth) {
        join_row([&](int64_t k) { return slices(load(from + k), first, second); }, place);
      } else {
        join_row([&](int64_t k) { return slices(load_some(from + k, depth - k), first, second); },
                 place);
      }
    }
    if (kRight) transpose_tiles(tiles, to);
  }

  template <bool kRight>
  static void pack_columns(const RowPart& strip, int64_t step, const float* before,
                           const float* factor, char* to) {
    alignas(64) char tiles[kStepBytes];
    char* right = kRight ? to : tiles;
    const float* from = strip.data + step * kStepDepth * strip.depth_stride;
    const int64_t depth = strip.depth - step * kStepDepth;
    const bool is_whole = depth >= kStepDepth && strip.rows == kStripRows;
    for (int64_t row = 0; row < kStripRows; row += kLanes, from += kLanes) {
      const Vec first = load(before + row), second = load(factor + row);
      for (int64_t group = 0; group < kTileRows; ++group) {
        VecInt digits[4];
        SAE_FAST_UNROLL
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t k = kTileRows * i + group;
          const float* at = from + k * strip.depth_stride;
          const Vec value = is_whole    ? load(at)
                            : k < depth ? load_some(at, strip.rows - row)
                                        : Vec{};
          digits[i] = slices(value, first, second);
        }
        join(digits, right + group * kTileRowBytes + row * 4);
      }
    }
    if (!kRight) transpose_tiles(tiles, to);
  }

  // Rows of 64 bytes of the three slices, from the integers of the row's columns from k on.
  template <class Digits>
  static void join_row(Digits&& digits_from, char* place) {
    SAE_FAST_UNROLL
    for (int64_t k = 0; k < kTileRows; k += kLanes) {
      VecInt digits[4];
      SAE_FAST_UNROLL
      for (int64_t i = 0; i < 4; ++i) digits[i] = digits_from(kTileRows * i + k);
      join(digits, place + 4 * k);
    }
  }

  // Of each slice the bytes of four vectors, side by side.
  static void join(const VecInt* digits, char* place) {
    store_bytes((digits[0] >> 16 & 0xff) | (digits[1] >> 8 & 0xff00) | (digits[2] & 0xff0000) |
                    (digits[3] << 8 & static_cast<int32_t>(0xff000000)),
                place);
    store_bytes((digits[0] >> 8 & 0xff) | (digits[1] & 0xff00) | (digits[2] << 8 & 0xff0000) |
                    (digits[3] << 16 & static_cast<int32_t>(0xff000000)),
                place + kTileBytes);
    store_bytes((digits[0] & 0xff) | (digits[1] << 8 & 0xff00) | (digits[2] << 16 & 0xff0000) |
                    (digits[3] << 24),
                place + 2 * kTileBytes);
  }

  static void transpose_tiles(const char* from, char* to) {
    for (int slice = 0; slice < kSlices; ++slice) {
      transpose_tile(from + slice * kTileBytes, to + slice * kTileBytes);
    }
  }

  static void store_bytes(VecInt bytes, char* to) { std::memcpy(to, &bytes, sizeof bytes); }
};

struct BFloat16Pairs {
  static constexpr bool kScaled = false;
  static constexpr int64_t kSlices = 1;
  static constexpr int64_t kStepDepth = 32;
  static constexpr int64_t kMostSteps = 16;
  static constexpr int64_t kBlockStrips = 2;
  static constexpr int64_t kStepBytes = kTileBytes;
  static constexpr int64_t kSums = 4 * kTileSums;

  // As Int8Slices: [strip][step][tile]; there are no scales.
  template <bool kRight>
  static bool pack(const RowPart& part, int64_t steps, char* to, float*) {
    const int64_t strips = part.strips();
    const bool by_rows = part.is_by_rows();
    for (int64_t n = 0; n < strips * steps; ++n) {
      const int64_t i = by_rows ? n / steps : n % strips, step = by_rows ? n % steps : n / strips;
      char* place = to + (i * steps + step) * kStepBytes;
      alignas(64) char turned[kTileBytes];
      char* tile = kRight == by_rows ? turned : place;
      if (by_rows) {
        pack_rows(part.strip(i), step, tile);
      } else {
        pack_columns(part.strip(i), step, tile);
      }
      if (tile == turned) transpose_tile(turned, place);
    }
    return true;
  }

  // sums [2][2][16][16] of two strips with two: each has its 16 rows, `steps` tiles apart.
  template <class Work>
  static void multiply(Tiles& tiles, const char* left, const char* right, int64_t steps,
                       float* sums, Work&& work) {
    const int64_t next = steps * kStepBytes;
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
    for (int64_t step = 0; step < steps; ++step) {
      tiles.load<4>(left);
      tiles.load_streamed<6>(right);
      tiles.multiply_bfloat16<0, 4, 6>();
      tiles.load_streamed<7>(right + next);
      tiles.multiply_bfloat16<1, 4, 7>();
      tiles.load<5>(left + next);
      tiles.multiply_bfloat16<2, 5, 6>();
      tiles.multiply_bfloat16<3, 5, 7>();
      left += kStepBytes;
      right += kStepBytes;
      work();
    }
    tiles.store<0>(sums);
    tiles.store<1>(sums + kTileSums);
    tiles.store<2>(sums + 2 * kTileSums);
    tiles.store<3>(sums + 3 * kTileSums);
  }

  static Vec product(const float* sums, int64_t row, int64_t column, float, Vec) {
    const int64_t block = row / kTileRows * 2 + column / kTileRows;
    return load(sums + block * kTileSums + row % kTileRows * kTileRows + column % kTileRows);
  }

 private:
  static void pack_rows(const RowPart& strip, int64_t step, char* tile) {
    if (strip.rows < kStripRows) std::memset(tile, 0, kTileBytes);
    const float* from = strip.data + step * kStepDepth;
    const int64_t depth = strip.depth - step * kStepDepth;
    for (int64_t row = 0; row < strip.rows; ++row, from += strip.row_stride) {
      for (int64_t k = 0; k < kTileRows; k += kLanes) {
        const int64_t next = kTileRows + k;
        store_pair(load_some(from + k, depth - k), load_some(from + next, depth - next),
                   tile + row * kTileRowBytes + 4 * k);
      }
    }
  }

  static void pack_columns(const RowPart& strip, int64_t step, char* tile) {
    const float* from = strip.data + step * kStepDepth * strip.depth_stride;
    const int64_t depth = strip.depth - step * kStepDepth;
    for (int64_t row = 0; row < kStripRows; row += kLanes, from += kLanes) {
      const auto column = [&](int64_t k) {
        return k < depth ? load_some(from + k * strip.depth_stride, strip.rows - row) : Vec{};
      };
      for (int64_t group = 0; group < kTileRows; ++group) {
        store_pair(column(group), column(kTileRows + group),
                   tile + group * kTileRowBytes + row * 4);
      }
    }
  }

  static void store_pair(Vec first, Vec second, char* to) {
    const VecInt pair = (rounded(first) >> 16 & 0xffff) | (rounded(second) & ~0xffff);
    std::memcpy(to, &pair, sizeof pair);
  }

  // The upper halves are bfloat16, to nearest even; the lower ones are of no meaning.
  static VecInt rounded(Vec value) {
    const auto bits = (VecInt)value;
    const VecInt up = bits + 0x7fff + (bits >> 16 & 1);
    return value != value ? VecInt{} + 0x7fc00000 : up;
  }
};

}  // namespace sae_fast::SAE_FAST_ISA

#endif
