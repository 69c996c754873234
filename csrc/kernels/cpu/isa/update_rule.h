// The step of a weight row, whatever the rule and whatever its moments are stored as: in 16 and 8
// bits they are floats for as long as a block of columns is in the first cache.
#pragma once

#include "kernels/common/moments.h"
#include "kernels/cpu/isa/simd.h"
#include "kernels/cpu/rows.h"

namespace sae_fast::SAE_FAST_ISA {

typedef uint32_t VecUint __attribute__((vector_size(kLanes * 4)));
static_assert(kMomentBlock % kLanes == 0, "blocks are read and written in whole vectors");

// update_weight on whole vectors.
template <UpdateRule kRule>
class VecStep;

template <>
class VecStep<UpdateRule::kAdam> {
 public:
  explicit VecStep(const UpdateStep& step)
      : beta2_(broadcast(step.beta2)),
        rest1_(broadcast(step.one_minus_beta1)),
        rest2_(broadcast(step.one_minus_beta2)),
        step_(broadcast(step.step_size)),
        correction_(broadcast(1.0f / step.sqrt_bias_correction2)),
        eps_(broadcast(step.eps)),
        decay_(broadcast(step.decay)) {}

  Vec operator()(Vec weight, Vec grad, Vec& exp_avg, Vec& exp_avg_sq) const {
    exp_avg = exp_avg + rest1_ * (grad - exp_avg);
    exp_avg_sq = beta2_ * exp_avg_sq + rest2_ * (grad * grad);
    const Vec denominator = vec_sqrt(exp_avg_sq) * correction_ + eps_;
    return decay_ * weight - step_ * (exp_avg / denominator);
  }

 private:
  Vec beta2_, rest1_, rest2_, step_, correction_, eps_, decay_;
};

template <>
class VecStep<UpdateRule::kSgd> {
 public:
  explicit VecStep(const UpdateStep& step)
      : beta1_(broadcast(step.beta1)),
        grad_decay_(broadcast(step.grad_decay)),
        step_(broadcast(step.step_size)) {}

  Vec operator()(Vec weight, Vec grad, Vec& exp_avg, Vec& /*exp_avg_sq*/) const {
    exp_avg = beta1_ * exp_avg + (grad + grad_decay_ * weight);
    return weight - step_ * exp_avg;
  }

 private:
  Vec beta1_, grad_decay_, step_;
};

template <>
class VecStep<UpdateRule::kSignum> {
 public:
  explicit VecStep(const UpdateStep& step)
      : rest1_(broadcast(step.one_minus_beta1)),
        step_(broadcast(step.step_size)),
        decay_(broadcast(step.decay)) {}

  Vec operator()(Vec weight, Vec grad, Vec& exp_avg, Vec& /*exp_avg_sq*/) const {
    exp_avg = exp_avg + rest1_ * (grad - exp_avg);
    const Vec zero{};
    return decay_ * weight - (exp_avg > zero ? step_ : exp_avg < zero ? -step_ : zero);
  }

