// The largest distance of a pre-activation by the 16-bit product from the float32 result.
//
// Let u = 2^-24, x = fl(x - b_dec) and w the float32 operands, x', w' the rounded ones, g the
// product, b the bias, f the float32 dot product of encode_score.cuh. Then
//   |f - x.w|     <= (d/32 + 16) u |x| |w|            the longest chain of additions in f
//   |x.w - x'.w'| <= |x - x'| |w| + |x'| |w - w'|      Cauchy-Schwarz
//   |g - x'.w'|   <= (d + 16) 2u |x'| |w'|             products are exact, see below
// and |w'| <= |w| + |w - w'|. The bias is added to each, and the bound itself is added and taken
// off with rounding: at most 5 roundings of numbers below |x'| |w'| + |x| |w| + |b| + E, for which
// 8u of each is set aside. All together
//   E(n, j) = product_n |w_j| + residual_n |w_j - w'_j| + 8u |b_j| + floor_n.
//
// 2u a term for the product: a tensor core aligns the terms of a step to the largest and cuts them
// off, on Ampere at 2^-24 of it, on Hopper finer (published measurements; undocumented). A sum that
// is off by more than that, which has not been observed, shows where it makes a latent a candidate,
// whose score is computed again: such a row is then computed in full. Where the sum is too small
// for the latent to become a candidate, nothing shows it.
//
// floor_n covers underflow: of the squares in the stats, of 16-bit operands, of E itself.
#pragma once

#include "kernels/cuda/encode/encode.h"
#include "kernels/cuda/launch.cuh"

namespace sae_fast::cuda {

constexpr float kRoundings = 0x1p-21f;  // 8u

// Tokens longer than this, or not finite, are computed in full. A latent out of this range is a
// candidate for every token. Inside it no product or sum overflows.
constexpr float kLengthLimit = 0x1p60f;
constexpr float kBiasLimit = 0x1p100f;

// The largest terms among the latents of a segment.
struct SegmentBound {
  float length, residual, bias;
};

struct TokenBound {
  float product, residual, floor;

  // Infinity or NaN where nothing is known: such an error lets every value pass.
  __device__ float error(float length, float residual_length, float bias) const {
    return fmaf(product, length, fmaf(residual, residual_length, fmaf(kRoundings, bias, floor)));
  }

  __device__ float error(const SegmentBound& segment) const {
    return error(segment.length, segment.residual, segment.bias);
  }
};

// The terms of one latent; infinite where they are out of range.
__device__ inline SegmentBound latent_bound(const Encoder& encoder, int64_t latent) {
  SegmentBound bound{encoder.stats[latent], encoder.stats[encoder.d_sae + latent],
                     fabsf(encoder.b_enc[latent])};
  const bool in_range =
      bound.length < kLengthLimit && bound.residual < kLengthLimit && bound.bias < kBiasLimit;
  if (!in_range) bound.length = INFINITY;
  return bound;
}

// The bound of a token from the sums of squares of x - x', x' and x. Float64 sums neither
// underflow nor need slack worth mentioning; 2^-12 covers all arithmetic from here on.
__device__ inline TokenBound token_bound(double residual_square, double rounded_square,
                                         double square, int64_t d_in) {
  constexpr double kUnit = 0x1p-24;
  constexpr double kSlack = 1.0 + 0x1p-12;
  constexpr double kTiny = 0x1p-60;
  const auto columns = static_cast<double>(d_in);
  const double rounded = sqrt(rounded_square);
  const double summed = (columns + 16.0) * 2.0 * kUnit + kRoundings;
  const double scored = (columns / 32.0 + 16.0) * kUnit + kRoundings;
  const double product =
      (sqrt(residual_square) + summed * rounded + scored * sqrt(square)) * kSlack;
  const double residual = rounded * (1.0 + summed) * kSlack;
  return {static_cast<float>(product) + 0x1p-110f, static_cast<float>(residual) + 0x1p-110f,
          static_cast<float>((product + residual) * kTiny) + 1e-30f};
}

}  // namespace sae_fast::cuda
