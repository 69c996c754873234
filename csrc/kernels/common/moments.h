// Moments in 16 and 8 bits, host and device. Between steps a moment is a code; in a step it
// is a float32, which is rounded up or down at random when it becomes a code again, so that its
// mean is right: a second moment moves by a thousandth of itself a step, less than any code can
// show. (600 steps on real activations, held-out FVU against float32 moments: 8 bits within 0.3 %;
// rounded to nearest, where second moments stay too small, 4 to 5 % off.) The random bits are a
// hash of step, latent and column. Every back end computes the same codes from the same floats:
// scales are powers of two, so nothing but the rounding rounds.
//
// bfloat16: the upper half of the float.
// 8 bits: kMomentBlock columns of a row share a scale. A code c stands for scale times
// ((1 + c % 8 / 8) 2^(c / 8) - 1): a float with 3 bits of mantissa that starts at 0 in steps of 1/8
// and doubles them every octave, with neither a smallest normal number nor subnormal ones.
// exp_avg has a sign bit and 16 octaves, exp_avg_sq 32, of which the scale leaves the last one
// free: a number that is rounded up still has a code.
//
// The functions on Bits take uint32_t, or a vector of them.
#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/half.h"
#include "kernels/common/host_device.h"

namespace sae_fast {

constexpr int64_t kMomentBlock = 256;

SAE_FAST_HOST_DEVICE constexpr int64_t moment_blocks(int64_t d_in) {
  return (d_in + kMomentBlock - 1) / kMomentBlock;
}

// The moments of a weight matrix [F, D]: exp_avg, and exp_avg_sq where the rule has it.
struct Moments {
  DType type;               // kFloat32, kBFloat16 or kUInt8
  void* exp_avg;            // [F, D] float, uint16_t or uint8_t
  void* exp_avg_sq;         // [F, D] of the same type, or null
  float* exp_avg_scale;     // [F, moment_blocks(D)] for kUInt8
  float* exp_avg_sq_scale;  // [F, moment_blocks(D)] for kUInt8
  const int64_t* step;      // number of this update; not needed for kFloat32
};

// ---- random bits

// A permutation of the 32-bit numbers that changes half of the bits for every bit of its argument
// (C. Wellons' "lowbias32").
template <class Bits>
SAE_FAST_ALWAYS_INLINE Bits mix_bits(Bits bits) {
  bits ^= bits >> 16;
  bits *= 0x7feb352du;
  bits ^= bits >> 15;
  bits *= 0x846ca68bu;
  return bits ^ (bits >> 16);
}

SAE_FAST_ALWAYS_INLINE uint32_t moment_seed(int64_t step, int64_t latent) {
  const auto number = static_cast<uint64_t>(step);
  const uint32_t high = mix_bits(static_cast<uint32_t>(number >> 32));
  const uint32_t whole = mix_bits(high ^ static_cast<uint32_t>(number));
  return mix_bits(whole + static_cast<uint32_t>(latent));
}

// For both moments of a column: 16 bits each.
template <class Bits>
SAE_FAST_ALWAYS_INLINE Bits moment_random(uint32_t seed, Bits column) {
  return mix_bits(column + seed);
}

// ---- how a moment is rounded

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kExponent = 0x7f800000u;
constexpr uint32_t kLargestBFloat16 = 0x7f7f0000u;
constexpr uint32_t kOne = 0x3f800000u;  // 1.0f
constexpr int kMantissaBits = 23;
constexpr int kDropped = 20;  // of them, in 8 bits

struct ExpAvg {
  static constexpr uint32_t kLargestCode = 127;
  static constexpr uint32_t kSignCode = 128;
  static constexpr uint32_t kOctaves = 15;  // that the numbers of a block are in
  static constexpr bool kKeepsPositive = false;

  template <class Bits>
  SAE_FAST_ALWAYS_INLINE static Bits own_half(Bits random) {
    return random >> 16;
  }
};

// A positive second moment never becomes 0: the step divides by its root.
struct ExpAvgSq {
  static constexpr uint32_t kLargestCode = 255;
  static constexpr uint32_t kSignCode = 0;
  static constexpr uint32_t kOctaves = 31;
  static constexpr bool kKeepsPositive = true;

