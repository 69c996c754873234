// Moments in 16 and 8 bits at one instruction set: blocks of codes to floats and back.
#pragma once

#include "kernels/common/moments.h"
#include "kernels/cpu/isa/simd.h"

namespace sae_fast::SAE_FAST_ISA {

typedef uint32_t VecUint __attribute__((vector_size(kLanes * 4)));
static_assert(kMomentBlock % kLanes == 0, "blocks are read and written in whole vectors");

// The next kLanes codes. By instructions for it where there are any: GCC 12 compiles the portable
// form to one load for each element.
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

// A block of codes as they are stored. Every function below takes whole blocks; a short block is
// filled up with zeros.
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

}  // namespace sae_fast::SAE_FAST_ISA
