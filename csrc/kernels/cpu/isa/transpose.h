// Sixteen rows turned into columns: how packed rows become panels.
#pragma once

#include "kernels/cpu/isa/simd.h"

namespace sae_fast::SAE_FAST_ISA {

#if defined(__AVX512F__)
// Transposes 16 x 16 integers from rows `stride` apart to rows `to_stride` apart.
inline void transpose_16(const int32_t* rows, int64_t stride, int32_t* to, int64_t to_stride) {
  __m512i r[16], t[16];
  SAE_FAST_UNROLL
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows + i * stride);
  SAE_FAST_UNROLL
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  SAE_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  SAE_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  SAE_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
  SAE_FAST_UNROLL
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, r[i]);
}
#endif

// Writes the first `steps` 4-byte elements of 16 rows, `row_stride` apart, as 16 columns: element
// `step` of row `row` goes to to[step * stride + row].
inline void write_columns(const int32_t* rows, int64_t row_stride, int64_t steps, int32_t* to,
                          int64_t stride) {
  int64_t step = 0;
#if defined(__AVX512F__)
  for (; step + 16 <= steps; step += 16) {
    transpose_16(rows + step, row_stride, to + step * stride, stride);
  }
#endif
  for (; step < steps; ++step) {
    for (int64_t row = 0; row < 16; ++row) to[step * stride + row] = rows[row * row_stride + step];
  }
}

}  // namespace sae_fast::SAE_FAST_ISA
