// When a latent's activations over a batch vary at all, and their length: host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/host_device.h"

namespace sae_fast {

// A latent is silent where its activations h differ from their mean by no more than the rounding
// of what computed them: |h - mean| <= 2^-20 |h|, sixteen times a float32's rounding. Below the
// smallest normal float 1 / |h - mean| would not be a number to count on.
constexpr double kSilentShare = 0x1p-40;      // of |h|^2
constexpr double kSmallestSquare = 0x1p-252;  // 2^-126 squared

// The activation less the mean, exact to a float's rounding however large the mean is.
SAE_FAST_HOST_DEVICE inline float centred(float activation, double mean) {
  return static_cast<float>(static_cast<double>(activation) - mean);
}

// 1 / |h - mean| of a latent from the square of that length; 0 where it is silent, NaN for NaN.
SAE_FAST_HOST_DEVICE inline float inverse_length(double square, double mean, int64_t tokens) {
  const double whole = square + static_cast<double>(tokens) * mean * mean;
  if (square <= kSilentShare * whole || square < kSmallestSquare) return 0.0f;
  return static_cast<float>(1.0 / std::sqrt(square));
}

}  // namespace sae_fast
