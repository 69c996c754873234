// Screening: a cheap product of a block of tokens with all latents, its error bound, and the rows
// of candidates that it leaves for exact scoring. Shared by top-k and threshold selection.
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

// What screening knows of the latents, one set a call.
class LatentBounds {
 public:
  float* bias = nullptr;     // [padded]; NaN, which passes no filter, where screening is not asked
  uint64_t* dead = nullptr;  // [panels] bits of dead latents, or null
  int32_t* special = nullptr;  // latents scored for every token: not finite, or far out of scale
  int64_t special_count = 0;
  int64_t dead_count = 0;
  int64_t dead_special_count = 0;
  float norm = 0.0f;  // bounds over all other latents
  float error = 0.0f;
  float bias_magnitude = 0.0f;

  bool prepare(const cpu::PackedEncoder& encoder, const float* b_enc, const bool* dead_mask) {
    const int64_t padded = cpu::panels(encoder.d_sae) * kPanel;
    if (!memory_.reset(padded * 16)) return false;
    bias = memory_.as<float>();
    special = memory_.as<int32_t>(padded * 4);
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
        special[special_count++] = static_cast<int32_t>(j);
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
  // Of the finite ones; a row far above it would widen everybody's bound.
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
      if (std::isnan(bias[j])) ++dead_special_count;
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

// Tokens of one block as the product reads them, and their exact scores.
template <class Product, class T>
class TokenBlock {
 public:
  using Element = typename Product::Element;
  using Sum = typename Product::Sum;

  // Room for `rows` tokens, of which `positions`, a multiple of the product's group, are multiplied
  // at once.
  bool allocate(int64_t rows, int64_t positions, int64_t d_in) {
    d_in_ = d_in;
    steps_ = Product::steps(d_in);
    const int64_t group_bytes = (positions + 1) * steps_ * static_cast<int64_t>(sizeof(Element));
    if (!x_memory_.reset(rows * (d_in + 3) * 4) || !group_memory_.reset(group_bytes) ||
        !sum_memory_.reset(Product::most_sums(positions) * static_cast<int64_t>(sizeof(Sum)))) {
      return false;
    }
    x_ = x_memory_.as<float>();
    scales_ = x_ + rows * d_in;
    errors_ = scales_ + rows;
    norms_ = errors_ + rows;
    groups_ = group_memory_.as<Element>();
    row_ = groups_ + positions * steps_;
    std::memset(groups_, 0, static_cast<size_t>(group_bytes));  // a group need not be full
    sums_ = sum_memory_.as<Sum>();
    return true;
  }

  const float* rows() const { return x_; }

  // Centres a token and rounds it to the scoring type.
  void set(int64_t row, const float* x, const float* b_dec) {
    float* to = x_ + row * d_in_;
    for (int64_t i = 0; i < d_in_; ++i) to[i] = to_float(round_to<T>(x[i] - b_dec[i]));
  }

  // Packs block row `row` as the `position`-th row of the product.
  void pack(int64_t row, int64_t position, const LatentBounds& bounds) {
    const RowStats stats = Product::round(x_ + row * d_in_, d_in_, row_);
    Product::place(row_, steps_, position, groups_);
    scales_[row] = stats.scale;
    norms_[row] = stats.norm;
    errors_[row] = bounds.template score_error<Product>(stats, d_in_);
    if (kSumsAreScores<Product, T> && errors_[row] < INFINITY) errors_[row] = 0.0f;
  }

  const Sum* multiply(typename Product::Registers& registers, int64_t rows,
                      const cpu::PackedEncoder& encoder, int64_t panel) const {
    const int64_t stride = cpu::packed_steps(encoder.screen, d_in_) * kPanel;
    const auto* packed = static_cast<const Element*>(encoder.packed) + panel * stride;
    Product::multiply(registers, groups_, rows, packed, steps_, sums_);
    return sums_;
  }

  // All panels, through a filter of the product.
  template <class Filter>
  void multiply_and_filter(typename Product::Registers& registers, int64_t rows,
                           const cpu::PackedEncoder& encoder, const float* bias, Filter& filter) {
    Product::multiply_and_filter(registers, groups_, rows,
                                 static_cast<const Element*>(encoder.packed),
                                 cpu::panels(encoder.d_sae), steps_, bias, sums_, filter);
  }

  float score(int64_t row, const T* latent, float bias) const {
    return dot_in_strips(x_ + row * d_in_, latent, d_in_) + bias;
  }

  // Whether a candidate, the approximate score of which is known, is still to be scored.
  bool is_approximate(int64_t row, float screening_bias) const {
    return !kSumsAreScores<Product, T> || !(errors_[row] < INFINITY) || std::isnan(screening_bias);
  }

  float scale(int64_t row) const { return scales_[row]; }
  float error(int64_t row) const { return errors_[row]; }
  float norm(int64_t row) const { return norms_[row]; }

 private:
  int64_t d_in_ = 0, steps_ = 0;
  float* x_ = nullptr;         // [rows][d_in] centred tokens
  Element* groups_ = nullptr;  // positions * steps elements, as the product reads them
  Sum* sums_ = nullptr;        // as many as the product needs for its positions
  Element* row_ = nullptr;     // [steps]
  float* scales_ = nullptr;    // [rows] of the quantised token
  float* errors_ = nullptr;    // [rows] score_error
  float* norms_ = nullptr;     // [rows] bound on |x|
  Scratch x_memory_, group_memory_, sum_memory_;
};

template <class T>
inline const T* scoring_rows(const cpu::PackedEncoder& encoder) {
  if constexpr (std::is_same_v<T, float>) {
    return encoder.W_enc;
  } else {
    return static_cast<const T*>(encoder.rounded);
  }
}

// Rows that go through the product at once: what suits it, and a share for every thread; in whole
// groups.
template <class Product>
inline int64_t product_rows(int64_t tokens, int64_t d_in, int threads) {
  constexpr int64_t kUnit = Product::kGroup;
  const int64_t most = Product::most_rows(d_in);
  const int64_t share = (tokens + threads - 1) / threads;
  const int64_t rows = most < share ? most : share;
  return rows < kUnit ? kUnit : (rows + kUnit - 1) / kUnit * kUnit;
}

// Rows in a block, whose candidates are scored together: the more, the fewer times all encoder rows
// are read; as many as leave two blocks a thread where they can, whose strips of columns stay in
// L2, and whose candidates, of `bytes_per_row`, do not need too much memory. A multiple of `unit`
// if that is possible.
inline int64_t block_rows(int64_t tokens, int64_t unit, int64_t bytes_per_row, int threads) {
  constexpr int64_t kMostRows = 1024;
  const int64_t half_share = (tokens + 2 * threads - 1) / (2 * int64_t{threads});
  const int64_t held = (int64_t{32} << 20) / (bytes_per_row + 1);
  int64_t rows = half_share < kMostRows ? half_share : kMostRows;
  rows = rows < held ? rows : held;
  if (rows >= unit) return rows / unit * unit;
  const int64_t least = unit < held ? unit : held;
  return least > 1 ? least : 1;
}

}  // namespace sae_fast::SAE_FAST_ISA