 private:
  Vec rest1_, step_, decay_;
};

// The step of `d_in` weights; `grad` null stands for zeros, exp_avg_sq is read where there is one.
template <UpdateRule kRule>
inline void update_floats(const UpdateScalars& scalars, const float* grad, int64_t d_in,
                          float* weight, float* exp_avg, float* exp_avg_sq) {
  const VecStep<kRule> step(scalars.step);
  int64_t i = 0;
  for (; i + kLanes <= d_in; i += kLanes) {
    const Vec g = grad != nullptr ? load(grad + i) * broadcast(scalars.grad_scale) : Vec{};
    Vec m = load(exp_avg + i);
    Vec v{};
    if constexpr (has_exp_avg_sq(kRule)) v = load(exp_avg_sq + i);
    store(weight + i, step(load(weight + i), g, m, v));
    store(exp_avg + i, m);
    if constexpr (has_exp_avg_sq(kRule)) store(exp_avg_sq + i, v);
  }
  float unused = 0.0f;
  for (; i < d_in; ++i) {
    const float g = grad != nullptr ? grad[i] * scalars.grad_scale : 0.0f;
    float& v = has_exp_avg_sq(kRule) ? exp_avg_sq[i] : unused;
    weight[i] = update_weight<kRule>(scalars.step, weight[i], g, exp_avg[i], v);
  }
}

// The next kLanes codes. In words of their own where there are any: GCC 12 takes the portable form
// apart, element by element.
inline VecUint load_codes(const uint16_t* from) {
#if defined(__AVX512F__)
  return (VecUint)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (VecUint)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  VecUint codes;
  for (int lane = 0; lane < kLanes; ++lane) codes[lane] = from[lane];
  return codes;
#endif
}

inline VecUint load_codes(const uint8_t* from) {
#if defined(__AVX512F__)
  return (VecUint)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (VecUint)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  VecUint codes;
  for (int lane = 0; lane < kLanes; ++lane) codes[lane] = from[lane];
  return codes;
#endif
}

inline void store_codes(uint16_t* to, VecUint codes) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)codes));
#elif defined(__AVX2__)
  const __m256i halves = _mm256_packus_epi32((__m256i)codes, (__m256i)codes);
  const __m256i joined = _mm256_permute4x64_epi64(halves, 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(joined));
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<uint16_t>(codes[lane]);
#endif
}

inline void store_codes(uint8_t* to, VecUint codes) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)codes));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)codes, (__m256i)codes);
  const __m256i fours = _mm256_packus_epi16(pairs, pairs);  // codes 0 to 3, and from 16 on 4 to 7
  const __m128i joined =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), joined);
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<uint8_t>(codes[lane]);
#endif
}

// The random bits of a block's columns, which begin at `first`.
inline void fill_random(uint32_t seed, int64_t first, uint32_t* random) {
  VecUint columns;
  for (int lane = 0; lane < kLanes; ++lane) columns[lane] = static_cast<uint32_t>(lane);
  columns += static_cast<uint32_t>(first);
  for (int64_t i = 0; i < kMomentBlock; i += kLanes) {
    const VecUint bits = moment_random(seed, columns);
    std::memcpy(random + i, &bits, sizeof bits);
    columns += static_cast<uint32_t>(kLanes);
  }
}

