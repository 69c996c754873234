// Packing of the encoder's rows into panels, used by pack_encoder and by the optimizer's update.
#pragma once

#include "kernels/cpu/encode.h"
#include "kernels/cpu/isa/narrow_product.h"

namespace sae_fast::SAE_FAST_ISA {

// Rounds row `latent` to the scoring type, into encoder.rounded, and back into `row` as floats.
inline void round_row(const cpu::PackedEncoder& encoder, int64_t latent, float* row) {
  const float* from = encoder.W_enc + latent * encoder.d_in;
  const int64_t offset = latent * encoder.d_in;
  if (encoder.type == DType::kBFloat16) {
    auto* to = static_cast<BFloat16*>(encoder.rounded) + offset;
    store_rounded(to, from, encoder.d_in);
    for (int64_t i = 0; i < encoder.d_in; ++i) row[i] = to_float(to[i]);
  } else if (encoder.type == DType::kFloat16) {
    auto* to = static_cast<Float16*>(encoder.rounded) + offset;
    store_rounded(to, from, encoder.d_in);
    for (int64_t i = 0; i < encoder.d_in; ++i) row[i] = to_float(to[i]);
  } else {
    std::memcpy(row, from, static_cast<size_t>(encoder.d_in) * sizeof(float));
  }
}

inline int64_t pack_scratch_bytes(const cpu::PackedEncoder& encoder) {
  return (16 + 1) * (encoder.d_in + 32) * 4;
}

// Packs latents [first, first + 16) of the encoder; those past d_sae become zeros.
template <class Product>
inline void pack_sixteen_as(const cpu::PackedEncoder& encoder, int64_t first, int32_t* scratch) {
  const int64_t steps = Product::steps(encoder.d_in);
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
      stats = Product::round(row, encoder.d_in, reinterpret_cast<typename Product::Element*>(to));
    }
    encoder.stats[latent] = stats.scale;
    encoder.stats[padded + latent] = stats.norm;
    encoder.stats[2 * padded + latent] = stats.error;
    encoder.stats[3 * padded + latent] = 0.0f;
  }
  const int64_t packed_steps = cpu::packed_steps(encoder.screen, encoder.d_in);
  auto* panel = static_cast<int32_t*>(encoder.packed) + first / kPanel * kPanel * packed_steps;
  Product::place_latents(scratch, packed_steps, steps, first % kPanel, panel);
}

inline void pack_sixteen(const cpu::PackedEncoder& encoder, int64_t first, int32_t* scratch) {
  if (encoder.screen == cpu::Screen::kNarrow) {
    pack_sixteen_as<NarrowProduct>(encoder, first, scratch);
  } else {
    pack_sixteen_as<FloatProduct>(encoder, first, scratch);
  }
}

}  // namespace sae_fast::SAE_FAST_ISA