  template <class Bits>
  SAE_FAST_ALWAYS_INLINE static Bits own_half(Bits random) {
    return random & 0xffffu;
  }
};

template <class Bits>
SAE_FAST_ALWAYS_INLINE Bits at_most(Bits bits, uint32_t limit) {
  const Bits limits = Bits{} + limit;
  return bits < limits ? bits : limits;
}

// The smallest code in place of 0 where the moment must not become 0.
template <class Moment, class Bits>
SAE_FAST_ALWAYS_INLINE Bits kept_positive(Bits code, Bits magnitude) {
  if constexpr (Moment::kKeepsPositive) {
    const Bits least = at_most(magnitude, 1u);
    return code < least ? least : code;
  } else {
    return code;
  }
}

// The upper 16 bits of a float with these bits. The largest finite number is the limit, also of
// infinity and NaN.
template <class Moment, class Bits>
SAE_FAST_ALWAYS_INLINE Bits round_moment_to_16(Bits bits, Bits random) {
  const Bits magnitude = bits & kMagnitude;
  const Bits rounded = (at_most(magnitude, kLargestBFloat16) + Moment::own_half(random)) >> 16;
  return kept_positive<Moment>(rounded, magnitude) | ((bits & kSignBit) >> 16);
}

// The scale, as bits, of a block in which the magnitudes' bits are at most these: the power of two
// in whose units they are below 2^kOctaves. Neither so small that a product with it, or with its
// reciprocal, could be subnormal, nor so large that the largest code were infinite.
template <class Moment>
SAE_FAST_ALWAYS_INLINE uint32_t block_scale_bits(uint32_t largest_magnitude) {
  constexpr uint32_t kBelow = (Moment::kOctaves - 1) << kMantissaBits;
  constexpr uint32_t kLowest = kBelow + (uint32_t{127 - 120} << kMantissaBits);
  constexpr uint32_t kHighest = uint32_t{127 + 125} << kMantissaBits;
  const uint32_t exponent = at_most(largest_magnitude & kExponent, kHighest);
  return (exponent < kLowest ? kLowest : exponent) - kBelow;
}

// The code of a float with these bits; `shifted` are the bits of 1 + |float| / scale. The 16 random
// bits stand above half of one of their own units. Infinity and NaN become the largest code.
template <class Moment, class Bits>
SAE_FAST_ALWAYS_INLINE Bits round_moment_to_8(Bits bits, Bits shifted, Bits random) {
  constexpr int kFraction = kDropped - 16;
  const Bits added = (Moment::own_half(random) << kFraction) + (1u << (kFraction - 1));
  const Bits code = at_most((shifted - kOne + added) >> kDropped, Moment::kLargestCode);
  const Bits kept = kept_positive<Moment>(code, bits & kMagnitude);
  return Moment::kSignCode == 0 ? kept : kept | ((bits & kSignBit) >> 24);
}

// Bits of the float whose value less 1 is the code's, in units of the scale.
template <class Moment, class Bits>
SAE_FAST_ALWAYS_INLINE Bits shifted_bits(Bits code) {
  return ((code & Moment::kLargestCode) << kDropped) + kOne;
}

template <class Moment, class Bits>
SAE_FAST_ALWAYS_INLINE Bits sign_bits(Bits code) {
  return (code & Moment::kSignCode) << 24;
}

// ---- one moment

template <class Moment>
SAE_FAST_HOST_DEVICE inline uint8_t encode_moment(float value, float scale, uint32_t random) {
  const uint32_t bits = float_bits(value);
  const float magnitude = float_from_bits(bits & kMagnitude);
  const float shifted = 1.0f + magnitude * (1.0f / scale);
  return static_cast<uint8_t>(round_moment_to_8<Moment>(bits, float_bits(shifted), random));
}

template <class Moment>
SAE_FAST_HOST_DEVICE inline float decode_moment(uint8_t code, float scale) {
  const uint32_t bits = code;
  const float magnitude = (float_from_bits(shifted_bits<Moment>(bits)) - 1.0f) * scale;
  return float_from_bits(float_bits(magnitude) | sign_bits<Moment>(bits));
}

}  // namespace sae_fast