inline VecUint load_bits(const void* from) {
  VecUint bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

// A block of codes as they are kept; every function below is on whole blocks, of which a short
// one's rest is zeros.
struct MomentsIn16 {
  using Code = uint16_t;

  template <class Moment>
  static void decode(const uint16_t* codes, float /*scale*/, float* floats) {
    for (int64_t i = 0; i < kMomentBlock; i += kLanes) {
      store(floats + i, (Vec)(load_codes(codes + i) << 16));
    }
  }

  template <class Moment>
  static float encode(const float* floats, const uint32_t* random, uint16_t* codes) {
    for (int64_t i = 0; i < kMomentBlock; i += kLanes) {
      const VecUint bits = load_bits(floats + i);
      store_codes(codes + i, round_moment_to_16<Moment>(bits, load_bits(random + i)));
    }
    return 0.0f;
  }
};

struct MomentsIn8 {
  using Code = uint8_t;

  template <class Moment>
  static void decode(const uint8_t* codes, float scale, float* floats) {
    const Vec scales = broadcast(scale), one = broadcast(1.0f);
    for (int64_t i = 0; i < kMomentBlock; i += kLanes) {
      const VecUint code = load_codes(codes + i);
      const Vec magnitude = ((Vec)shifted_bits<Moment>(code) - one) * scales;
      store(floats + i, (Vec)((VecUint)magnitude | sign_bits<Moment>(code)));
    }
  }

  // Returns the block's scale.
  template <class Moment>
  static float encode(const float* floats, const uint32_t* random, uint8_t* codes) {
    VecUint largest{};
    for (int64_t i = 0; i < kMomentBlock; i += kLanes) {
      const VecUint magnitude = load_bits(floats + i) & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    uint32_t whole = 0;
    for (int lane = 0; lane < kLanes; ++lane) whole = whole < largest[lane] ? largest[lane] : whole;
    const float scale = float_from_bits(block_scale_bits<Moment>(whole));
    const Vec inverse = broadcast(1.0f / scale), one = broadcast(1.0f);
    for (int64_t i = 0; i < kMomentBlock; i += kLanes) {
      const Vec moment = load(floats + i);
      const auto shifted = (VecUint)(one + vec_abs(moment) * inverse);
      const VecUint code =
          round_moment_to_8<Moment>((VecUint)moment, shifted, load_bits(random + i));
      store_codes(codes + i, code);
    }
    return scale;
  }
};

// One moment of one block: its codes in memory, and the floats in between.
template <class Format, class Moment>
class BlockMoment {
 public:
  BlockMoment(void* codes, int64_t offset, int64_t size, float* scale)
      : codes_(static_cast<typename Format::Code*>(codes) + offset), size_(size), scale_(scale) {
    typename Format::Code whole[kMomentBlock] = {};
    std::memcpy(whole, codes_, bytes());
    Format::template decode<Moment>(whole, scale != nullptr ? *scale : 1.0f, floats_);
  }

  float* floats() { return floats_; }

  void put_back(const uint32_t* random) {
    typename Format::Code whole[kMomentBlock];
    const float scale = Format::template encode<Moment>(floats_, random, whole);
    if (scale_ != nullptr) *scale_ = scale;
    std::memcpy(codes_, whole, bytes());
  }

 private:
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(typename Format::Code); }

  typename Format::Code* codes_;
  int64_t size_;
  float* scale_;
  alignas(64) float floats_[kMomentBlock];
};

// The step of row `latent`, block by block.
template <UpdateRule kRule, class Format>
inline void update_blocks(const UpdateScalars& scalars, const float* grad, int64_t d_in,
                          int64_t latent, const Moments& moments, float* weight) {
  const uint32_t seed = moment_seed(*moments.step, latent);
  const int64_t blocks = moment_blocks(d_in);
  const bool scaled = moments.type == MomentType::kBlocks;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kMomentBlock;
    const int64_t size = d_in - first < kMomentBlock ? d_in - first : kMomentBlock;
    const int64_t place = latent * blocks + block;
    const float* const own_grad = grad != nullptr ? grad + first : nullptr;
    BlockMoment<Format, ExpAvg> mean(moments.exp_avg, latent * d_in + first, size,
                                     scaled ? moments.exp_avg_scale + place : nullptr);
    alignas(64) uint32_t random[kMomentBlock];
    fill_random(seed, first, random);
    if constexpr (has_exp_avg_sq(kRule)) {
      BlockMoment<Format, ExpAvgSq> square(moments.exp_avg_sq, latent * d_in + first, size,
                                           scaled ? moments.exp_avg_sq_scale + place : nullptr);
      update_floats<kRule>(scalars, own_grad, size, weight + first, mean.floats(), square.floats());
      square.put_back(random);
    } else {
      update_floats<kRule>(scalars, own_grad, size, weight + first, mean.floats(), nullptr);
    }
    mean.put_back(random);
  }
}

// The step of row `latent`; weight [d_in] and grad [d_in] or null are the row's own.
template <UpdateRule kRule>
inline void update_weights(const UpdateScalars& scalars, const float* grad, int64_t d_in,
                           int64_t latent, const Moments& moments, float* weight) {
  switch (moments.type) {
    case MomentType::kFloat32: {
      const int64_t start = latent * d_in;
      auto* const squares = static_cast<float*>(moments.exp_avg_sq);
      update_floats<kRule>(scalars, grad, d_in, weight,
                           static_cast<float*>(moments.exp_avg) + start,
                           has_exp_avg_sq(kRule) ? squares + start : nullptr);
      return;
    }
    case MomentType::kBFloat16:
      update_blocks<kRule, MomentsIn16>(scalars, grad, d_in, latent, moments, weight);
      return;
    case MomentType::kBlocks:
      update_blocks<kRule, MomentsIn8>(scalars, grad, d_in, latent, moments, weight);
      return;
  }
}

}  // namespace sae_fast::SAE_FAST_ISA
