// Packing of the encoder's rows into panels, used by pack_encoder and by the optimiser's update.
#pragma once

#include "kernels/cpu/encode.h"
#include "kernels/cpu/isa/product.h"

namespace sae_fast::SAE_FAST_ISA {

#if defined(__AVX512F__)
// Transposes 16 rows of `steps` integers into columns of a panel, 16 x 16 at a time.
inline void transpose_16(const int32_t* rows, int64_t stride, int32_t* to) {
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
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kPanel, r[i]);
}
#endif

// Writes 16 rows of `steps` 4-byte elements as 16 neighbouring columns of a panel.
inline void write_columns(const int32_t* rows, int64_t steps, int32_t* to) {
  int64_t step = 0;
#if defined(__AVX512F__)
  for (; step + 16 <= steps; step += 16) transpose_16(rows + step, steps, to + step * kPanel);
#endif
  for (; step < steps; ++step) {
    for (int64_t row = 0; row < 16; ++row) to[step * kPanel + row] = rows[row * steps + step];
  }
}

// Rounds row `latent` to the scoring type, into encoder.rounded, and back into `row` as floats.
inline void round_row(const cpu::PackedEncoder& encoder, int64_t latent, float* row) {
  const float* from = encoder.W_enc + latent * encoder.d_in;
  const int64_t offset = latent * encoder.d_in;
  if (encoder.rows == cpu::Rows::kBFloat16) {
    auto* to = static_cast<BFloat16*>(encoder.rounded) + offset;
    store_rounded(to, from, encoder.d_in);
    for (int64_t i = 0; i < encoder.d_in; ++i) row[i] = to_float(to[i]);
  } else if (encoder.rows == cpu::Rows::kFloat16) {
    auto* to = static_cast<Float16*>(encoder.rounded) + offset;
    store_rounded(to, from, encoder.d_in);
    for (int64_t i = 0; i < encoder.d_in; ++i) row[i] = to_float(to[i]);
  } else {
    std::memcpy(row, from, static_cast<size_t>(encoder.d_in) * sizeof(float));
  }
}

inline int64_t pack_scratch_bytes(const cpu::PackedEncoder& encoder) {
  return (16 + 1) * (encoder.d_in + 2) * 4;
}

// Packs latents [first, first + 16) of the encoder; those past d_sae become zeros.
inline void pack_sixteen(const cpu::PackedEncoder& encoder, int64_t first, int32_t* scratch) {
  const bool integers = encoder.screen == cpu::Screen::kInt16;
  const int64_t steps = integers ? Int16Product::steps(encoder.d_in) : encoder.d_in;
  const int64_t padded = cpu::panels(encoder.d_sae) * kPanel;
  auto* row = reinterpret_cast<float*>(scratch + 16 * steps);
  for (int64_t lane = 0; lane < 16; ++lane) {
    const int64_t latent = first + lane;
    int32_t* to = scratch + lane * steps;
    RowStats stats = {0.0f, 0.0f, 0.0f};
    if (latent >= encoder.d_sae) {
      std::memset(to, 0, static_cast<size_t>(steps) * sizeof(int32_t));
    } else {
      round_row(encoder, latent, row);
      if (integers) {
        stats = quantize_row(row, encoder.d_in, to);
      } else {
        std::memcpy(to, row, static_cast<size_t>(steps) * sizeof(float));
        stats = {1.0f, norm_bound(row, encoder.d_in), 0.0f};
      }
    }
    encoder.stats[latent] = stats.scale;
    encoder.stats[padded + latent] = stats.norm;
    encoder.stats[2 * padded + latent] = stats.error;
    encoder.stats[3 * padded + latent] = 0.0f;
  }
  auto* packed = static_cast<int32_t*>(encoder.packed);
  write_columns(scratch, steps, packed + (first / kPanel) * steps * kPanel + first % kPanel);
}

}  // namespace sae_fast::SAE_FAST_ISA
