// Screening: approximate scores from a cheap product, their error bound, and the candidates that
// are left for exact scoring. Shared by top-k and threshold selection.
//
// With x̂, ŵ the quantised operands, |x·w - x̂·ŵ| <= |x - x̂||w| + |x̂||w - ŵ|, to which the roundings
// of the sums, of the scaling and of the bias are added. Any approximate value within twice that
// bound of the k-th can belong to the k best; nothing further below can.
#pragma once

#include "kernels/cpu/encode.h"
#include "kernels/cpu/isa/narrow_product.h"
#include "kernels/cpu/isa/pair_scores.h"
#include "kernels/cpu/isa/select.h"

namespace sae_fast::SAE_FAST_ISA {

constexpr int kVectorsPerPanel = kPanel / kLanes;

// Bounds over the latents for screening, computed once a call.
class LatentBounds {
 public:
  float* bias = nullptr;        // [padded]; NaN, which passes no filter, for outliers
  uint64_t* dead = nullptr;     // [panels] bits of dead latents, or null
  int32_t* outliers = nullptr;  // latents scored for every token: not finite, or far out of scale
  int64_t outlier_count = 0;
  int64_t dead_count = 0;
  int64_t dead_outlier_count = 0;
  float norm = 0.0f;  // bounds over all other latents
  float error = 0.0f;
  float bias_magnitude = 0.0f;

  bool prepare(const cpu::PackedEncoder& encoder, const float* b_enc, const bool* dead_mask) {
    const int64_t padded = cpu::panels(encoder.d_sae) * kPanel;
    if (!memory_.reset(padded * 16)) return false;
    bias = memory_.as<float>();
    outliers = memory_.as<int32_t>(padded * 4);
    const float* norms = encoder.stats + padded;
    const float norm_limit = 8.0f * root_mean_square(norms, encoder.d_sae);
    const float bias_limit = 16.0f * root_mean_square(b_enc, encoder.d_sae);
    for (int64_t j = 0; j < padded; ++j) {
      if (j >= encoder.d_sae) {
        bias[j] = NAN;
        continue;
      }
      const float magnitude = std::fabs(b_enc[j]);
      if (norms[j] <= norm_limit && magnitude <= bias_limit) {
        bias[j] = b_enc[j];
        norm = std::fmax(norm, norms[j]);
        error = std::fmax(error, encoder.stats[2 * padded + j]);
        bias_magnitude = std::fmax(bias_magnitude, magnitude);
      } else {
        bias[j] = NAN;
        outliers[outlier_count++] = static_cast<int32_t>(j);
      }
    }
    if (dead_mask != nullptr) set_dead(dead_mask, encoder.d_sae);
    return true;
  }

  // The bound for a token: |exact score - approximate score| <= this. Infinite, so that the token
  // goes to the exact path, where float arithmetic could overflow.
  template <class Product>
  float score_error(const RowStats& x, int64_t d_in) const {
    if (!(x.norm < 1e18f) || !(static_cast<double>(x.norm) * norm < 1e37)) return INFINITY;
    const double product = static_cast<double>(x.norm) * norm;
    const double roundings = score_roundings(d_in) + Product::roundings(d_in) + 8.0;
    double bound = static_cast<double>(x.error) * norm;
    bound += (static_cast<double>(x.norm) + x.error) * error;
    bound += product * roundings * 0x1p-24 + 4.0 * bias_magnitude * 0x1p-24;
    return static_cast<float>(bound * 1.001 + 1e-30);
  }

 private:
  // Of the finite values; a row far above it would widen the bound of all latents.
  static float root_mean_square(const float* values, int64_t count) {
    double sum = 0.0;
    int64_t finite = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!(std::fabs(values[i]) < 1e18f)) continue;
      sum += static_cast<double>(values[i]) * values[i];
      ++finite;
    }
    return finite > 0 ? static_cast<float>(std::sqrt(sum / static_cast<double>(finite))) : 0.0f;
  }

  void set_dead(const bool* mask, int64_t d_sae) {
    dead = memory_.as<uint64_t>(cpu::panels(d_sae) * kPanel * 8);
    std::memset(dead, 0, static_cast<size_t>(cpu::panels(d_sae)) * sizeof(uint64_t));
    for (int64_t j = 0; j < d_sae; ++j) {
      if (!mask[j]) continue;
      dead[j / kPanel] |= uint64_t{1} << (j % kPanel);
      ++dead_count;
      if (std::isnan(bias[j])) ++dead_outlier_count;
    }
  }

  Scratch memory_;
};

struct PanelScores {
  Vec value[kVectorsPerPanel];
};

inline Vec to_vec(const int32_t* sums) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_loadu_si512(sums));
#else
  Vec value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = static_cast<float>(sums[lane]);
  return value;
#endif
}

inline Vec to_vec(const float* sums) { return load(sums); }

// Approximate pre-activations of one row of a block in one panel.
template <class Product>
inline PanelScores panel_scores(const typename Product::Sum* sums, int64_t row, const float* scales,
                                float x_scale, const float* bias) {
  PanelScores scores;
  SAE_FAST_UNROLL
  for (int v = 0; v < kVectorsPerPanel; ++v) {
    Vec score = to_vec(Product::sums_at(sums, row, v * kLanes));
    if constexpr (Product::kScaled) score *= load(scales + v * kLanes) * broadcast(x_scale);
    scores.value[v] = score + load(bias + v * kLanes);
  }
  return scores;
}

// Bit j: score j >= threshold. NaN never passes.
inline uint64_t at_least(const PanelScores& scores, Vec threshold, int v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)scores.value[v], (__m512)threshold, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)scores.value[v], (__m256)threshold, _CMP_GE_OQ)));
#else
  uint64_t bits = 0;
  const VecInt passed = scores.value[v] >= threshold;
  for (int lane = 0; lane < kLanes; ++lane) bits |= passed[lane] != 0 ? uint64_t{1} << lane : 0;
  return bits;
#endif
}

inline uint64_t at_least(const PanelScores& scores, float threshold) {
  uint64_t bits = 0;
  const Vec bound = broadcast(threshold);
  SAE_FAST_UNROLL
  for (int v = 0; v < kVectorsPerPanel; ++v) bits |= at_least(scores, bound, v) << (v * kLanes);
  return bits;
}

inline uint64_t at_least(const PanelScores& scores, const float* thresholds, float margin) {
  uint64_t bits = 0;
  SAE_FAST_UNROLL
  for (int v = 0; v < kVectorsPerPanel; ++v) {
    const Vec bound = load(thresholds + v * kLanes) - broadcast(margin);
    bits |= at_least(scores, bound, v) << (v * kLanes);
  }
  return bits;
}

// Appends the scores whose bits are set; returns the new count.
inline int32_t append(const PanelScores& scores, uint64_t bits, int32_t first_latent, float* values,
                      int32_t* indices, int32_t count) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int v = 0; v < kVectorsPerPanel; ++v) {
    const auto keep = static_cast<__mmask16>(bits >> (v * 16));
    const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(first_latent + v * 16), lanes);
    // Compressed in a register first: compressing stores are microcoded on some processors.
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(keep, (__m512)scores.value[v]));
    _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(keep, index));
    count += __builtin_popcount(keep);
  }
#else
  float lanes[kPanel];
  std::memcpy(lanes, scores.value, sizeof lanes);
  for (; bits != 0; bits &= bits - 1) {
    const int lane = __builtin_ctzll(bits);
    values[count] = lanes[lane];
    indices[count++] = first_latent + lane;
  }
#endif
  return count;
}

}  // namespace sae_fast::SAE_FAST_ISA
