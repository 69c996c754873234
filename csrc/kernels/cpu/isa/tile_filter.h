// Finds the scores that pass a row's threshold while the tile unit works on the next sums: a few
// rows after every k-step, since a reorder buffer holds half a dozen of them. Nothing branches on
// the data, and all rows share one log: their lists would not stay in the cache beside the
// operands.
#pragma once

#include "kernels/cpu/isa/simd.h"

namespace sae_fast::SAE_FAST_ISA {

// The log of a product: blocks of 32 rows by 32 latents, one after the other.
struct CandidateLog {
  static constexpr int32_t kBlockPlaces = 32 * 32;
  static constexpr int32_t kPad = 16;

  float* values = nullptr;     // [capacity + kPad] scores
  uint16_t* places = nullptr;  // [capacity + kPad] 32 * row + latent within the block
  int32_t* ends = nullptr;     // [blocks + 1] where the entries of block i end is ends[i + 1]
  int32_t capacity = 0;
  int32_t count = 0;
  int64_t first_block = 0;  // of those in the log
  int64_t blocks = 0;

  void clear() {
    first_block += blocks;
    blocks = 0;
    count = 0;
    ends[0] = 0;
  }
  bool is_full() const { return count + kBlockPlaces > capacity; }
};

// Flush: empties the log, of which a block more might not find room, and may raise thresholds.
template <class Flush>
class TileFilter {
 public:
  // `thresholds`: of every row of the product's groups; infinity where there is no row.
  TileFilter(const float* thresholds, CandidateLog& log, Flush flush)
      : thresholds_(thresholds), log_(log), flush_(flush) {}

  // Takes on a block of sums [2][2][16][16] of rows from `first_row` on, for latents whose biases
  // are the 32 from `bias` on; the rest of the block before is done first.
  void begin(const float* sums, int64_t first_row, const float* bias) {
    finish();
    sums_ = sums;
    first_row_ = first_row;
    bias_ = bias;
    row_ = 0;
  }

  // Looks at the next `rows` rows of the block.
  void step(int32_t rows) {
    const int32_t end = row_ + rows < kRows ? row_ + rows : kRows;
    for (; row_ < end; ++row_) look_at(row_);
  }

  void finish() {
    if (sums_ == nullptr) return;
    step(kRows);
    append();
    sums_ = nullptr;
    found_ = 0;
    log_.ends[++log_.blocks] = log_.count;
    if (log_.is_full()) flush_();
  }

 private:
  static constexpr int32_t kRows = 32;

  // Returns the place of the first of 32 sums of a row; the other 16 are a tile further.
  static int32_t offset_of(int32_t row) { return (row & 16) << 5 | (row & 15) << 4; }
  static constexpr int32_t kNextTile = 256;

#if defined(__AVX512VBMI2__)
  void look_at(int32_t row) {
    const float* from = sums_ + offset_of(row);
    const __m512 bound = _mm512_set1_ps(thresholds_[first_row_ + row]);
    const __m512 low = _mm512_add_ps(_mm512_load_ps(from), _mm512_loadu_ps(bias_));
    const __m512 high =
        _mm512_add_ps(_mm512_load_ps(from + kNextTile), _mm512_loadu_ps(bias_ + 16));
    const __mmask32 keep = _mm512_kunpackw(_mm512_cmp_ps_mask(high, bound, _CMP_GE_OQ),
                                           _mm512_cmp_ps_mask(low, bound, _CMP_GE_OQ));
    const __m512i lanes =
        _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13,
                         12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places =
        _mm512_add_epi16(lanes, _mm512_set1_epi16(static_cast<int16_t>(32 * row)));
    _mm512_storeu_si512(list_ + found_, _mm512_maskz_compress_epi16(keep, places));
    found_ += __builtin_popcount(keep);
  }

  void append() {
    const __m512 low_bias = _mm512_loadu_ps(bias_), high_bias = _mm512_loadu_ps(bias_ + 16);
    for (int32_t i = 0; i < found_; i += 16) {
      const auto* list = reinterpret_cast<const __m256i*>(list_ + i);
      const __m512i place = _mm512_cvtepu16_epi32(_mm256_load_si256(list));
      const auto bits = [&](int mask) { return _mm512_and_si512(place, _mm512_set1_epi32(mask)); };
      // 32 row + latent, as bits rrrrrlllll, stands at r|l|rrrr|llll; behind the last is anything.
      const __m512i at =
          _mm512_or_si512(_mm512_or_si512(bits(0x20f), _mm512_slli_epi32(bits(0x10), 4)),
                          _mm512_srli_epi32(bits(0x1e0), 1));
      const __m512 value = _mm512_add_ps(_mm512_i32gather_ps(at, sums_, 4),
                                         _mm512_permutex2var_ps(low_bias, place, high_bias));
      _mm512_storeu_ps(log_.values + log_.count + i, value);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(log_.places + log_.count + i),
                          _mm256_load_si256(list));
    }
    log_.count += found_;
  }
#else
  void look_at(int32_t row) {
    for (int32_t latent = 0; latent < 32; ++latent) {
      list_[found_] = static_cast<uint16_t>(32 * row + latent);
      found_ += score(row, latent) >= thresholds_[first_row_ + row] ? 1 : 0;
    }
  }

  float score(int32_t row, int32_t latent) const {
    return sums_[offset_of(row) + latent / 16 * kNextTile + latent % 16] + bias_[latent];
  }

  void append() {
    for (int32_t i = 0; i < found_; ++i) {
      log_.values[log_.count] = score(list_[i] / 32, list_[i] % 32);
      log_.places[log_.count++] = list_[i];
    }
  }
#endif

  const float* thresholds_;
  CandidateLog& log_;
  Flush flush_;
  const float* sums_ = nullptr;
  const float* bias_ = nullptr;
  int64_t first_row_ = 0;
  int32_t row_ = kRows;  // the next to look at
  int32_t found_ = 0;
  alignas(64) uint16_t list_[CandidateLog::kBlockPlaces + 64];
};

}  // namespace sae_fast::SAE_FAST_ISA
