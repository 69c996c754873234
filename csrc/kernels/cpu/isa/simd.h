// One vector of floats as wide as the instruction set, on GCC's and clang's vector types: the same
// source compiles to SSE2, NEON, AVX2 or AVX-512. Only files of this folder may include it: each is
// compiled once per instruction set, inside namespace sae_fast::SAE_FAST_ISA, so that no symbol of
// one level can be merged with another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/common/half.h"

#define SAE_FAST_UNROLL _Pragma("GCC unroll 32")

namespace sae_fast::SAE_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// Not Vec{} + value: adding zero to -0 changes it, so the compiler would have to add.
inline Vec broadcast(float value) { return value - Vec{}; }

inline Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }

inline void store(float* to, Vec value) { *reinterpret_cast<UnalignedVec*>(to) = value; }

inline Vec load(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  Vec value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = to_float(from[lane]);
  return value;
#endif
}

inline Vec load(const Float16* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = to_float(from[lane]);
  return value;
#endif
}

// The first `count` < kLanes elements, zeros behind them.
template <class T>
inline Vec load_tail(const T* from, int64_t count) {
  alignas(64) T padded[kLanes] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

inline void store_tail(float* to, Vec value, int64_t count) {
  std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(float));
}

inline Vec vec_sqrt(Vec value) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)value);
#else
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = std::sqrt(value[lane]);
  return value;
#endif
}

inline Vec vec_abs(Vec value) { return (Vec)((VecInt)value & (VecInt{} + 0x7fffffff)); }

inline Vec vec_max(Vec a, Vec b) { return a > b ? a : b; }

// Adds halves onto halves, always in this tree: a sum has one value per instruction set.
inline float reduce_add(Vec value) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)value),
                                     (__m256)_mm512_extractf64x4_pd((__m512d)value, 1));
#else
  const __m256 eight = (__m256)value;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
#endif
}

// Lane i of the result is reduce_add of vector i, bit for bit: the same additions, kLanes at
// once, with three shuffles a sum where reduce_add takes ten.
[[gnu::always_inline]] inline Vec reduce_add_each(const Vec* vectors) {
#if defined(__AVX512F__)
  __m512 half[8], quarter[4], pairs[2];
  // Output lane 4 t + u is input t + 4 u, hence the order in which they are taken.
  const auto input = [&](int i) { return (__m512)vectors[(i % 4) * 4 + i / 4]; };
  SAE_FAST_UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512 a = input(2 * i), b = input(2 * i + 1);
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  SAE_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 a = half[2 * i], b = half[2 * i + 1];
    quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  SAE_FAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const auto a = (__m512d)quarter[2 * i], b = (__m512d)quarter[2 * i + 1];
    pairs[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  return (Vec)_mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88),
                            _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
#elif defined(__AVX2__)
  __m256 half[4], pairs[2];
  const auto input = [&](int i) { return (__m256)vectors[(i % 2) * 4 + i / 2]; };
  SAE_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m256 a = input(2 * i), b = input(2 * i + 1);
    half[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  SAE_FAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const auto a = (__m256d)half[2 * i], b = (__m256d)half[2 * i + 1];
    pairs[i] = _mm256_add_ps((__m256)_mm256_unpacklo_pd(a, b), (__m256)_mm256_unpackhi_pd(a, b));
  }
  return (Vec)_mm256_add_ps(_mm256_shuffle_ps(pairs[0], pairs[1], 0x88),
                            _mm256_shuffle_ps(pairs[0], pairs[1], 0xdd));
#else
  Vec part[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    part[lane] = Vec{vectors[0][lane], vectors[1][lane], vectors[2][lane], vectors[3][lane]};
  }
  return (part[0] + part[2]) + (part[1] + part[3]);
#endif
}

inline float reduce_max(Vec value) {
  float best = value[0];
  for (int lane = 1; lane < kLanes; ++lane) best = value[lane] > best ? value[lane] : best;
  return best;
}

template <class T>
inline T round_to(float value);
template <>
inline float round_to<float>(float value) {
  return value;
}
template <>
inline BFloat16 round_to<BFloat16>(float value) {
  return round_to_bfloat16(value);
}
template <>
inline Float16 round_to<Float16>(float value) {
  return round_to_float16(value);
}

// Stores `count` floats as T, rounded to nearest even.
template <class T>
inline void store_rounded(T* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = round_to<T>(from[i]);
}

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

inline void prefetch_row(const void* row, int64_t bytes) {
  const char* line = static_cast<const char*>(row);
  for (int64_t offset = 0; offset < bytes; offset += 64) prefetch(line + offset);
}

// <a, b> in float: four running vectors, then one tree.
template <class T>
inline float dot(const float* a, const T* b, int64_t size) {
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    SAE_FAST_UNROLL
    for (int part = 0; part < 4; ++part) {
      sum[part] += load(a + i + part * kLanes) * load(b + i + part * kLanes);
    }
  }
  for (; i + kLanes <= size; i += kLanes) sum[0] += load(a + i) * load(b + i);
  if (i < size) sum[1] += load_tail(a + i, size - i) * load_tail(b + i, size - i);
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Aligned scratch memory with RAII, in place of std::vector: a standard container instantiated
// here would be compiled with this level's instructions and could be merged with the baseline's.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) { reset(bytes); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Returns false if the memory could not be allocated.
  bool reset(int64_t bytes) {
    std::free(memory_);
    const size_t wanted = static_cast<size_t>(bytes > 0 ? bytes : 1);
    // In large pages where it fills some: every token and every latent is on a page of its own.
    const size_t alignment = wanted >= kLargePage ? kLargePage : 64;
    const size_t rounded = (wanted + alignment - 1) / alignment * alignment;
    memory_ = std::aligned_alloc(alignment, rounded);
#if defined(MADV_HUGEPAGE)
    if (memory_ != nullptr && alignment == kLargePage) madvise(memory_, rounded, MADV_HUGEPAGE);
#endif
    return memory_ != nullptr;
  }

  template <class T>
  T* as(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_) + byte_offset);
  }

  explicit operator bool() const { return memory_ != nullptr; }

 private:
  static constexpr size_t kLargePage = size_t{2} << 20;

  void* memory_ = nullptr;
};

}  // namespace sae_fast::SAE_FAST_ISA
