// The length that unit rows are divided by: never so small that a zero row becomes NaN.
#pragma once

#include <cmath>

#include "kernels/common/host_device.h"

namespace sae_fast {

constexpr float kSmallestRowNorm = 1e-12f;

// max(sqrt(square), kSmallestRowNorm), and NaN for NaN.
SAE_FAST_HOST_DEVICE inline float row_norm(float square) {
  const float norm = std::sqrt(square);
  return norm < kSmallestRowNorm ? kSmallestRowNorm : norm;
}

}  // namespace sae_fast
